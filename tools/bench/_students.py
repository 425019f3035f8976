"""Finished students: whether a run is one, and which test clips it recognises."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file

from cmkd_scale.config import Config
from cmkd_scale.errors import IntegrityError
from cmkd_scale.files import read_json


def is_finished(config: Config) -> bool:
    """Whether the run of this very configuration has results; another is refused by its stage."""
    file = Path(str(config.run.dir)) / "results.json"
    return file.exists() and read_json(file).get("config_digest") == config.digest()


def recognised(directory: Path) -> NDArray[np.bool_]:
    """[N] whether the student of a run is right, clip by clip.

    Raises:
        IntegrityError: its predictions are not those of its results.
    """
    predictions = load_file(directory / "predictions.safetensors")
    correct = (predictions["predictions"] == predictions["labels"]).numpy()
    accuracy = read_json(directory / "results.json")["metrics"]["test/accuracy"]
    if abs(float(correct.mean()) - float(accuracy)) > 1e-9:
        raise IntegrityError(
            f"{directory} holds predictions of another accuracy than its results.json; remove that "
            "directory and run again."
        )
    return correct
