"""Where a stream stands: a few values that another run of any shape can go on from."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from cmkd_scale.data.order import Order, Position
from cmkd_scale.data.sampling import Natural
from cmkd_scale.data.state import check_state, stream_state
from cmkd_scale.errors import IntegrityError

DIGEST = "3f" * 32


def order(seed: int = 4, name: str = "all") -> Order:
    return Order(Natural(20, name=name), np.array([0, 12, 20]), seed)


def state(**changes: Any) -> dict[str, Any]:
    return {**stream_state(order(), DIGEST, Position(3, 17)), **changes}


def test_a_state_is_plain_values_and_comes_back() -> None:
    stored = json.loads(json.dumps(state()))
    assert check_state(stored, order(), DIGEST, "train") == Position(3, 17)


def test_a_state_knows_nothing_of_ranks_workers_and_batches() -> None:
    assert set(state()) == {"seed", "epoch", "position", "manifest", "order"}


@pytest.mark.parametrize(
    ("stored", "wanted", "message"),
    [
        (state(manifest="00" * 32), order(), "other data than train"),
        (state(), order(seed=5), "seed '4', and '5' is asked for"),
        (state(), order(name="labelled"), "natural labelled' is asked for"),
        (state(order="lanes-0 natural all"), order(), "order 'lanes-0 natural all'"),
        ({k: v for k, v in state().items() if k != "order"}, order(), "order 'None'"),
        (state(position=20), order(), "outside the epoch of train"),
        (state(position=-1), order(), "outside the epoch"),
        (state(epoch=-1), order(), "outside the epoch"),
    ],
)
def test_a_state_of_something_else_is_refused(
    stored: dict[str, Any], wanted: Order, message: str
) -> None:
    with pytest.raises(IntegrityError, match=message):
        check_state(stored, wanted, DIGEST, "train")
