from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from cmkd_scale.operations import plan_cluster as cluster
from cmkd_scale.operations.plan_cluster import Cluster, Work

WORK = Work(
    steps=100_000,
    compute_seconds=0.5,
    backward_seconds=0.3,
    parameter_bytes=400_000_000,
    exchange_bytes=1_000_000,
    checkpoint_every=1000,
    stall_seconds=2.0,
    start_seconds=30.0,
    evaluation_batches=600,
    evaluation_seconds=1.0,
)
NODES = Cluster(64, 8)


def test_a_ring_moves_a_tensor_nearly_twice() -> None:
    four = Cluster(1, 4, link_bytes_per_second=1e9, latency_seconds=1e-6)
    # Six messages of a quarter.
    assert cluster.all_reduce_seconds(1e9, four) == pytest.approx(6 * (0.25 + 1e-6))
    assert cluster.all_reduce_seconds(1e9, Cluster(1, 1)) == 0.0


def test_small_tensors_go_along_a_tree() -> None:
    many = Cluster(64, 8, latency_seconds=1e-5)
    assert cluster.all_reduce_seconds(4, many) == pytest.approx(2 * 9 * 1e-5, rel=1e-3)


def test_a_ring_over_nodes_goes_at_the_pace_of_the_network() -> None:
    one, two = Cluster(1, 8), Cluster(2, 4)
    ratio = one.link_bytes_per_second / two.network_bytes_per_second
    large = 1e12  # latencies do not count
    times = [cluster.all_reduce_seconds(large, each) for each in (one, two)]
    assert times[1] / times[0] == pytest.approx(ratio, rel=1e-3)


def test_gathered_weights_cost_half_as_much_again() -> None:
    once = cluster.gradient_seconds("ddp", 1e9, NODES)
    assert cluster.gradient_seconds("zero2", 1e9, NODES) == once
    assert cluster.gradient_seconds("fsdp2", 1e9, NODES) == 1.5 * once


def test_backward_hides_the_exchange_but_for_its_end() -> None:
    hidden = cluster.exposed_seconds("ddp", WORK, NODES)
    bare = cluster.exposed_seconds("ddp", WORK, replace(NODES, overlap=0.0))
    gradients = cluster.gradient_seconds("ddp", WORK.parameter_bytes, NODES)
    assert 0.0 < hidden < gradients < bare
    assert cluster.exposed_seconds("ddp", WORK, Cluster(1, 1)) == 0.0


@pytest.mark.parametrize("ranks", [2, 8, 512])
def test_the_slowest_rank_as_if_each_were_drawn(ranks: int) -> None:
    deviation = 0.1
    sigma = math.sqrt(math.log1p(deviation**2))
    random = np.random.default_rng(1)
    drawn = random.lognormal(-(sigma**2) / 2, sigma, size=(4000, ranks))
    assert drawn.mean() == pytest.approx(1.0, abs=0.01)
    found = cluster.slowest_of(ranks, deviation)
    assert found == pytest.approx(drawn.max(axis=1).mean(), rel=0.01)
    assert cluster.slowest_of(ranks, 0.0) == 1.0


def event_by_event(
    work: float, interval: float, stall: float, restart: float, between: float, seed: int
) -> float:
    """The same run, a failure at a time."""
    random = np.random.default_rng(seed)
    now, failure = 0.0, random.exponential(between)
    for _ in range(round(work / interval)):
        while now + interval + stall > failure:
            now = failure
            while True:
                failure = now + random.exponential(between)
                if failure > now + restart:
                    now += restart
                    break
                now = failure
        now += interval + stall
    return now


def test_failures_cost_what_daly_says() -> None:
    numbers = (1000.0, 20.0, 1.0, 5.0, 100.0)
    expected = cluster.daly_seconds(*numbers)
    events = [event_by_event(*numbers, seed=seed) for seed in range(2000)]
    assert np.mean(events) == pytest.approx(expected, rel=0.02)
    drawn = cluster.simulate_seconds(*numbers)
    assert drawn.mean() == pytest.approx(expected, rel=0.02)
    for share in (0.05, 0.95):
        assert np.quantile(drawn, share) == pytest.approx(np.quantile(events, share), rel=0.03)


def test_nothing_fails_in_a_perfect_cluster() -> None:
    perfect = replace(
        Cluster(1, 1), node_failure_hours=1e12, straggler_deviation=0.0, device_speed=2.0
    )
    found = cluster.forecast("single", WORK, perfect)
    saves = WORK.steps / WORK.checkpoint_every * WORK.stall_seconds
    seconds = WORK.steps * 0.25 + saves + 30.0 + 300.0
    assert 3600 * found.hours_without_failures == pytest.approx(seconds)
    assert found.hours == pytest.approx(found.hours_without_failures, rel=1e-6)
    assert found.hours_p5 == found.hours_p95


def test_more_nodes_fail_more_often() -> None:
    few, many = (cluster.forecast("ddp", WORK, Cluster(nodes, 8)) for nodes in (8, 64))
    assert many.failures > 7 * few.failures
    assert many.best_checkpoint_seconds < few.best_checkpoint_seconds
    assert many.hours_p5 < many.hours < many.hours_p95
    assert many.hours > many.hours_without_failures


def test_the_best_interval_is_the_best() -> None:
    between, stall = 10_000.0, 10.0
    best = math.sqrt(2 * stall * between)
    times = [
        cluster.daly_seconds(1e6, factor * best, stall, 0.0, between) for factor in (0.5, 1.0, 2.0)
    ]
    assert times[1] == min(times)
