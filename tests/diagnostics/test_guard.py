from __future__ import annotations

import pytest

from cmkd_scale.diagnostics.guard import FULL_TRUST_Z, NO_TRUST_Z, trust
from cmkd_scale.diagnostics.structure import Agreement


@pytest.mark.parametrize(
    ("z", "weight"),
    [
        (-5.0, 0.0),
        (NO_TRUST_Z, 0.0),
        ((NO_TRUST_Z + FULL_TRUST_Z) / 2, 0.5),
        (FULL_TRUST_Z, 1.0),
        (20.0, 1.0),
    ],
)
def test_trust_grows_with_the_agreement(z: float, weight: float) -> None:
    assert trust(Agreement(correlation=0.1, z=z, p=0.1, classes=10)) == pytest.approx(weight)


def test_without_an_agreement_nothing_speaks_for_the_teacher() -> None:
    assert trust(None) == 0.0
