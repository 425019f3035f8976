"""Pictures and sound out of short video clips, by PyAV."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, JsonValue

from cmkd_scale.data.audio import wav_bytes
from cmkd_scale.data.datasets.entries import Entry
from cmkd_scale.errors import IntegrityError, UsageError

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer

_QUALITY = 90  # of JPEG
_TOLERANCE = 0.5  # seconds by which the last picture may be older than the one that is wanted
_EPSILON = 1e-6  # seconds


class FrameOptions(BaseModel):
    """``key=value`` options for pictures out of videos."""

    frames: int = Field(1, ge=1, le=999)
    """Pictures of a clip, in the middle of as many equal parts of its time."""
    size: int = Field(256, ge=8, le=4096)
    """Pixels of the shorter side; smaller videos are not enlarged."""

    def recorded(self, modality: str) -> dict[str, JsonValue]:
        """Those that decide the bytes of ``modality``."""
        return {"frames": self.frames, "size": self.size} if modality == "image" else {}


class VideoOptions(FrameOptions):
    """``key=value`` options for pictures and sound out of videos."""

    sample_rate: int = Field(16000, ge=1000, le=192_000)
    """Hertz."""

    def recorded(self, modality: str) -> dict[str, JsonValue]:
        """Those that decide the bytes of ``modality``."""
        return super().recorded(modality) or {"sample_rate": self.sample_rate}


@dataclass(frozen=True, slots=True)
class FrameReader:
    """Entries to JPEGs: ``jpg``, or ``000.jpg``, ``001.jpg``, ... if there are several."""

    source: Path
    options: FrameOptions

    def __call__(self, entry: Entry) -> Mapping[str, bytes]:
        """Members of an entry; see ``frames_of``."""
        pictures = frames_of(
            self.source / entry.file, self.options.frames, self.options.size, entry.span
        )
        if len(pictures) == 1:
            return {"jpg": pictures[0]}
        return {f"{place:03d}.jpg": picture for place, picture in enumerate(pictures)}


@dataclass(frozen=True, slots=True)
class SoundReader:
    """Entries to 16-bit mono ``wav``."""

    source: Path
    sample_rate: int

    def __call__(self, entry: Entry) -> Mapping[str, bytes]:
        """Members of an entry; see ``sound_of``."""
        samples = sound_of(self.source / entry.file, self.sample_rate, entry.span)
        return {"wav": wav_bytes(samples, self.sample_rate)}


def frames_of(
    path: Path, count: int, size: int, span: tuple[float, float] | None = None
) -> list[bytes]:
    """``count`` JPEGs at the midpoints of equal parts of ``span``, or of the clip.

    Args:
        path: a video.
        count: pictures to take.
        size: pixels of the shorter side; smaller pictures stay as they are.
        span: seconds from .. to after the first picture; what lies behind the end of the
            video is left out.

    Raises:
        IntegrityError: not a readable video, or its pictures end before the clip does.
        UsageError: PyAV is not installed.
    """
    start, stop = span or (0.0, math.inf)
    stop = min(stop, _seconds(path))
    wanted = [start + (place + 0.5) * (stop - start) / count for place in range(count)]
    pictures: list[bytes] = []
    with _opened(path, "video") as container:
        stream = container.streams.video[0]
        first = float((stream.start_time or 0) * (stream.time_base or 0))
        frame, time = None, 0.0
        # Decoded from the beginning on: seeking is inexact in FLV, and clips last seconds.
        for frame in container.decode(video=0):
            time = (frame.time or 0.0) - first
            due = sum(moment <= time + _EPSILON for moment in wanted[len(pictures) :])
            if due:
                pictures += due * [_jpeg(frame, size)]
            if len(pictures) == count:
                return pictures
        if frame is None or time + _TOLERANCE < wanted[-1]:
            raise ValueError(f"its pictures end after {time:g} s of {stop:g} s")
        return pictures + (count - len(pictures)) * [_jpeg(frame, size)]


def sound_of(
    path: Path, sample_rate: int, span: tuple[float, float] | None = None
) -> NDArray[np.float32]:
    """The sound of a video, channels averaged: [seconds * sample_rate] in -1 .. 1.

    Args:
        path: a video.
        sample_rate: Hertz of what is returned.
        span: seconds from .. to after the first sound; what lies behind the end is left out.

    Raises:
        IntegrityError: not a readable video, or one without sound in ``span``.
        UsageError: PyAV is not installed.
    """
    start, stop = (round(moment * sample_rate) for moment in span) if span else (0, None)
    parts: list[NDArray[np.float32]] = []
    held = 0
    with _opened(path, "audio") as container:
        from av import AudioResampler

        # Channels are averaged by us: FFmpeg's downmix makes stereo louder, and clips.
        resampler = AudioResampler(format="fltp", rate=sample_rate)
        for frame in container.decode(audio=0):
            new = [part.to_ndarray().mean(axis=0) for part in resampler.resample(frame)]
            parts += new
            held += sum(map(len, new))
            if stop is not None and held >= stop:
                break
        else:
            parts += [part.to_ndarray().mean(axis=0) for part in resampler.resample(None)]
        samples = np.concatenate([np.zeros(0, np.float32), *parts])[start:stop]
        if not len(samples):
            raise ValueError("it holds no sound where it should")
    return samples.astype(np.float32, copy=False)


def _seconds(path: Path) -> float:
    """How long the pictures of a video last, as far as its header or its packets tell."""
    with _opened(path, "video") as container:
        stream = container.streams.video[0]
        if stream.duration and stream.time_base:
            return float(stream.duration * stream.time_base)
        if container.duration:
            return container.duration / 1_000_000
        times = [packet.pts for packet in container.demux(stream) if packet.pts is not None]
        if not times or not stream.time_base:
            raise ValueError("it has no duration")
        return float((max(times) - min(times)) * stream.time_base)


@contextmanager
def _opened(path: Path, kind: str) -> Iterator[InputContainer]:
    """The container of ``path``, which has a stream of ``kind``; faults are ``IntegrityError``."""
    try:
        import av
    except ImportError as error:
        raise UsageError("Reading videos needs PyAV: pip install 'cmkd_scale[video]'.") from error
    try:
        with av.open(path) as container:
            if not any(stream.type == kind for stream in container.streams):
                raise ValueError(f"it holds no {kind}")
            yield container
    except (av.FFmpegError, OSError, ValueError) as error:
        raise IntegrityError(
            f"{path} cannot be used: {error}. Download it again, or remove it: a data set is "
            "built from the files that are there."
        ) from None


def _jpeg(frame: VideoFrame, size: int) -> bytes:
    from PIL import Image

    picture = Image.fromarray(frame.to_ndarray(format="rgb24"))
    scale = size / min(picture.size)
    if scale < 1:
        width, height = (max(1, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=_QUALITY)
    return buffer.getvalue()
