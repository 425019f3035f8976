"""What every data set of files promises, whatever its layout."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest

from cmkd_scale.data.build import build
from cmkd_scale.data.datasets.entries import SPLITS, FileDataset, FileSplit
from cmkd_scale.data.verify import verify
from cmkd_scale.errors import UsageError
from cmkd_scale.records import UNLABELLED
from tests.data.datasets.published import CASES

MODALITIES = [
    (name, modality)
    for name, modalities in {
        "fsdd": ("audio",),
        "ravdess": ("audio", "image"),
        "crema_d": ("audio", "image"),
        "ave": ("audio", "image"),
        "vggsound": ("audio", "image"),
        "crisis_mmd": ("image", "text"),
        "image_folder": ("image",),
        "audio_folder": ("audio",),
        "csv": ("image", "audio", "text", "features"),
    }.items()
    for modality in modalities
]


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    roots = {name: tmp_path_factory.mktemp(name) for name in CASES}
    for name, case in CASES.items():
        case.make(roots[name])
    return roots


def opened(root: Path, name: str, modality: str, split: str) -> FileSplit:
    found = CASES[name].factory(root, {}).open(modality, split)
    assert isinstance(found, FileSplit)
    return found


def test_every_modality_is_tested(trees: dict[str, Path]) -> None:
    stated = [
        (name, modality)
        for name, case in CASES.items()
        for modality in case.factory(trees[name], {}).modalities
    ]
    assert stated == MODALITIES
    assert [case.factory(None, {}).name for case in CASES.values()] == list(CASES)


@pytest.mark.parametrize(("name", "modality"), MODALITIES)
def test_splits_show_nothing_in_common(trees: dict[str, Path], name: str, modality: str) -> None:
    splits = [opened(trees[name], name, modality, split) for split in SPLITS]
    for kind in ("group", "name"):
        shown = [{getattr(entry, kind) for entry in split.entries} for split in splits]
        assert all(shown)
        assert len(set.union(*shown)) == sum(map(len, shown))
    files = [{entry.file for entry in split.entries if entry.text is None} for split in splits]
    assert len(set.union(*files)) == sum(map(len, files))
    keys = [key for split in splits for key in split.keys]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(("name", "modality"), MODALITIES)
def test_shards_are_valid_and_the_same_each_time(
    trees: dict[str, Path], tmp_path: Path, name: str, modality: str
) -> None:
    manifests = [
        build(
            CASES[name].factory(trees[name], {}),
            tmp_path / again,
            modality=modality,
            split="test",
            samples_per_shard=7,
        )
        for again in ("first", "second")
    ]
    assert manifests[0].digest == manifests[1].digest
    assert manifests[0].samples == len(opened(trees[name], name, modality, "test"))
    assert verify(tmp_path / "first") == []


@pytest.mark.parametrize(("name", "modality"), MODALITIES)
def test_samples_mix_classes_and_say_where_they_are_from(
    trees: dict[str, Path], name: str, modality: str
) -> None:
    splits = {split: opened(trees[name], name, modality, split) for split in SPLITS}
    assert len({split.label_names for split in splits.values()}) == 1
    train = splits["train"]
    labels = [entry.label for entry in train.entries]
    assert labels != sorted(labels) or len(set(labels)) == 1
    for i in range(0, len(train), 11):
        sample = train[i]
        about = json.loads(sample.members["json"])
        stored = set(sample.members) - {"json", "cls"}
        assert stored <= {"jpg", "png", "webp", "wav", "txt", "npy"}
        assert len(stored) == 1
        assert about["source"] == train.entries[i].file
        if sample.label == UNLABELLED:
            assert "label" not in about
        else:
            assert about["label"] == train.label_names[sample.label]
            assert sample.members["cls"] == str(sample.label).encode()
    with pytest.raises(IndexError):
        train[len(train)]


@pytest.mark.parametrize(
    ("name", "modality"),
    [pair for pair in MODALITIES if pair[0] in ("fsdd", "image_folder", "audio_folder")]
    + [("ravdess", "audio"), ("crema_d", "audio"), ("crisis_mmd", "image"), ("csv", "features")],
)
def test_media_files_are_stored_unchanged(trees: dict[str, Path], name: str, modality: str) -> None:
    root = trees[name] / "CrisisMMD_v2.0" if name == "crisis_mmd" else trees[name]
    split = opened(trees[name], name, modality, "train")
    for sample, entry in zip(split, split.entries, strict=False):  # type: ignore[call-overload]
        (content,) = (sample.members[key] for key in sample.members if key not in ("json", "cls"))
        assert content == (root / entry.file).read_bytes()


def _keys(dataset: FileDataset, modality: str) -> list[str]:  # type: ignore[type-arg]
    split = dataset.open(modality, "train")
    return [split[i].key for i in range(3 if len(split) > 2 else 1)]


@pytest.fixture(scope="module")
def worker() -> Iterator[multiprocessing.pool.Pool]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield pool


@pytest.mark.parametrize("name", CASES)
def test_another_process_opens_the_same(
    trees: dict[str, Path], worker: multiprocessing.pool.Pool, name: str
) -> None:
    dataset = CASES[name].factory(trees[name], {})
    modality = dataset.modalities[0]
    assert isinstance(dataset, FileDataset)
    assert worker.apply(_keys, (dataset, modality)) == _keys(dataset, modality)
    split = dataset.open(modality, "test")
    assert worker.apply(split.__getitem__, (0,)) == split[0]


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_with_a_source_is_said(tmp_path: Path, name: str) -> None:
    factory = CASES[name].factory
    modality = factory(None, {}).modalities[0]
    with pytest.raises(UsageError, match=f"{name} needs --source"):
        factory(None, {}).open(modality, "train")
    with pytest.raises(UsageError, match="There is no directory"):
        factory(tmp_path / "nowhere", {}).open(modality, "train")
    with pytest.raises(UsageError) as caught:
        factory(tmp_path, {}).open(modality, "train")
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(UsageError, match="no modality 'smell': valid"):
        factory(tmp_path, {}).open("smell", "train")
    with pytest.raises(UsageError, match="no split 'tests': did you mean 'test'"):
        factory(tmp_path, {}).open(modality, "tests")
    with pytest.raises(UsageError, match=f"'{name}': there is no option 'colour'"):
        factory(tmp_path, {"colour": "red"})


@pytest.mark.parametrize("name", ["fsdd", "ravdess", "crema_d", "image_folder", "csv"])
def test_fingerprint_tells_other_files(tmp_path: Path, name: str) -> None:
    CASES[name].make(tmp_path)
    modality = CASES[name].factory(None, {}).modalities[0]
    before = opened(tmp_path, name, modality, "train")
    path = tmp_path / before.entries[0].file
    path.write_bytes(path.read_bytes() + b"\0")
    after = opened(tmp_path, name, modality, "train")
    assert before.options["fingerprint"] != after.options["fingerprint"]
    assert before.keys == after.keys
