from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmkd_scale.cli import main
from cmkd_scale.config import make_config
from cmkd_scale.data.build import build
from cmkd_scale.errors import UsageError
from cmkd_scale.memory.bank import load_memory, save_memory
from cmkd_scale.memory.controls import orthogonal_teacher, permuted_teacher
from cmkd_scale.records import Sample
from cmkd_scale.stages.predict_transfer import predict_transfer
from tests.conftest import Launch
from tests.data.examples import Pairs, PairsSplit
from tests.stages.conftest import PairsStory
from tests.stages.test_stages import write_config


@pytest.fixture(scope="module")
def candidates(pairs: PairsStory, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A right memory and two that know nothing."""
    right = load_memory(pairs.memory)
    found = {"right": pairs.memory}
    for name, memory in (
        ("permuted", permuted_teacher(right, 0)),
        ("orthogonal", orthogonal_teacher(right, 0)),
    ):
        found[name] = tmp_path_factory.mktemp("candidates") / f"{name}.safetensors"
        save_memory(memory, found[name])
    return found


class NoisySplit(PairsSplit):
    """Half of the letters are any letter, so that there is something to learn from a teacher."""

    def __getitem__(self, index: int) -> Sample:
        plain = super().__getitem__(index)
        rng = np.random.default_rng([index, len(self.split)])
        letters = list(plain.members["txt"].decode())
        for place in range(1, len(letters)):
            if rng.random() < 0.5:
                letters[place] = chr(ord("a") + int(rng.integers(14)))
        text = "".join(letters).encode()
        return dataclasses.replace(plain, members={**plain.members, "txt": text})


class NoisyPairs(Pairs):
    """The same classes, harder to tell."""

    def open(self, modality: str, split: str) -> PairsSplit:
        return NoisySplit(split, 160 if split == "train" else 320)


class LastSplit(PairsSplit):
    """Samples of one class alone."""

    def __getitem__(self, index: int) -> Sample:
        return dataclasses.replace(super().__getitem__(15), key=f"last-{index}")


class LastClass(Pairs):
    """One split of such samples."""

    def open(self, modality: str, split: str) -> PairsSplit:
        return LastSplit(split, 8)


def noisy(pairs: PairsStory, run: Path, shards: Path) -> dict[str, Any]:
    """The config of a student with two noisy samples a class."""
    for split in NoisyPairs.splits:
        build(NoisyPairs(), shards, modality="text", split=split, samples_per_shard=64)
    tree = pairs.tree(run, {}, steps=60)
    tree["data"] |= {"shards": str(shards), "n_per_class": 2}
    return tree


def test_candidates_are_ranked_by_what_they_promise(
    pairs: PairsStory,
    candidates: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tree = noisy(pairs, tmp_path / "run", tmp_path / "shards")
    file = write_config(tmp_path / "student.yaml", tree)
    memories = [f"--memory={candidates[name]}" for name in ("orthogonal", "permuted", "right")]
    arguments = ["predict-transfer", *memories, "--config", str(file)]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "run" / "forecast.json").read_text())
    assert found["steps"] == 60
    best, *others = found["candidates"]
    assert best["memory"] == str(candidates["right"])
    assert best["modality"] == "text"
    assert best["trust"] > 0
    assert best["low"] <= best["gain"] <= best["high"]
    assert all(row["trust"] < best["trust"] and row["gain"] < best["gain"] for row in others)
    assert best["trial"]["accuracy"] == pytest.approx(others[0]["trial"]["accuracy"])
    assert (
        best["gain"]
        > 0
        > next(row["gain"] for row in others if row["memory"] == str(candidates["permuted"]))
    )
    # Asked again, nothing is trained again, and the answer is the same for people.
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "held-out samples right" in lines[0]
    assert lines[1].startswith(f"{best['memory']}: expected gain +")


def test_without_a_run_directory_nothing_is_kept(
    pairs: PairsStory,
    candidates: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    whole = pairs.tree(tmp_path, {}, steps=4)
    whole["run"] = {"dir": None}
    found = predict_transfer(make_config(whole), [candidates["right"]], console=False)
    assert len(found["candidates"]) == 1
    assert list(tmp_path.iterdir()) == []


def test_no_memory_is_refused(pairs: PairsStory, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--memory DIR"):
        predict_transfer(pairs.config(tmp_path, {}), [])


def test_few_steps_can_be_asked_for(
    pairs: PairsStory, candidates: dict[str, Path], tmp_path: Path
) -> None:
    config = pairs.config(tmp_path / "run", {}, steps=100)
    assert predict_transfer(config, [candidates["right"]], steps=3, console=False)["steps"] == 3


def test_classes_without_held_out_samples_are_refused(pairs: PairsStory, tmp_path: Path) -> None:
    right = load_memory(pairs.memory)
    others = tuple(name if name == "00" else f"other-{name}" for name in right.class_names)
    file = tmp_path / "memory.safetensors"
    save_memory(dataclasses.replace(right, class_names=others), file)
    tree = pairs.tree(tmp_path / "run", {}, steps=3)
    tree["data"]["validation_split"] = "elsewhere"
    shards = tmp_path / "shards"
    for split in Pairs.splits:
        build(Pairs(), shards, modality="text", split=split, samples_per_shard=64)
    build(LastClass(), shards, modality="text", split="elsewhere", samples_per_shard=64)
    tree["data"]["shards"] = str(shards)
    with pytest.raises(UsageError, match=r"Choose another data\.validation_split"):
        predict_transfer(make_config(tree), [file], console=False)


@pytest.mark.multirank
def test_two_processes_say_what_one_says(
    pairs: PairsStory, candidates: dict[str, Path], tmp_path: Path, launch: Launch
) -> None:
    tree = noisy(pairs, tmp_path / "alone", tmp_path / "shards")
    alone = predict_transfer(make_config(tree), list(candidates.values()), console=False)
    tree["run"] = {"dir": str(tmp_path / "together")}
    file = write_config(tmp_path / "student.yaml", tree)
    words = [f"--memory={memory}" for memory in candidates.values()]
    launch("predict-transfer", *words, "--config", file, processes=2)
    together = json.loads((tmp_path / "together" / "forecast.json").read_text())
    assert together["accuracy_without_teacher"] == pytest.approx(
        alone["accuracy_without_teacher"], abs=0.01
    )
    for one, other in zip(alone["candidates"], together["candidates"], strict=True):
        assert one["memory"] == other["memory"]
        assert one["gain"] == pytest.approx(other["gain"], abs=0.02)
