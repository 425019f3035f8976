"""How a student is aligned to a memory: what may be chosen, and what contradicts itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cmkd_scale.errors import UsageError
from cmkd_scale.memory.potentials import Optimizer

Kind = Literal["class_masked", "soft_label", "label_free"]
Cost = Literal["euclidean", "squared_euclidean"]


@dataclass(frozen=True, slots=True)
class AlignmentOptions:
    """How a student is aligned to a memory; the keys of the config's ``method`` section."""

    transport: Kind = "class_masked"
    cost: Cost = "euclidean"
    label_cost: float = 1.0
    epsilon_start: float = 0.1
    epsilon_end: float = 0.02
    potential_rate: float = 0.1
    potential_optimizer: Optimizer = "averaged"
    mass_relaxation: float | None = None
    reweight: bool = True
    search_candidates: int | None = None
    search_least_mass: float = 0.9
    search_refresh_steps: int = 100
    ring_size: int = 2048
    moments_decay: float = 0.99
    refresh_every_steps: int = 0
    refresh_iterations: int = 5
    debias: bool = False


def check_options(options: AlignmentOptions) -> None:
    """Refuse options that contradict each other.

    Raises:
        UsageError: naming all of them.
    """
    faults = []
    if options.search_candidates is not None and (
        options.transport != "label_free" or options.cost != "squared_euclidean"
    ):
        faults.append(
            "method.search_candidates finds prototypes by the squared distance alone: set "
            "method.transport=label_free and method.cost=squared_euclidean, or leave it unset"
        )
    for name in ("refresh_every_steps", "debias"):
        if getattr(options, name) and options.ring_size == 0:
            faults.append(f"method.{name} reads the ring of recent features: set method.ring_size")
    relaxation = options.mass_relaxation
    if relaxation is not None and relaxation < options.potential_rate:
        faults.append(
            f"method.mass_relaxation={relaxation:g} is below method.potential_rate="
            f"{options.potential_rate:g}, and potentials would swing: lower the rate or relax less"
        )
    if options.epsilon_end > options.epsilon_start:
        faults.append("method.epsilon_end is larger than method.epsilon_start: it is annealed down")
    if faults:
        raise UsageError(f"{'; '.join(faults)}.")
