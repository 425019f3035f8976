from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from cmkd_scale.data.teacher_outputs import (
    COMPLETE,
    MANIFEST,
    SAMPLES,
    OutputsManifest,
    Samples,
    TeacherOutputs,
    is_complete,
)
from cmkd_scale.data.write_outputs import begin, finish, left_shards, write_shard
from cmkd_scale.errors import IntegrityError, UsageError

NONE = torch.zeros(0, dtype=torch.int64)
CLASSES = 4
TEN = np.arange(10)
FEW = (torch.arange(20.0).reshape(10, 2), TEN, TEN % CLASSES, list("abcdefghij"))


def write(
    directory: Path,
    features: Tensor,
    places: NDArray[np.int64],
    labels: NDArray[np.int64],
    keys: Sequence[str],
    shards: Sequence[int] = (2, 0, 1),
) -> None:
    """Outputs in three shards, written in the order of ``shards``; logits are features doubled."""
    size, width = features.shape
    starts = [0, size // 2, size // 2 + 1, size]
    logits = 2 * features[:, torch.arange(CLASSES) % width]
    manifest = OutputsManifest(
        fingerprint={"teacher": "a" * 64},
        machines=[1],
        batch_size=1,
        label_names=list("abcd"),
        feature_dim=width,
        starts=starts,
    )
    begin(directory, manifest)
    for number in shards:
        rows = slice(starts[number], starts[number + 1])
        write_shard(directory, number, features[rows].clone(), logits[rows].clone(), NONE)
    head = torch.arange(float(CLASSES * width)).reshape(CLASSES, width)
    known = (torch.from_numpy(places), torch.from_numpy(labels), tuple(keys))
    finish(directory, manifest, Samples(*known, head, head[:, 0].clone()))


def shard(directory: Path, number: int) -> Path:
    (path,) = directory.glob(f"outputs-{number:06d}-*")
    return path


def test_what_was_written_is_read(tmp_path: Path) -> None:
    features, places, labels, _ = FEW
    keys = ["", "ü", *"cdefghij"]
    write(tmp_path, features, places, labels, keys)
    outputs = TeacherOutputs(tmp_path)
    positions = np.array([9, 0, 5, 4, 5])
    found, logits = outputs.read(positions)
    assert torch.equal(found, features[positions])
    assert torch.equal(logits, 2 * features[positions][:, [0, 1, 0, 1]])
    assert [part.shape for part in outputs.read(positions[:0])] == [(0, 2), (0, 4)]
    assert outputs.samples.keys == tuple(keys)
    assert outputs.samples.labels.tolist() == labels.tolist()
    assert outputs.missing.tolist() == [False] * len(outputs) == [False] * 10


def test_shards_that_are_left_are_whole(tmp_path: Path) -> None:
    write(tmp_path, *FEW)
    (tmp_path / COMPLETE).unlink()
    (tmp_path / ".outputs-000001-half.tmp").write_bytes(b"half")
    assert left_shards(tmp_path) == [0, 1, 2]
    damaged = shard(tmp_path, 2)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    shard(tmp_path, 0).unlink()
    features = FEW[0][:5].clone()
    write_shard(tmp_path, 0, features, torch.zeros(5, 4), torch.tensor([3]))  # lacks one
    assert left_shards(tmp_path) == [1]
    assert sorted(path.name[:10] for path in tmp_path.glob("*out*")) == ["outputs-00"]


def test_outputs_without_all_shards_are_not_finished(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="all machines share"):
        write(tmp_path, *FEW, shards=(0, 2))
    assert not is_complete(tmp_path)
    with pytest.raises(UsageError, match="unfinished outputs"):
        TeacherOutputs(tmp_path)
    with pytest.raises(UsageError, match="no outputs of a teacher"):
        TeacherOutputs(tmp_path / "elsewhere")


@pytest.mark.parametrize("name", ["outputs-000001", SAMPLES, MANIFEST, COMPLETE])
def test_any_flipped_byte_is_found(tmp_path: Path, name: str) -> None:
    write(tmp_path, *FEW)
    (path,) = (path for path in tmp_path.iterdir() if path.name.startswith(name))
    whole = path.read_bytes()
    for place in np.random.default_rng(0).integers(len(whole), size=20).tolist():
        content = bytearray(whole)
        content[place] ^= 1
        path.write_bytes(content)
        with pytest.raises(IntegrityError, match=r"run `cmkd memory` with this teacher\.cache"):
            TeacherOutputs(tmp_path)
    path.write_bytes(whole)
    TeacherOutputs(tmp_path)
    path.unlink()
    with pytest.raises(UsageError if name in (MANIFEST, COMPLETE) else IntegrityError):
        TeacherOutputs(tmp_path)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("head_bias", torch.zeros(3)),
        ("labels", torch.full((10,), 4)),
        ("places", torch.zeros(9, dtype=torch.int64)),
        ("key_lengths", torch.ones(11, dtype=torch.int64)),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(
    tmp_path: Path, name: str, wrong: Tensor
) -> None:
    write(tmp_path, *FEW)
    save_file({**load_file(tmp_path / SAMPLES), name: wrong}, tmp_path / SAMPLES)
    content = json.loads((tmp_path / MANIFEST).read_text())
    content["sha256"][SAMPLES] = hashlib.sha256((tmp_path / SAMPLES).read_bytes()).hexdigest()
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    stated = hashlib.sha256((tmp_path / MANIFEST).read_bytes()).hexdigest()
    (tmp_path / COMPLETE).write_text(stated)
    with pytest.raises(IntegrityError, match=r"are damaged"):
        TeacherOutputs(tmp_path)


def test_a_manifest_reaches_no_file_outside_its_directory(tmp_path: Path) -> None:
    write(tmp_path, *FEW)
    content = json.loads((tmp_path / MANIFEST).read_text())
    content["sha256"]["../x"] = "0" * 64
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(IntegrityError, match="are damaged"):
        TeacherOutputs(tmp_path)
