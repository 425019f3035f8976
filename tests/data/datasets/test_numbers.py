"""The bundled task: balanced, reproducible, and nothing of it in two splits."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cmkd_scale.data.audio import wav_bytes
from cmkd_scale.data.datasets import DATASETS, Dataset
from cmkd_scale.data.datasets.handwriting import digits_of, mnist_digits
from cmkd_scale.data.datasets.numbers import LABEL_NAMES, NumbersSplit
from cmkd_scale.data.datasets.speech import VARIANTS
from cmkd_scale.data.modalities import MODALITIES
from cmkd_scale.data.shards import find_manifests, load_manifest
from cmkd_scale.data.verify import verify
from cmkd_scale.errors import UsageError

REPOSITORY = Path(__file__).resolve().parents[3]
SPLITS = ("train", "validation", "test")
MODALITY_NAMES = ("image", "audio", "text")


def numbers(source: Path | None = None, **options: int) -> Dataset:
    return DATASETS["numbers"](source, {name: str(value) for name, value in options.items()})


def origins(
    modality: str, split: str, source: Path | None = None, **options: int
) -> list[dict[str, Any]]:
    opened = numbers(source, **options).open(modality, split)
    return [json.loads(opened[i].members["json"]) for i in range(len(opened))]


def test_labels_are_the_same_in_all_modalities() -> None:
    dataset = numbers()
    assert dataset.modalities == MODALITY_NAMES
    assert dataset.splits == SPLITS
    for modality in dataset.modalities:
        for split in dataset.splits:
            assert dataset.open(modality, split).label_names == LABEL_NAMES
    assert LABEL_NAMES[:2] + LABEL_NAMES[-1:] == ("00", "01", "99")


@pytest.mark.parametrize("modality", MODALITY_NAMES)
@pytest.mark.parametrize("split", SPLITS)
def test_samples_are_whole_and_decodable(modality: str, split: str) -> None:
    opened = numbers(n_per_class=1).open(modality, split)
    decoder = MODALITIES[modality]()
    extension = {"image": "png", "audio": "wav", "text": "txt"}[modality]
    for i in range(0, 100, 7):
        sample = opened[i]
        assert sample.key == f"numbers-{modality}-{split}-{i:06d}"
        assert sample.members["cls"] == str(sample.label).encode()
        about = json.loads(sample.members["json"])
        assert about["label"] == LABEL_NAMES[sample.label]
        assert list(about) == sorted(about)
        assert set(sample.members) == {extension, "cls", "json"}
        assert tuple(decoder.decode(sample.members).shape) == decoder.shape


@pytest.mark.parametrize("modality", MODALITY_NAMES)
def test_every_prefix_is_balanced(modality: str) -> None:
    opened = numbers(train_per_class=3).open(modality, "train")
    assert isinstance(opened, NumbersSplit)
    # The order of the numbers is the split's; what they look and sound like is not.
    order = dataclasses.replace(opened, renderer=lambda number, rank, rng: ("x", b"", {}))
    labels = [order[i].label for i in range(300)]
    assert labels[:5] == [opened[i].label for i in range(5)]
    for stop in range(20, 301, 20):
        counts = np.bincount(labels[:stop], minlength=100)
        assert counts.max() - counts.min() <= 1
    assert labels[:100] != labels[100:200]


@pytest.mark.parametrize("modality", ["image", "text"])
def test_fewer_samples_are_the_first_of_more(modality: str) -> None:
    few = numbers(train_per_class=1).open(modality, "train")
    many = numbers(train_per_class=4).open(modality, "train")
    assert [few[i] for i in range(100)] == [many[i] for i in range(100)]


def test_counts_can_be_asked_for_each_split_or_all() -> None:
    dataset = numbers(n_per_class=3, test_per_class=7)
    assert [len(dataset.open("image", split)) for split in SPLITS] == [300, 300, 700]
    assert numbers().open("image", "train").options == {"train_per_class": 100, "seed": 0}
    assert dict(dataset.open("text", "test").options) == {"test_per_class": 7, "seed": 0}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"train_per_clas": "3"}, "did you mean 'train_per_class'"),
        ({"n_per_class": "three"}, "n_per_class=three.*integer"),
        ({"n_per_class": "0"}, "greater than or equal to 1"),
        ({"seed": "-1", "fold": "x"}, "seed=-1.*fold=x"),
        ({"n_per_class": "9" * 400}, "n_per_class"),
    ],
)
def test_wrong_options_are_named(options: dict[str, str], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        DATASETS["numbers"](None, options)


def test_unknown_modality_or_split_is_named() -> None:
    with pytest.raises(UsageError, match="did you mean 'audio'"):
        numbers().open("audoi", "train")
    with pytest.raises(UsageError, match="did you mean 'train'"):
        numbers().open("audio", "trian")
    with pytest.raises(IndexError):
        numbers(n_per_class=1).open("image", "train")[100]


# -------------------------------------------------------------------------- no leaks


def test_digits_of_the_splits_are_4000_and_1000_and_never_shared() -> None:
    labels = mnist_digits()[1]
    used: dict[str, set[int]] = {}
    for split, size in (("train", 360), ("validation", 40), ("test", 100)):
        pools = digits_of(split)
        assert [len(pool) for pool in pools] == [size] * 10
        for digit, pool in enumerate(pools):
            assert (labels[pool] == digit).all()
        used[split] = {int(place) for pool in pools for place in pool}
    assert len(used["train"] | used["validation"]) == 4000
    assert len(used["test"]) == 1000
    assert not (used["train"] | used["validation"]) & used["test"]
    assert not used["train"] & used["validation"]


@settings(max_examples=10)
@given(seed=st.integers(0, 2**63 - 1))
def test_no_seed_puts_a_test_digit_into_training(seed: int) -> None:
    used = {
        split: {
            place
            for about in origins("image", split, n_per_class=1, seed=seed)
            for place in about["digits"]
        }
        for split in SPLITS
    }
    for split in SPLITS:
        pool = {int(place) for places in digits_of(split) for place in places}
        assert used[split] <= pool
    assert not used["test"] & (used["train"] | used["validation"])


def test_picture_is_its_two_digits() -> None:
    opened = numbers(n_per_class=1).open("image", "test")
    images, labels = mnist_digits()
    for i in range(0, 100, 9):
        sample = opened[i]
        picture = np.asarray(Image.open(io.BytesIO(sample.members["png"])))
        left, right = json.loads(sample.members["json"])["digits"]
        assert picture.shape == (28, 56)
        assert (picture[:, :28] == images[left]).all()
        assert (picture[:, 28:] == images[right]).all()
        assert (labels[left], labels[right]) == divmod(sample.label, 10)


def test_voices_and_texts_are_in_one_split_only() -> None:
    voices, texts = {}, {}
    for split in SPLITS:
        audio = numbers(n_per_class=1).open("audio", split)
        about = [json.loads(audio[i].members["json"]) for i in range(0, 100, 5)]
        voices[split] = {origin["speaker"] for origin in about}
        assert voices[split] <= set(VARIANTS[split])
        assert all(origin["voice"].endswith("+" + origin["speaker"]) for origin in about)
        text = numbers(n_per_class=2).open("text", split)
        texts[split] = {text[i].members["txt"] for i in range(len(text))}
    for first, second in itertools.combinations(SPLITS, 2):
        assert not voices[first] & voices[second]
        assert not texts[first] & texts[second]


# ------------------------------------------------------------------- reproducibility

PROGRAM = """
import sys
from pathlib import Path
from cmkd_scale.data.build import build
from cmkd_scale.data.datasets import DATASETS

out, source = Path(sys.argv[1]), Path(sys.argv[2])
synthesised = DATASETS["numbers"](None, {"n_per_class": "1"})
recorded = DATASETS["numbers"](source, {"n_per_class": "1"})
for dataset, modality, split in (
    (synthesised, "image", "validation"),
    (synthesised, "audio", "test"),
    (synthesised, "text", "train"),
    (recorded, "audio", "train"),
):
    build(dataset, out, modality=modality, split=split, samples_per_shard=40)
"""


@pytest.mark.slow
def test_two_builds_are_the_same_bytes(tmp_path: Path) -> None:
    """In processes whose sets and dicts hash differently, in other places and time zones."""
    (tmp_path / "source").mkdir()
    for name in itertools.product(range(10), ("anna", "bert", "carl"), range(2)):
        tone = np.sin(np.arange(500) * (1 + name[0]) / 20).astype(np.float32)
        path = tmp_path / "source" / f"{name[0]}_{name[1]}_{name[2]}.wav"
        path.write_bytes(wav_bytes(tone / np.float32(1 + name[2]), 8000))
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    outs = [tmp_path / "1", tmp_path / "2"]
    processes = [
        subprocess.Popen(
            [sys.executable, str(program), str(out), str(tmp_path / "source")],
            env={
                **os.environ,
                "PYTHONPATH": str(REPOSITORY),
                "PYTHONHASHSEED": out.name,
                "TZ": zone,
            },
            cwd=tmp_path,
        )
        for out, zone in zip(outs, ("UTC", "Asia/Tokyo"), strict=True)
    ]
    assert [process.wait(timeout=200) for process in processes] == [0, 0]
    first, second = (
        {
            str(path.relative_to(out)): path.read_bytes()
            for path in sorted(out.rglob("*"))
            if path.is_file()
        }
        for out in outs
    )
    assert len(first) == 4 * (3 * 2 + 1)
    assert first == second
    assert verify(outs[0]) == []
    for directory in find_manifests(outs[0]):
        assert load_manifest(directory).class_counts == (1,) * 100


@pytest.mark.parametrize("modality", MODALITY_NAMES)
def test_samples_do_not_depend_on_those_made_before(modality: str) -> None:
    places = [3, 50, 99, 7, 50]
    opened = numbers(n_per_class=1, seed=5).open(modality, "train")
    forward = [opened[i] for i in places]
    again = numbers(n_per_class=1, seed=5).open(modality, "train")
    assert [again[i] for i in reversed(places)] == forward[::-1]
    other = numbers(n_per_class=1, seed=6).open(modality, "train")
    assert other[3].members != forward[0].members
