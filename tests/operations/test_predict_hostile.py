"""Files that cannot be predicted: each is one line, and the others are predicted."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import sqlite3
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import soundfile
from PIL import Image

from cmkd_scale.cli import main
from tests.operations.exports import write_random

OPTIONS = {"image": {"height": 16, "width": 16, "channels": 3}, "audio": {}, "text": {}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for modality, options in OPTIONS.items():
        write_random(root / modality, modality, options)
    return root


def picture(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 4), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., :3]).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def deep_picture() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 160).save(buffer, "PNG")
    return buffer.getvalue()


def moving_picture() -> bytes:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "green", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG that claims a size which it does not hold."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    ends = chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + ends


def sound(
    samples: int = 4000, kind: str = "WAV", subtype: str = "PCM_16", rate: int = 8000
) -> bytes:
    wave_N = np.random.default_rng(0).uniform(-0.5, 0.5, samples).astype(np.float32)
    buffer = io.BytesIO()
    soundfile.write(buffer, wave_N, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def float_sound(value: float, rate: int = 8000) -> bytes:
    buffer = io.BytesIO()
    samples = np.full(4000, value, np.float32)
    samples[::2] *= -1
    soundfile.write(buffer, samples, rate, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def unfinished_sound() -> bytes:
    """A header that claims hours, as a recorder that has crashed leaves it."""
    content = bytearray(sound())
    content[40:44] = struct.pack("<I", 10 * 3600 * 16000)
    return bytes(content)


def boasting_sound() -> bytes:
    """FLAC that claims ten hours: the number of samples is the last 36 bits of 8 bytes."""
    content = bytearray(sound(kind="FLAC"))
    (facts,) = struct.unpack(">Q", content[18:26])
    content[18:26] = struct.pack(">Q", facts >> 36 << 36 | 10 * 3600 * 8000)
    return bytes(content)


def database() -> bytes:
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        connection.execute("create table t (x)")
        return connection.serialize()


SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
GIF = picture("GIF", "P")
PDF = b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n"
ZIP = b"PK\x03\x04" + bytes(26)

BAD: dict[str, tuple[str, bytes]] = {
    "empty.png": ("image", b""),
    "cut.png": ("image", picture("PNG")[:300]),
    "cut header.png": ("image", picture("PNG")[:20]),
    "cut.jpg": ("image", picture("JPEG")[:400]),
    "cut.webp": ("image", picture("WEBP")[:80]),
    "text.png": ("image", b"this is a text\n" * 20),
    "sound.png": ("image", sound()),
    "bomb.png": ("image", bomb(100_000, 100_000)),
    "smaller bomb.png": ("image", bomb(10_000, 9_000)),
    "packed.png": ("image", gzip.compress(picture("PNG"))),
    "page.jpg": ("image", HTML),
    "drawing.svg": ("image", SVG),
    "drawing.png": ("image", SVG),
    "a.gif": ("image", GIF),
    "a.pdf": ("image", PDF),
    "a.db": ("image", database()),
    "a": ("image", ZIP),
    "song.mp3": ("image", b"ID3\x04\x00\x00\x00\x00\x00\x00\xff\xfb\x90\x00" + bytes(400)),
    "zeros.png": ("image", bytes(4096)),
    "empty.wav": ("audio", b""),
    "cut.wav": ("audio", sound()[:40]),
    "cut.flac": ("audio", sound(kind="FLAC")[:90]),
    "picture.wav": ("audio", picture("PNG")),
    "no samples.wav": ("audio", sound(0)),
    "hours.flac": ("audio", boasting_sound()),
    "long.flac": ("audio", sound(61 * 8000, kind="FLAC")),
    "nan.wav": ("audio", float_sound(np.nan)),
    # Resampled, it leaves the numbers of 32 bits.
    "louder.wav": ("audio", float_sound(3.4e38, rate=11_025)),
    "infinite.wav": ("audio", float_sound(np.inf)),
    "packed.wav": ("audio", gzip.compress(sound())),
    "page.wav": ("audio", HTML),
    "not UTF-8.txt": ("text", b"caf\xe9"),
    "blank.txt": ("text", b" \n\t\r\n"),
    "empty.txt": ("text", b""),
    "wide.txt": ("text", "good day".encode("utf-16")),
    "long but not UTF-8.txt": ("text", b"a" * 1_000_000 + b"\xff"),
    "packed.txt": ("text", gzip.compress(b"good day" * 9)),
    "a\nb\x1b[2J\x1b]0;title\x07\u202e.png": ("image", b"no"),
    "\udcff\udcfe.png": ("image", b"no"),
}
"""Read, and damaged or of another kind: exit code 42."""

FINE: dict[str, tuple[str, bytes]] = {
    "inks.jpg": ("image", picture("JPEG", "CMYK")),
    "deep.png": ("image", deep_picture()),
    "clear.png": ("image", picture("PNG", "RGBA")),
    "few colours.png": ("image", picture("PNG", "P", transparency=3)),
    "moving.webp": ("image", moving_picture()),
    "jpeg.png": ("image", picture("JPEG")),
    "no extension": ("image", picture("WEBP")),
    "unfinished.wav": ("audio", unfinished_sound()),
    "silence.wav": ("audio", float_sound(0.0)),
    "one sample.wav": ("audio", sound(1)),
    "loud.wav": ("audio", float_sound(1e30)),
    "slow.wav": ("audio", sound(30, rate=1)),
    "fast.wav": ("audio", sound(4000, rate=768_000)),
    "vorbis.ogg": ("audio", sound(kind="OGG", subtype="VORBIS")),
    "layer 3.mp3": ("audio", sound(kind="MP3", subtype="MPEG_LAYER_III")),
    "page.txt": ("text", HTML),
    "zeros.txt": ("text", bytes(9)),
    "marked.txt": ("text", "\ufeffgood day".encode()),
    "long.txt": ("text", b"good day " * 100_000),
}
"""Odd, and predicted all the same."""

GOOD = {"image": picture("PNG"), "audio": sound(), "text": b"good day"}


def predict(models: Path, modality: str, bad: Path, capsys: Any) -> tuple[int, Any, list[str]]:
    """Exit code, the JSON object and standard error of ``bad`` before a good one."""
    good = models / f"good {modality}"
    good.write_bytes(GOOD[modality])
    code = main(["predict", str(models / modality), "--json", "--", str(bad), str(good)])
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["predictions"][-1]["file"] == str(good)
    assert printed.err.replace("\n", "").isprintable()
    return code, found, printed.err.splitlines()


@pytest.mark.parametrize("name", BAD)
def test_what_is_damaged_is_one_line_and_the_others_are_predicted(
    models: Path, tmp_path: Path, capsys: Any, name: str
) -> None:
    modality, content = BAD[name]
    (tmp_path / name).write_bytes(content)
    code, found, lines = predict(models, modality, tmp_path / name, capsys)
    assert code == 42
    assert len(found["predictions"]) == len(found["failed"]) == 1
    assert lines[1:] == ["cmkd: 1 of 2 could not be predicted, see above."]
    assert lines[0].startswith(f"{tmp_path}/")
    assert ": it " in lines[0]
    assert lines[0].endswith(".")


@pytest.mark.parametrize("name", FINE)
def test_what_is_odd_is_predicted(models: Path, tmp_path: Path, capsys: Any, name: str) -> None:
    modality, content = FINE[name]
    (tmp_path / name).write_bytes(content)
    code, found, lines = predict(models, modality, tmp_path / name, capsys)
    assert (code, lines) == (0, [])
    assert len(found["predictions"]) == 2


def gone(path: Path) -> None:
    """Nothing is there."""


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def circle(path: Path) -> None:
    path.symlink_to(path)


def bare_directory(path: Path) -> None:
    path.mkdir()
    (path / "notes.md").write_text("nothing to see")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


def behind_a_file(path: Path) -> None:
    path.parent.write_bytes(b"")


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("gone.png", gone, "No such file"),
        ("dangling.png", dangling, "No such file"),
        ("circle.png", circle, "symbolic links"),
        ("directory.png", bare_directory, "directory without png, jpg, jpeg or webp files"),
        ("pipe.png", pipe, "not a regular file"),
        ("endless.png", endless, "not a regular file"),
        ("sparse.png", sparse, "at most 256 MiB"),
        ("taken/inside.png", behind_a_file, "Not a directory"),
        (f"{'long' * 100}.png", gone, "File name too long"),
        ("sound.wav", gone, "one of audio; this model reads png, jpg, jpeg or webp files"),
        ("text.TXT", gone, "its name is one of text"),
    ],
)
def test_what_cannot_be_read_is_another_exit_code(
    models: Path,
    tmp_path: Path,
    capsys: Any,
    name: str,
    make: Callable[[Path], None],
    said: str,
) -> None:
    make(tmp_path / name)
    before = psutil.Process().memory_info().rss
    code, found, lines = predict(models, "image", tmp_path / name, capsys)
    assert code == 2
    assert len(found["predictions"]) == len(found["failed"]) == 1
    assert said in found["failed"][0]["error"]
    assert len(lines) == 2
    assert said in lines[0]
    assert psutil.Process().memory_info().rss < before + 100e6


def test_a_name_with_a_zero_byte_is_no_name(models: Path, capsys: Any) -> None:
    assert main(["predict", str(models / "image"), "a\0b.png"]) == 2
    assert "a\\x00b.png: no file can have this name." in capsys.readouterr().err


@pytest.mark.parametrize(("modality", "most"), [("text", 2**20), ("image", 2**28)])
def test_the_largest_file_that_is_read(
    models: Path, tmp_path: Path, capsys: Any, modality: str, most: int
) -> None:
    file = tmp_path / "large"
    with file.open("wb") as content:
        content.truncate(most + 1)
    assert main(["predict", str(models / modality), str(file)]) == 2
    assert f"at most {most // 2**20} MiB are read" in capsys.readouterr().err
    if modality == "text":
        file.write_bytes(b"a" * most)
        assert main(["predict", str(models / modality), str(file)]) == 0


def test_damage_outweighs_what_cannot_be_read(models: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "bad.png").write_bytes(b"no")
    words = [str(tmp_path / name) for name in ("gone.png", "bad.png", "gone too.png")]
    assert main(["predict", str(models / "image"), *words]) == 42
    assert "3 of 3 could not be predicted" in capsys.readouterr().err


def test_what_is_odd_in_a_directory_is_met_there(models: Path, tmp_path: Path, capsys: Any) -> None:
    inner = tmp_path / "root" / "inner"
    inner.mkdir(parents=True)
    pipe(inner / "a.png")
    circle(inner / "b.png")
    (inner / "c.png").write_bytes(GOOD["image"])
    assert main(["predict", str(models / "image"), str(tmp_path / "root"), "--jsonl"]) == 2
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(row["file"]).name for row in rows] == ["a.png", "b.png", "c.png"]
    assert "not a regular file" in rows[0]["error"]
    assert "symbolic links" in rows[1]["error"]
    assert "label" in rows[2]


def test_names_are_the_same_in_any_form(models: Path, tmp_path: Path, capsys: Any) -> None:
    """Other programs can read the JSON; people can tell which file it was."""
    name = tmp_path / "\udcff\n.png"
    name.write_bytes(GOOD["image"])
    assert main(["predict", str(models / "image"), "--json", str(name)]) == 0
    (row,) = json.loads(capsys.readouterr().out)["predictions"]
    assert row["file"] == f"{tmp_path}/\\xff\n.png"
    assert main(["predict", str(models / "image"), str(name)]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/\\xff\\n.png: ")
