from __future__ import annotations

import math

import pytest

from cmkd_scale.training.divergence import DivergedError, Divergence


def make(skipped: int = 2) -> Divergence:
    return Divergence(max_skipped_steps=skipped, explosion_factor=10.0)


def test_some_skipped_steps_are_borne_and_a_good_one_forgives_them() -> None:
    watched = make()
    for _ in range(5):
        watched.observe(1, math.nan, applied=False)
        watched.observe(2, math.inf, applied=False)
        assert watched.suspect
        watched.observe(3, 1.0, applied=True)
        assert not watched.suspect


def test_one_skipped_step_too_many() -> None:
    watched = make()
    watched.observe(1, 1.0, applied=False)
    watched.observe(2, 1.0, applied=False)
    with pytest.raises(DivergedError, match="in 3 steps in a row, up to step 3"):
        watched.observe(3, 1.0, applied=False)


def test_none_may_be_skipped() -> None:
    with pytest.raises(DivergedError, match="in 1 steps in a row"):
        make(skipped=0).observe(1, 1.0, applied=False)


def test_an_explosion_is_five_steps_far_above_the_mean() -> None:
    watched = make()
    for step in range(150):
        watched.observe(step, 2.0 + math.sin(step), applied=True)
    for step in range(150, 154):
        watched.observe(step, 30.0, applied=True)
        assert watched.suspect
    with pytest.raises(DivergedError, match=r"above 2\d[.\d]* .*usual: [12][.\d]*\) in 5 steps"):
        watched.observe(154, 30.0, applied=True)


def test_a_loss_may_fall_below_zero() -> None:
    watched = make()
    for step in range(600):  # as one does that counts mutual information
        watched.observe(step, 3.0 * math.exp(-step / 80) - 1.0 + 0.2 * math.sin(step), applied=True)
        assert not watched.suspect
    for step in range(4):
        watched.observe(step, 20.0, applied=True)
    with pytest.raises(DivergedError):
        watched.observe(4, 20.0, applied=True)


@pytest.mark.parametrize(("usual", "bar"), [(2.0, 20.0), (-2.0, 16.0)])
def test_the_bar_is_the_factor_times_the_mean_of_positive_losses(usual: float, bar: float) -> None:
    for loss in (bar - 0.1, bar + 0.1):
        watched = make()
        for step in range(100):
            watched.observe(step, usual, applied=True)
        watched.observe(100, loss, applied=True)
        assert watched.suspect == (loss > bar)


def test_a_spike_is_borne_and_does_not_raise_the_bar() -> None:
    watched = make()
    for step in range(100):
        watched.observe(step, 1.0, applied=True)
    for _ in range(50):
        for _ in range(4):
            watched.observe(0, 1e6, applied=True)
        watched.observe(0, 1.0, applied=True)
    for _ in range(4):
        watched.observe(0, 11.0, applied=True)
    with pytest.raises(DivergedError):
        watched.observe(0, 11.0, applied=True)


def test_the_first_steps_set_the_bar_whatever_they_are() -> None:
    watched = make()
    for step in range(90):
        watched.observe(step, 1000.0 if step % 2 else 1.0, applied=True)
    assert not watched.suspect
