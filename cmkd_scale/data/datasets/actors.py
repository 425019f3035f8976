"""Splits by actor, for data sets that are published without any."""

from __future__ import annotations


def split_of_group(group: int, fold: int, groups: int) -> str:
    """The split of one of ``groups`` groups of actors.

    Group ``fold`` is for testing, the next one (in a circle) for validation, the others for
    training: over all folds, each actor is tested on once.
    """
    place = (group - fold) % groups
    return {0: "test", 1: "validation"}.get(place, "train")
