"""From steps measured on one rank to a run on many: formulas first, then a simulation of its luck.

Exchange: the ring algorithm moves ``2 (W - 1) / W`` times a tensor past each rank to sum it (half
of that to gather it, or to scatter its sum), in ``2 (W - 1)`` messages; small tensors go along a
tree in ``2 log2 W``. A ring over nodes passes the network of each node once, so the slower of the
two links sets its pace (Thakur et al. 2005). Checkpoints and failures: Daly 2006, of which Young's
interval is the first term. Stragglers: a step waits for the slowest of W ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

HOUR = 3600.0
_DRAWS = 2000
"""Steps whose slowest rank is drawn, and runs whose failures are."""
_BUCKET_BYTES = 25 * 2**20  # of DDP: the last one has no backward pass to hide behind


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where a run is to take place. All but the first two are assumptions."""

    nodes: int
    devices_per_node: int
    device_speed: float = 1.0
    """How many times as fast as the device that was measured."""
    link_bytes_per_second: float = 100e9
    """Between devices of a node, one way."""
    network_bytes_per_second: float = 25e9
    """Between nodes, one way, all devices of a node together."""
    latency_seconds: float = 20e-6
    """Of a message."""
    overlap: float = 1.0
    """Share of the backward pass that an exchange can hide behind."""
    straggler_deviation: float = 0.05
    """Standard deviation of a rank's time over a step, over its mean (lognormal)."""
    node_failure_hours: float = 6300.0
    """Mean time between failures of a node (Llama 3, Dubey et al. 2024: 419 in 54 days on 2,048
    nodes of 8)."""
    restart_seconds: float = 600.0
    """From a failure until training goes on, without what is trained again."""

    @property
    def ranks(self) -> int:
        """Number of ranks W, one a device."""
        return self.nodes * self.devices_per_node

    @property
    def ring_bytes_per_second(self) -> float:
        """Pace of a ring over all ranks."""
        if self.nodes == 1:
            return self.link_bytes_per_second
        return min(self.link_bytes_per_second, self.network_bytes_per_second)


@dataclass(frozen=True, slots=True)
class Work:
    """What a run has to do, in times of the device that was measured."""

    steps: int
    """Of training, those of the guard included."""
    compute_seconds: float
    """A rank's step without any exchange."""
    backward_seconds: float
    """Of it, what an exchange may hide behind."""
    parameter_bytes: int
    exchange_bytes: int
    """What a rank says of its batch beside gradients."""
    checkpoint_every: int
    """Steps."""
    stall_seconds: float
    """That a checkpoint keeps training waiting, without gathering it."""
    start_seconds: float
    evaluation_batches: int
    """Of all ranks, after training; one rank has each."""
    evaluation_seconds: float
    """Of a batch."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """How long a run takes."""

    step_seconds: float
    exposed_seconds: float
    """Of a step: exchange that backward does not hide."""
    straggler_seconds: float
    """Of a step: waiting for the slowest rank."""
    checkpoint_share: float
    """Of the time without failures."""
    hours_without_failures: float
    hours: float
    """Expected, failures included (Daly)."""
    hours_p5: float
    hours_p95: float
    failures: float
    """Expected."""
    best_checkpoint_seconds: float
    """Young's interval between checkpoints."""


def all_reduce_seconds(size: float, cluster: Cluster) -> float:
    """To sum ``size`` bytes over all ranks."""
    ranks = cluster.ranks
    if ranks == 1:
        return 0.0
    ring = (
        2 * (ranks - 1) * (size / ranks / cluster.ring_bytes_per_second + cluster.latency_seconds)
    )
    hops = 2 * math.ceil(math.log2(ranks))
    tree = hops * (size / cluster.ring_bytes_per_second + cluster.latency_seconds)
    return min(ring, tree)


def gradient_seconds(backend: str, size: float, cluster: Cluster) -> float:
    """To exchange gradients, and weights where they are cut up, of ``size`` bytes in a step."""
    once = all_reduce_seconds(size, cluster)
    # FSDP2 and stage 3 gather weights forward and backward, and scatter gradients: three halves.
    return 1.5 * once if backend in ("fsdp2", "zero3", "zero3_offload") else once


def exposed_seconds(backend: str, work: Work, cluster: Cluster) -> float:
    """What of the exchange of a step no computing hides."""
    if cluster.ranks == 1:
        return 0.0
    gradients = gradient_seconds(backend, work.parameter_bytes, cluster)
    hidden = cluster.overlap * work.backward_seconds / cluster.device_speed
    last = all_reduce_seconds(min(_BUCKET_BYTES, work.parameter_bytes), cluster)
    # One small vote on stopping, and the batch's word to the memory beside backward.
    votes = all_reduce_seconds(32, cluster)
    said = all_reduce_seconds(work.exchange_bytes, cluster) if work.exchange_bytes else 0.0
    return max(gradients + said - hidden, min(gradients, last)) + votes


def slowest_of(ranks: int, deviation: float, seed: int = 0) -> float:
    """Mean of the slowest of ``ranks`` times of mean 1 (lognormal), drawn many times."""
    if deviation == 0.0 or ranks == 1:
        return 1.0
    sigma = math.sqrt(math.log1p(deviation**2))
    # The slowest of W is the quantile U ** (1 / W): one number instead of W.
    uniform = np.random.default_rng(seed).random(_DRAWS)
    quantile = ndtri(uniform ** (1.0 / ranks))
    return float(np.exp(sigma * quantile - sigma**2 / 2).mean())


def daly_seconds(
    work_seconds: float, interval: float, stall: float, restart: float, between_failures: float
) -> float:
    """Expected time of work that fails at random and goes on from its checkpoints (Daly 2006).

    Args:
        work_seconds: without checkpoints and failures.
        interval: of work between two checkpoints.
        stall: of a checkpoint.
        restart: from a failure until work goes on.
        between_failures: mean time, M: ``M e^(R/M) (e^((t + d)/M) - 1)`` for each interval.
    """
    mean = between_failures
    each = mean * math.exp(restart / mean) * math.expm1((interval + stall) / mean)
    return work_seconds / interval * each


def simulate_seconds(
    work_seconds: float,
    interval: float,
    stall: float,
    restart: float,
    between_failures: float,
    *,
    runs: int = _DRAWS,
    seed: int = 0,
) -> NDArray[np.float64]:
    """[runs] times of the same work, its failures drawn; see ``daly_seconds``."""
    random = np.random.default_rng(seed)
    segment = interval + stall
    segments = max(1, math.ceil(work_seconds / interval))
    survives = math.exp(-segment / between_failures)
    failed = random.negative_binomial(segments, survives, runs)
    # A failed try ends at an exponential time below the segment's; a restart may fail itself.
    total = np.full(runs, work_seconds + segments * stall)
    lost = -between_failures * np.log1p(-random.random(int(failed.sum())) * (1.0 - survives))
    extra = np.bincount(np.repeat(np.arange(runs), failed), weights=lost, minlength=runs)
    again = between_failures * math.expm1(restart / between_failures)
    times: NDArray[np.float64] = total + extra + failed * again
    return times


def forecast(backend: str, work: Work, cluster: Cluster, seed: int = 0) -> Forecast:
    """How long the run takes on a cluster.

    Args:
        backend: one of ``plan_memory.BACKENDS``, or ``single``.
        work: of each rank.
        cluster: where.
        seed: of what is drawn.
    """
    compute = work.compute_seconds / cluster.device_speed
    slow = slowest_of(cluster.ranks, cluster.straggler_deviation, seed)
    exposed = exposed_seconds(backend, work, cluster)
    step = compute * slow + exposed
    gathered = 1.5 * all_reduce_seconds(work.parameter_bytes, cluster)  # weights and two moments
    stall = work.stall_seconds + (gathered if backend not in ("single", "ddp") else 0.0)
    training = work.steps * step
    interval = min(training, work.checkpoint_every * step)
    batches = -(-work.evaluation_batches // cluster.ranks)
    around = work.start_seconds + batches * work.evaluation_seconds / cluster.device_speed
    between = cluster.node_failure_hours * HOUR / cluster.nodes
    saved = training / interval * stall
    restart = cluster.restart_seconds + work.start_seconds
    expected = daly_seconds(training, interval, stall, restart, between)
    drawn = simulate_seconds(training, interval, stall, restart, between, seed=seed)
    whole = training + saved + around
    return Forecast(
        step_seconds=step,
        exposed_seconds=exposed,
        straggler_seconds=compute * (slow - 1.0),
        checkpoint_share=saved / whole,
        hours_without_failures=whole / HOUR,
        hours=(expected + around) / HOUR,
        hours_p5=float(np.quantile(drawn, 0.05) + around) / HOUR,
        hours_p95=float(np.quantile(drawn, 0.95) + around) / HOUR,
        failures=expected / between,
        best_checkpoint_seconds=math.sqrt(2 * max(stall, 1e-3) * between),
    )
