from __future__ import annotations

import itertools
import math

import pytest

from cmkd_scale.config import make_config
from cmkd_scale.training.schedule import learning_rate_at


def test_the_schedule_warms_up_and_ends_near_zero() -> None:
    config = make_config({"train": {"steps": 100, "warmup_steps": 10, "learning_rate": 0.5}}).train
    rates = [learning_rate_at(step, config) for step in range(100)]
    assert rates[:10] == pytest.approx([0.05 * (step + 1) for step in range(10)])
    assert rates[10] == pytest.approx(0.5)
    assert rates[55] == pytest.approx(0.25, rel=1e-3)
    assert rates[99] == pytest.approx(0.25 * (1 + math.cos(math.pi * 89 / 90)))
    assert all(one > other for one, other in itertools.pairwise(rates[10:]))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_runs_shorter_than_their_warm_up(steps: int) -> None:
    config = make_config({"train": {"steps": steps, "warmup_steps": 20}}).train
    rates = [learning_rate_at(step, config) for step in range(steps)]
    assert all(0 < rate <= config.learning_rate for rate in rates)


def test_wsd_is_constant_and_then_decays() -> None:
    tree = {"steps": 100, "warmup_steps": 10, "learning_rate": 0.5, "schedule": "wsd"}
    config = make_config({"train": {**tree, "decay_fraction": 0.2}}).train
    rates = [learning_rate_at(step, config) for step in range(100)]
    assert rates[:10] == pytest.approx([0.05 * (step + 1) for step in range(10)])
    assert rates[10:81] == [0.5] * 71
    assert rates[85] == pytest.approx(0.5 * (1 - math.sqrt(5 / 20)))
    assert 0 < rates[99] < 0.02


def test_a_decay_as_long_as_the_run_begins_after_the_warm_up() -> None:
    tree = {"steps": 10, "warmup_steps": 4, "schedule": "wsd", "decay_fraction": 1.0}
    config = make_config({"train": tree}).train
    rates = [learning_rate_at(step, config) for step in range(10)]
    assert max(rates) == rates[3] == rates[4] == config.learning_rate
    assert rates[4:] == sorted(rates[4:], reverse=True)
