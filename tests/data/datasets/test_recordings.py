"""Numbers from recorded digits: unseen speakers, held-out recordings, the right words."""

from __future__ import annotations

import io
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmkd_scale.data.audio import read_sound, wav_bytes
from cmkd_scale.data.datasets.recordings import Recordings, unseen_speakers
from cmkd_scale.errors import EXIT_INTEGRITY, IntegrityError, UsageError

SIX = ["george", "jackson", "lucas", "nicolas", "theo", "yweweler"]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Recordings of four speakers, told apart by their constant value."""
    directory = tmp_path / "tree" / "recordings"
    directory.mkdir(parents=True)
    for s, speaker in enumerate(("anna", "bert", "carl", "dora")):
        for digit in range(10):
            for index in range(3):
                value = (100 * s + 10 * digit + index + 1) / 1000
                sound = np.full(800, value, dtype=np.float32)
                (directory / f"{digit}_{speaker}_{index}.wav").write_bytes(wav_bytes(sound, 8000))
    (directory / "README.md").write_text("not a recording")
    return tmp_path / "tree"


def test_folds_are_all_pairs_and_three_of_them_test_on_everybody() -> None:
    folds = [unseen_speakers(SIX, fold) for fold in range(15)]
    assert len({frozenset(pair) for pair in folds}) == 15
    for start in range(0, 15, 3):
        tested = Counter(name for pair in folds[start : start + 3] for name in pair)
        assert tested == Counter(SIX)
    assert unseen_speakers(SIX, 15) == folds[0]
    assert unseen_speakers(SIX[::-1], 4) == folds[4]


@given(count=st.integers(3, 9), fold=st.integers(0, 1000))
def test_any_number_of_speakers_has_folds(count: int, fold: int) -> None:
    names = [f"s{i}" for i in range(count)]
    pairs = count * (count - 1) // 2
    assert len(set(unseen_speakers(names, fold))) == 2
    assert len({frozenset(unseen_speakers(names, f)) for f in range(pairs)}) == pairs


@pytest.mark.parametrize("fold", range(6))
def test_speakers_and_recordings_are_in_one_split_only(tree: Path, fold: int) -> None:
    rng = np.random.default_rng(fold)
    speakers: dict[str, set[object]] = {}
    files: dict[str, set[object]] = {}
    for split in ("train", "validation", "test"):
        recordings = Recordings(tree, split, fold, seed=1)
        about = [recordings.render(n, rank, rng)[2] for n in range(100) for rank in range(8)]
        speakers[split] = {origin["speaker"] for origin in about}
        files[split] = {str(name) for origin in about for name in origin["recordings"]}  # type: ignore[union-attr]
    assert speakers["train"] == speakers["validation"]
    assert len(speakers["train"]) == len(speakers["test"]) == 2
    assert not speakers["train"] & speakers["test"]
    assert not files["train"] & files["validation"]


def test_a_clip_is_its_two_digits_by_one_speaker(tree: Path) -> None:
    recordings = Recordings(tree, "train", 0, seed=0)
    for number in (0, 7, 40, 99):
        extension, content, about = recordings.render(number, 0, np.random.default_rng(number))
        names = about["recordings"]
        assert isinstance(names, list)
        assert [str(name)[0] for name in names] == list(f"{number:02d}")
        assert {str(name).split("_")[1] for name in names} == {about["speaker"]}
        samples, rate = read_sound(content, 10)
        assert (extension, rate) == ("wav", 8000)
        assert 1600 <= len(samples) <= 1600 + 960
        for part, name in ((samples[:800], names[0]), (samples[-800:], names[1])):
            original, _ = read_sound((tree / "recordings" / str(name)).read_bytes(), 10)
            np.testing.assert_allclose(part, original, atol=1e-4)


def test_clips_of_a_number_are_dealt_out_to_different_speakers(tree: Path) -> None:
    recordings = Recordings(tree / "recordings", "train", 2, seed=3)
    for number in range(0, 100, 17):
        rng = np.random.default_rng(0)
        spoken = [recordings.render(number, rank, rng)[2]["speaker"] for rank in range(2)]
        assert sorted(map(str, spoken)) == recordings.speakers


def test_unreadable_recording_is_named(tree: Path) -> None:
    for path in (tree / "recordings").glob("4_*"):
        path.write_bytes(b"RIFF, but no more than that")
    with pytest.raises(IntegrityError, match=r"recordings/4_\w+_\d\.wav cannot be read") as caught:
        Recordings(tree, "train", 0, seed=0).render(42, 0, np.random.default_rng(0))
    assert caught.value.exit_code == EXIT_INTEGRITY


def test_other_sample_rates_are_resampled(tree: Path) -> None:
    import soundfile

    tone = np.sin(np.arange(4410) / 20).astype(np.float32)
    for path in (tree / "recordings").glob("5_*"):
        buffer = io.BytesIO()
        soundfile.write(buffer, np.stack([tone, tone], axis=1), 44100, format="WAV")
        path.write_bytes(buffer.getvalue())
    _, content, _ = Recordings(tree, "train", 0, seed=0).render(55, 0, np.random.default_rng(0))
    samples, rate = read_sound(content, 10)
    assert rate == 8000
    assert 1600 <= len(samples) <= 1600 + 960


def test_missing_recordings_are_named(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no directory"):
        Recordings(tmp_path / "nowhere", "train", 0, seed=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="recordings of 0 speakers"):
        Recordings(tmp_path / "empty", "train", 0, seed=0)
    shutil.copytree(tree, tmp_path / "copy")
    for path in (tmp_path / "copy" / "recordings").glob("3_*_[12].wav"):
        path.unlink()
    with pytest.raises(UsageError, match="too few recordings of '3'"):
        Recordings(tmp_path / "copy", "train", 0, seed=0)


def test_fingerprint_tells_other_recordings(tree: Path) -> None:
    before = Recordings(tree, "train", 0, seed=0).fingerprint
    assert Recordings(tree, "test", 1, seed=2).fingerprint == before
    path = tree / "recordings" / "0_anna_0.wav"
    path.write_bytes(path.read_bytes() + b"\0\0")
    assert Recordings(tree, "train", 0, seed=0).fingerprint != before


def test_real_recordings_are_those_of_six_speakers(fsdd: Path) -> None:
    speakers = {split: Recordings(fsdd, split, 0, seed=0).speakers for split in ("train", "test")}
    assert speakers == {"train": SIX[1:5], "test": [SIX[0], SIX[5]]}
    lengths = []
    for number in range(0, 100, 9):
        recordings = Recordings(fsdd, "test", 1, seed=0)
        _, content, _ = recordings.render(number, 0, np.random.default_rng(number))
        samples, _ = read_sound(content, 10)
        lengths.append(len(samples) / 8000)
        assert np.abs(samples).max() > 0.01
    assert min(lengths) > 0.3
    assert max(lengths) < 3
