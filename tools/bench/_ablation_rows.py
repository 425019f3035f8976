"""The rows of ``ablation.py``: what each changes of the student of ``cmkd quickstart``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from cmkd_scale.config_sections import MethodConfig
from cmkd_scale.training.method import Method
from cmkd_scale.training.methods import METHODS

RULE = "rule"
"""The memory whose number of prototypes follows from the class's count."""
REFERENCE = "ucmkd_global"
SHIFTED = ", labels shifted"
"""Ends the names of rows that train on a set with ten times as many clips of one class as of
another; their reference is that of the same set."""

_WEIGHTS = METHODS["ucmkd_global"].weights
_MINIBATCH = {name: _WEIGHTS[name] for name in ("smoothed_cross_entropy", "transport_cost")}

EXTRA_METHODS = {
    "minibatch_ot": Method(
        summary="transport to a minibatch of the teacher's features", weights=_MINIBATCH
    ),
    "minibatch_ot_head": Method(
        summary="and the teacher's head, read on student features and taken over",
        weights=_MINIBATCH | {name: _WEIGHTS[name] for name in ("teacher_head", "head_pull")},
        head_transfer=True,
    ),
    "ucmkd_global_own_head": Method(
        summary="ucmkd_global with a head that starts from random weights",
        weights={name: weight for name, weight in _WEIGHTS.items() if name != "head_pull"},
    ),
}
"""Methods that an ablation needs and nobody else does; known inside ``known_methods`` only."""


@contextmanager
def known_methods() -> Iterator[None]:
    """Let ``method.name`` be one of ``EXTRA_METHODS``."""
    METHODS.update(EXTRA_METHODS)
    try:
        yield
    finally:
        for name in EXTRA_METHODS:
            METHODS.pop(name, None)


@dataclass(frozen=True, slots=True)
class Row:
    """A student of the table."""

    name: str
    method: str = "ucmkd_global"
    control: str = "none"
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Dotted keys of the config -> values."""
    prototypes: int | str = RULE
    """A class's number of prototypes in the memory that it learns from."""
    minibatch: bool = False
    """Whether transport goes to a minibatch of the teacher's features."""
    shifted: bool = False
    """Whether it trains on the set with shifted labels."""

    @property
    def reference(self) -> str:
        """Name of the row that it is compared with."""
        return REFERENCE + SHIFTED if self.shifted else REFERENCE


def _weights(*names: str) -> dict[str, Any]:
    return {"method.weights": dict.fromkeys(names, 0.0)}


def _transport(kind: str, reweight: bool) -> Row:
    return Row(
        f"{kind}{'' if reweight else ', no reweighting'}",
        changes={"method.transport": kind, "method.reweight": reweight},
    )


_OTHER = "sgd" if MethodConfig().potential_optimizer == "averaged" else "averaged"
_SOFT_LABELS = ("transported_soft_label", "teacher_head_soft_label")
_OPEN = [_transport(kind, on) for kind in ("soft_label", "label_free") for on in (True, False)]
_SHIFTED = [Row("ce_ls", "ce_ls"), Row(REFERENCE), *_OPEN]

ROWS = (
    Row("ce_ls", "ce_ls"),
    Row(REFERENCE),
    Row(f"{REFERENCE}/permuted", control="permuted"),
    # Equal but for rounding, which 300 steps amplify: A against A.
    Row(f"{REFERENCE} again", changes={"train.learning_rate": 2.0002e-3}),
    Row("minibatch OT", "minibatch_ot", minibatch=True),
    Row("minibatch OT, teacher's head", "minibatch_ot_head", minibatch=True),
    Row("no soft labels", changes=_weights(*_SOFT_LABELS)),
    Row("no transport cost", changes=_weights("transport_cost")),
    Row("no soft labels, no transport cost", changes=_weights(*_SOFT_LABELS, "transport_cost")),
    Row("kd_memory", "kd_memory"),
    Row("no teacher_head", changes=_weights("teacher_head")),
    Row("no head transfer", "ucmkd_global_own_head"),
    Row("1 prototype a class", prototypes=1),
    Row("4 prototypes a class", prototypes=4),
    Row("16 prototypes a class", prototypes=16),
    *(replace(row, name=row.name + SHIFTED, shifted=True) for row in _SHIFTED),
    *_OPEN,
    Row(f"{_OTHER} potentials", changes={"method.potential_optimizer": _OTHER}),
    Row("refresh every 10 steps", changes={"method.refresh_every_steps": 10}),
    Row("class_bures 0.1", changes={"method.weights": {"class_bures": 0.1}}),
    Row("debias", changes={"method.debias": True}),
)
QUICK = ("ce_ls", REFERENCE, f"{REFERENCE} again", "minibatch OT")
"""Rows of the short form."""
