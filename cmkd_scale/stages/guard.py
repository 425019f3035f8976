"""The guard of a run: a short training without the teacher, and what it says of each memory.

Lives in ``guard/`` of the run directory: the training's checkpoints and log, and then
``guard.json`` with the verdict, which a run that is started again takes up.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cmkd_scale import distributed
from cmkd_scale.config import Config
from cmkd_scale.diagnostics.arrays import Floats
from cmkd_scale.diagnostics.guard import trust
from cmkd_scale.diagnostics.structure import Agreement, structure_agreement
from cmkd_scale.errors import IntegrityError
from cmkd_scale.files import read_json
from cmkd_scale.memory.bank import PrototypeMemory
from cmkd_scale.stages.plain import mean_features, plain_run, train_plain
from cmkd_scale.stages.runs import write_json
from cmkd_scale.stages.through_faults import Run
from cmkd_scale.training.preemption import Preemption

_log = logging.getLogger(__name__)

FILE = "guard.json"

_SHARE = 5  # of the run's steps, one part goes into the guard's training
_FEWEST_STEPS = 50
_MOST_STEPS = 2000


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the guard says of one memory."""

    trust: float
    """Weight of its terms, 0 to 1."""
    agreement: Agreement | None
    """None where there are too few classes to tell."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "trust": self.trust,
            "agreement": None if self.agreement is None else asdict(self.agreement),
        }


def guard(run: Run, preemption: Preemption) -> list[Verdict]:
    """Train without the teacher for a while, and compare; a collective call.

    Args:
        run: with the memories in the student's classes.
        preemption: watched between steps.

    Raises:
        PreemptedError: a signal asked for a stop; the state is saved.
        IntegrityError: an earlier verdict is damaged.
    """
    directory = run.directory / "guard"
    file = directory / FILE
    if file.exists():
        return _read(file)
    steps = guard_steps(run.config)
    if distributed.is_main():
        directory.mkdir(exist_ok=True)
        _log.info("guard: %d steps without the teacher", steps)
    plain = plain_run(run, directory, steps)
    means = mean_features(plain, train_plain(plain, preemption), preemption)
    verdicts = [judge(means, memory) for memory in run.memories]

    def conclude() -> None:
        rows = [verdict.to_json() for verdict in verdicts]
        write_json(file, {"steps": steps, "memories": rows})
        # Nothing continues from them any more, and a large student's are large.
        shutil.rmtree(directory / "checkpoints", ignore_errors=True)

    distributed.run_on_main(conclude)
    if distributed.is_main():
        for verdict in verdicts:
            _log.info("guard: %s", describe(verdict))
    return verdicts


def guard_steps(config: Config) -> int:
    """Steps of the training without the teacher."""
    usual = min(max(_FEWEST_STEPS, config.train.steps // _SHARE), _MOST_STEPS)
    return min(config.method.guard_steps or usual, config.train.steps)


def judge(means: Floats, memory: PrototypeMemory) -> Verdict:
    """How far the structure of ``means`` [C, D] is the memory's; a collective call."""
    known = (memory.class_kept > 0).numpy()
    theirs = np.where(known[:, None], memory.class_mean.double().numpy(), np.nan)
    agreement = structure_agreement(means, theirs)
    # Machines may differ in last bits, and all ranks need one answer.
    parts = distributed.gather_integers(round(1000 * trust(agreement)))
    return Verdict(parts[0] / 1000, agreement)


def _read(file: Path) -> list[Verdict]:
    try:
        return [
            Verdict(
                float(row["trust"]),
                None if row["agreement"] is None else Agreement(**row["agreement"]),
            )
            for row in read_json(file)["memories"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            f"{file} is no verdict of the guard ({error}); remove it, and the guard trains again."
        ) from None


def describe(verdict: Verdict) -> str:
    """A sentence for people."""
    found = verdict.agreement
    if found is None:
        return (
            "too few classes in common to tell whether the teacher's structure is the student's; "
            "it is left out (method.guard=false trusts it)"
        )
    return (
        f"class structures agree at rank correlation {found.correlation:.2f}, {found.z:.1f} "
        f"standard deviations above chance, over {found.classes} classes: the teacher is trusted "
        f"{verdict.trust:.0%}"
    )
