from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cmkd_scale.data.quality import same_shard
from tests.conftest import REPOSITORY
from tools.bench import shuffle
from tools.bench._data_libraries import READERS, Stored
from tools.bench._data_samples import KINDS, contents

TINY = {
    "data.py": ["--quick", "--samples", "1100", "--rounds", "1"],
    "resume.py": ["--quick", "--samples", "2500", "--rounds", "1"],
    "shuffle.py": ["--quick", "--samples", "120000"],
}


@pytest.mark.slow
@pytest.mark.parametrize("script", TINY)
def test_it_runs_and_writes_rows_and_goals(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "tools" / "bench" / script), *TINY[script]]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([*command, "--json", "found.json"], cwd=tmp_path, env=environment, check=True)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["rows"]
    assert found["goals"] or script == "data.py"  # which has none without the libraries
    for goal in found["goals"]:
        assert set(goal) == {"name", "value", "goal", "met"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("library", ["ours", "webdataset", "wids"])
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # of wids
def test_every_library_delivers_the_same_samples(library: str, kind: str, tmp_path: Path) -> None:
    pytest.importorskip(library if library != "ours" else "webdataset")
    data = Stored(KINDS[kind], contents(KINDS[kind], 256, tmp_path), tmp_path)
    batches = list(READERS[library](data, 0))
    expected = torch.stack([KINDS[kind].decode(content) for content in data.contents])
    inputs = torch.cat([inputs for inputs, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    assert inputs.shape == expected.shape
    assert sorted(labels.tolist()) == sorted(number % 10 for number in range(256))
    # Rows in an order of their own: compare what does not depend on it.
    assert sorted(map(_digest, inputs)) == sorted(map(_digest, expected))
    assert not torch.equal(inputs, expected)


def _digest(sample: torch.Tensor) -> bytes:
    return sample.numpy().tobytes()


def test_shuffle_measures_agree_with_counting_pairs() -> None:
    data = shuffle.Stored(2048, 16)
    first, second = (shuffle.uniform(data, 0)(epoch) for epoch in (0, 1))
    position = np.argsort(second)
    same = near = pairs = 0
    for start in range(0, 2048, shuffle.BATCH):
        batch = first[start : start + shuffle.BATCH]
        for i in range(shuffle.BATCH):
            others = batch[i + 1 :]
            pairs += len(others)
            same += int((others * 16 // 2048 == batch[i] * 16 // 2048).sum())
            near += int((abs(position[others] - position[batch[i]]) <= shuffle.BATCH).sum())
    assert same_shard(shuffle.batches(data, first)) == pytest.approx(same / pairs)
    assert shuffle.met_again(data, first, second) == pytest.approx(near / pairs)


def test_an_unshuffled_order_is_as_bad_as_can_be() -> None:
    data = shuffle.Stored(1 << 14, 16)  # four batches a shard
    stored = np.arange(1 << 14)
    assert same_shard(shuffle.batches(data, stored)) == 1.0
    assert shuffle.met_again(data, stored, stored) == 1.0
    assert shuffle.class_distance(data, stored) == pytest.approx(15 / 16)
    assert shuffle.shards_in_use(data, stored) == 1.0


@pytest.mark.parametrize("name", ["ours", "webdataset_buffer", "uniform"])
def test_every_order_is_a_permutation_and_epochs_differ(name: str) -> None:
    data = shuffle.Stored(120_000, 120)
    epoch = shuffle.uniform(data, 0) if name == "uniform" else getattr(shuffle, name)(data)
    first, second = epoch(0), epoch(1)
    assert np.array_equal(np.sort(first), np.arange(120_000))
    assert np.array_equal(np.sort(second), np.arange(120_000))
    assert not np.array_equal(first, second)
