"""What ``scale.py`` times: the alignment's part of a student step; and how good a search is."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from cmkd_scale.losses import LOSSES, OWN_VALUES
from cmkd_scale.losses.classification import smoothed_cross_entropy
from cmkd_scale.memory.bank import PrototypeMemory
from cmkd_scale.training.alignment_options import AlignmentOptions
from cmkd_scale.training.methods import METHODS
from cmkd_scale.training.open_transport import OpenTransport
from cmkd_scale.training.targets import MemoryTargets
from tools.bench._bench import Rows, measure
from tools.bench._scale_memory import Features
from tools.bench._step_variants import Setting, our_step

Step = Callable[[], object]

WEIGHTS: Mapping[str, float] = {
    name: weight
    for name, weight in METHODS["ucmkd_global"].weights.items()
    if weight > 0 and LOSSES[name].by_teacher
}
"""Every term of the method that the memory has a part in."""
TRANSPORT: Mapping[str, float] = {"transport_cost": 1.0}

MASKED = AlignmentOptions()
ALL = AlignmentOptions(transport="label_free", cost="squared_euclidean")
SEARCHED = dataclasses.replace(
    ALL,
    search_candidates=64,
    # Whatever the search holds, and only at step 0: what it costs is to be seen by itself.
    search_least_mass=0.0,
    search_refresh_steps=2**40,
)
REFRESH_STEPS = AlignmentOptions().search_refresh_steps
POTENTIAL_SPREAD = 0.13
"""Standard deviation of potentials, in units of the cost: what 1,000 batches of dual ascent leave
at 10,000 prototypes of these features. At 1,600 it is 0.3."""
REPEATS = 5
"""Steps that are timed as one, for a single one is short."""
_BATCHES = 16  # that are taken in turns, so that not the same blocks lie in the caches


class Alignment:
    """One step of alignment: targets, their losses, backward to what the student provides.

    The student's features, logits and head are given; its cross-entropy is no part of it.
    """

    def __init__(
        self,
        features: Features,
        memory: PrototypeMemory,
        options: AlignmentOptions,
        *,
        batch: int,
        weights: Mapping[str, float] = WEIGHTS,
    ) -> None:
        """Lay out the memory; with a search, build its index: the step 0."""
        self.weights = weights
        needs = {value for name in weights for value in LOSSES[name].needs.values()}
        self.targets = MemoryTargets(
            memory, steps=1, options=options, needs=frozenset(needs - OWN_VALUES)
        )
        spread = torch.randn(len(memory.prototypes), generator=torch.Generator().manual_seed(4))
        self.potentials = POTENTIAL_SPREAD * spread
        self.set_potentials()
        self.batches = [features.student(batch, seed) for seed in range(_BATCHES)]
        self._head = (memory.head_weight + 0.01).requires_grad_()
        self._logits = torch.zeros(batch, len(memory.class_names), requires_grad=True)
        self._class_share = torch.full((len(memory.class_names),), 1 / len(memory.class_names))
        self._step = 0
        self.bytes_on_wire = 0.0
        """What this rank sent in the last step."""
        self()

    def set_potentials(self) -> None:
        """Those of the usual spread: the ascending ones, and those that plans are made with."""
        for values in (self.targets.potentials.value, self.targets.potentials.current):
            values.copy_(self.potentials)

    def __call__(self) -> None:
        """The next step."""
        self.run(self._step)
        self._step += 1

    def refresh(self) -> None:
        """A step at which a search takes up the potentials and is checked."""
        self.run(0)

    def run(self, step: int) -> None:
        """A step with the number ``step``; a collective call."""
        features, labels = self.batches[self._step % _BATCHES]
        features = features.detach().requires_grad_()
        values, outgoing = self.targets(features, labels, step)
        values |= {"features": features, "labels": labels, "head_weight": self._head}
        values |= {"logits": self._logits, "teacher_head_weight": self.targets.head_weight}
        values["class_share"] = self._class_share
        terms = []
        for name, weight in self.weights.items():
            needs = LOSSES[name].needs.items()
            given = {argument: values[value] for argument, value in needs}
            terms.append(weight * LOSSES[name].function(**given))
        exchange = self.targets.start([outgoing])
        self.bytes_on_wire = exchange.bytes_on_wire
        torch.stack(terms).sum().backward()
        self._head.grad = self._logits.grad = None
        self.targets.finish(exchange, step)


def in_units(setting: Setting, steps: Mapping[str, Step], rounds: int) -> Rows:
    """Time ``steps``, REPEATS of each in a row, in units of the cross-entropy step.

    Returns:
        What ``measure`` gives, of a single step; ``cpu_milliseconds``; and ``growth``, CPU time
        over that of the first of ``steps``.
    """
    seconds: list[float] = []
    unit = our_step(setting, "ce_ls", None)

    def timed_unit() -> None:
        before = time.process_time()
        unit()
        seconds.append(time.process_time() - before)

    first = next(iter(steps))
    repeated = {name: _repeated(step) for name, step in steps.items()}
    variants = {"ce_ls": timed_unit, "ce_ls again": our_step(setting, "ce_ls", None)}
    # What follows the network's step finds the caches empty: that is no row.
    warm_up = {"": repeated[first], first: repeated[first], f"{first} again": repeated[first]}
    rows = measure({**variants, **warm_up, **repeated}, rounds)
    del rows[""]
    for name, row in rows.items():
        if name not in variants:
            row.update({column: value / REPEATS for column, value in row.items()})
            row["growth"] = row["cpu_ratio"] / rows[first]["cpu_ratio"]
        # The first step warmed up.
        row["cpu_milliseconds"] = 1000 * row["cpu_ratio"] * statistics.median(seconds[1:])
    return rows


def _repeated(step: Step) -> Callable[[], None]:
    def run() -> None:
        for _ in range(REPEATS):
            step()

    return run


def head_step(classes: int, dim: int, batch: int) -> Callable[[], None]:
    """What cross-entropy by itself costs in the head: product, loss and backward."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(batch, dim, generator=generator).requires_grad_()
    weight = torch.randn(classes, dim, generator=generator).requires_grad_()
    bias = torch.zeros(classes, requires_grad=True)
    labels = torch.randint(classes, (batch,), generator=generator)

    def step() -> None:
        smoothed_cross_entropy(functional.linear(features, weight, bias), labels).backward()
        features.grad = weight.grad = bias.grad = None

    return step


def search_quality(
    alignment: Alignment, memory: PrototypeMemory, epsilon: float
) -> dict[str, float]:
    """What a search keeps at ``epsilon``, with potentials of the usual spread.

    Returns:
        ``captured`` mass as the transport measures it, and ``cosine`` of the batch's gradient
        with the float64 gradient over all prototypes.
    """
    targets = alignment.targets
    targets.options = dataclasses.replace(
        targets.options, epsilon_start=epsilon, epsilon_end=epsilon
    )
    alignment.set_potentials()
    features, labels = alignment.batches[0]
    features = features.detach().requires_grad_()
    values, _ = targets(features, labels, 0)
    cost = values["transported"]
    assert isinstance(cost, Tensor)
    (found,) = torch.autograd.grad(cost.sum(), features)
    whole = dense_gradient(
        features.detach(), memory, alignment.potentials, targets.potentials.target(), epsilon
    )
    cosine = functional.cosine_similarity(found.double().flatten(), whole.flatten(), dim=0)
    assert isinstance(targets.transport, OpenTransport)
    return {"captured": float(targets.transport.captured), "cosine": float(cosine)}


def dense_gradient(
    features: Tensor, memory: PrototypeMemory, potentials: Tensor, mass: Tensor, epsilon: float
) -> Tensor:
    """[B, D] float64 gradient of the squared cost transported to all prototypes, by envelope.

    Genevay et al., "Stochastic Optimization for Large-scale Optimal Transport" (2016), section 4.
    """
    prototypes, unit = memory.prototypes.double(), float(memory.cost_scale) ** -2
    bias = potentials.double() / epsilon + mass.double().log()
    norms = prototypes.square().sum(1)
    parts = []
    for rows in features.double().split(8):
        square = rows.square().sum(1, keepdim=True) + norms - 2.0 * rows @ prototypes.T
        plan = torch.softmax(bias - unit / epsilon * square, dim=1)
        parts.append(2.0 * unit * (rows - plan @ prototypes))
    return torch.cat(parts)
