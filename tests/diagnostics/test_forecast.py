from __future__ import annotations

import pytest

from cmkd_scale.diagnostics.forecast import GAIN, SPREAD, forecast
from cmkd_scale.diagnostics.trial import Trial


def test_a_student_gains_in_proportion_to_heads_and_loses_as_they_do() -> None:
    for gain in (0.05, 0.0, -0.1):
        found = forecast(Trial(gain=gain, error=0.01, accuracy=0.4))
        assert found.gain == pytest.approx(GAIN * gain)
        assert found.high - found.gain == pytest.approx(SPREAD)
        assert found.gain - found.low == pytest.approx(SPREAD)
