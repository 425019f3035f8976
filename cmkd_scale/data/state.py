"""Where a stream stands, in a few values that are free of ranks, workers and batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cmkd_scale.data.order import Order, Position
from cmkd_scale.errors import IntegrityError


def stream_state(order: Order, manifest: str, place: Position) -> dict[str, Any]:
    """A few values that say where a stream stands, free of ranks."""
    return {
        "seed": order.seed,
        "epoch": place.epoch,
        "position": place.position,
        "manifest": manifest,
        "order": order.name,
    }


def check_state(state: Mapping[str, Any], order: Order, manifest: str, name: str) -> Position:
    """Where ``state`` says that the stream of ``order`` stands.

    Raises:
        IntegrityError: it belongs to other data, another order or another seed.
    """
    if state["manifest"] != manifest:
        raise IntegrityError(
            f"The state is of other data than {name} as it is now (the manifests' digests "
            "differ). Restore the shards, or start anew in a new run directory."
        )
    for what, expected in (("seed", order.seed), ("order", order.name)):
        if state.get(what) != expected:
            raise IntegrityError(
                f"The state has {what} '{state.get(what)}', and '{expected}' is asked for; "
                "continue with what it was saved from, or start anew in a new run directory."
            )
    place = Position(int(state["epoch"]), int(state["position"]))
    if not (0 <= place.position < len(order) and place.epoch >= 0):
        raise IntegrityError(f"The state stands outside the epoch of {name}.")
    return place
