"""The right moments of a video as pictures and sound, and readable errors for damaged ones."""

from __future__ import annotations

import builtins
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cmkd_scale.data.audio import read_sound
from cmkd_scale.data.datasets.entries import Entry
from cmkd_scale.data.datasets.video import (
    FrameOptions,
    FrameReader,
    SoundReader,
    frames_of,
    sound_of,
)
from cmkd_scale.errors import IntegrityError, UsageError
from tests.data.datasets.published import LEVEL, video


def place_of(jpeg: bytes) -> int:
    """Which picture of ``video`` this is, told from its grey."""
    with Image.open(io.BytesIO(jpeg)) as image:
        grey = float(np.asarray(image.convert("L"), dtype=np.float64).mean())
    return round(grey / LEVEL)


@pytest.mark.parametrize("container", ["mp4", "flv"])
@pytest.mark.parametrize(
    ("count", "span", "places"),
    [
        (1, None, [5]),
        (5, None, [1, 3, 5, 7, 9]),
        (20, None, [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 9, 9]),
        (2, (0.2, 0.6), [3, 5]),
        (1, (0.6, 99.0), [8]),
    ],
)
def test_pictures_are_those_at_the_midpoints(
    tmp_path: Path, container: str, count: int, span: tuple[float, float] | None, places: list[int]
) -> None:
    path = tmp_path / f"clip.{container}"
    path.write_bytes(video(container, hertz=None))
    found = [place_of(picture) for picture in frames_of(path, count, 256, span)]
    # Midpoints that fall between two pictures take the later one.
    assert np.abs(np.array(found) - places).max() == 0
    assert found == sorted(found)


def test_shorter_side_is_reduced_and_never_enlarged(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(video())
    for size, expected in ((24, (32, 24)), (500, (64, 48))):
        (picture,) = frames_of(path, 1, size)
        with Image.open(io.BytesIO(picture)) as image:
            assert (image.size, image.format) == (expected, "JPEG")


def test_members_of_several_pictures_are_numbered(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(video())
    entry = Entry("clip", "clip.mp4", 0, "clip")
    three = FrameReader(tmp_path, FrameOptions(frames=3, size=48))(entry)
    assert list(three) == ["000.jpg", "001.jpg", "002.jpg"]
    assert [place_of(picture) for picture in three.values()] == [2, 5, 9]
    assert list(FrameReader(tmp_path, FrameOptions(frames=1, size=48))(entry)) == ["jpg"]


@pytest.mark.parametrize("rate", [8000, 16000])
def test_sound_is_cut_in_time(tmp_path: Path, rate: int) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(video(seconds=2))
    loud = np.abs(sound_of(path, rate, (0.6, 1.6)))
    assert len(loud) == rate
    assert 0.25 < loud.mean() < 0.38  # 2 / pi of the amplitude
    assert np.abs(sound_of(path, rate, (0.0, 0.4))).max() < 0.02
    whole = sound_of(path, rate)
    assert abs(len(whole) - 2 * rate) < 0.1 * rate
    spectrum = np.abs(np.fft.rfft(sound_of(path, rate, (0.6, 1.6))))
    assert int(spectrum.argmax()) == 500


def test_sound_is_stored_as_mono_wav(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(video())
    members = SoundReader(tmp_path, 8000)(Entry("clip", "clip.mp4", 0, "clip", span=(0.5, 1.0)))
    samples, rate = read_sound(members["wav"], 10)
    assert (rate, len(samples)) == (8000, 4000)


@pytest.mark.parametrize(
    "damage", [lambda whole: whole[: len(whole) // 2], lambda whole: b"", lambda whole: b"x" * 500]
)
def test_damaged_videos_are_named(tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(damage(video()))
    with pytest.raises(IntegrityError, match=r"clip\.mp4 cannot be used: .*Download it again"):
        frames_of(path, 1, 48)
    with pytest.raises(IntegrityError, match=r"clip\.mp4 cannot be used"):
        sound_of(path, 8000)


def test_pictures_that_end_before_the_clip_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "clip.flv"
    whole = len(video("flv", 3.0, hertz=None))
    path.write_bytes(video("flv", 3.0, hertz=None)[: whole // 3])
    with pytest.raises(IntegrityError, match="pictures end after"):
        frames_of(path, 3, 48)


def test_videos_without_sound_or_with_none_there_are_named(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(video(hertz=None))
    with pytest.raises(IntegrityError, match="it holds no audio"):
        sound_of(path, 8000)
    path.write_bytes(video())
    with pytest.raises(IntegrityError, match="no sound where it should"):
        sound_of(path, 8000, (50.0, 60.0))
    with pytest.raises(IntegrityError, match="pictures end"):
        frames_of(path, 1, 48, (50.0, 60.0))


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_av(name: str, *rest: Any) -> Any:
        if name == "av":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_av)
    with pytest.raises(UsageError, match=r"pip install 'cmkd_scale\[video\]'"):
        frames_of(tmp_path / "clip.mp4", 1, 48)
