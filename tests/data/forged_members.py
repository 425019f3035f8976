"""Members that digests cannot tell from data: bombs, pickles, files of another kind."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import soundfile
from PIL import Image

PICKLE = b"cposix\nsystem\n(S'touch unpickled'\ntR."
"""Whoever unpickles it makes a file in the working directory."""

_ZIPPED = zlib.compress(bytes(20_000_000), 9)


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def _png(width: int, height: int, extra: bytes = b"") -> bytes:
    """A grey PNG that holds 8 x 8 pixels at most."""
    about = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = _chunk(b"IDAT", zlib.compress(bytes(8 * 9)))
    parts = [_chunk(b"IHDR", about), extra, data, _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _jpeg(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    content = buffer.getvalue()
    size = content.index(b"\xff\xc0") + 5
    return content[:size] + struct.pack(">HH", height, width) + content[size + 4 :]


def _webp(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "WEBP")
    content = buffer.getvalue()
    size = content.index(b"\x9d\x01\x2a") + 3
    return content[:size] + struct.pack("<HH", width, height) + content[size + 4 :]


def _gif() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "GIF")
    return buffer.getvalue()


def _sound(kind: str, subtype: str | None = None, value: float = 0.1) -> bytes:
    buffer = io.BytesIO()
    samples = np.full(400, value, dtype=np.float32)
    soundfile.write(buffer, samples, 8000, format=kind, subtype=subtype)
    return buffer.getvalue()


def _flac(rate: int, channels: int, frames: int) -> bytes:
    """A FLAC whose first block claims these."""
    content = _sound("FLAC")
    claims = int.from_bytes(content[18:26], "big")
    width = claims >> 36 & 31  # bits of a sample, less one
    claims = rate << 44 | channels - 1 << 41 | width << 36 | frames
    return content[:18] + claims.to_bytes(8, "big") + content[26:]


def _npy(descr: str, shape: str, body: bytes = b"") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body


FORGED: dict[str, dict[str, tuple[str, bytes]]] = {
    "text": {
        "nothing": ("txt", b""),
        "white space": ("txt", b" \n\t" * 1000),
        "bytes": ("txt", b"\xff\xfe\x00" * 100),
    },
    "image": {
        "png of 3.6 gigapixels": ("png", _png(60_000, 60_000)),
        "png of all pixels there are": ("png", _png(2**31 - 1, 2**31 - 1)),
        "png without pixels": ("png", _png(0, 5)),
        "png with less than it claims": ("png", _png(5000, 5000)),
        "png with a bomb of text": ("png", _png(8, 8, _chunk(b"zTXt", b"a\0\0" + _ZIPPED))),
        "png with a bomb of colours": ("png", _png(8, 8, _chunk(b"iCCP", b"a\0\0" + _ZIPPED))),
        "jpeg of 4 gigapixels": ("jpg", _jpeg(65_535, 65_535)),
        "jpeg without pixels": ("jpg", _jpeg(0, 16)),
        "webp of 268 megapixels": ("webp", _webp(16_383, 16_383)),
        "gif": ("png", _gif()),
        "pickle": ("png", PICKLE),
        "nothing": ("jpg", b""),
        "start of a jpeg": ("jpg", _jpeg(16, 16)[:200]),
    },
    "audio": {
        "flac of days": ("flac", _flac(8000, 1, 2**36 - 1)),
        "flac of a gigabyte in a minute": ("flac", _flac(655_350, 8, 39_000_000)),
        "flac that ends early": ("flac", _sound("FLAC")[:60]),
        "wav of numbers that are none": ("wav", _sound("WAV", "FLOAT", float("nan"))),
        "wav without a rate": ("wav", _sound("WAV").replace(struct.pack("<I", 8000), bytes(4))),
        "start of a wav": ("wav", _sound("WAV")[:30]),
        "nothing": ("wav", b""),
        "pickle": ("flac", PICKLE),
    },
    "features": {
        "npy of terabytes": ("npy", _npy("'<f4'", "(999999999999, 8)")),
        "npy of no rows of any length": ("npy", _npy("'<f4'", "(0, 999999999999)")),
        "npy of 1,000 axes": ("npy", _npy("'<f4'", f"({'1, ' * 1000})", bytes(4))),
        "npy of objects": ("npy", _npy("'|O'", "(8,)", PICKLE)),
        "npy of records": ("npy", _npy("[('a', '<f4')]", "(8,)", bytes(32))),
        "npy with a program": ("npy", _npy("__import__('os').system('touch unpickled')", "(8,)")),
        "npy of another width": ("npy", _npy("'<f4'", "(9,)", bytes(36))),
        "npy of infinities": ("npy", _npy("'<f4'", "(8,)", struct.pack("<8f", *[np.inf] * 8))),
        "npy cut short": ("npy", _npy("'<f4'", "(8,)", bytes(31))),
        "npz": ("npy", b"PK\x03\x04" + bytes(100)),
        "pickle": ("npy", PICKLE),
    },
}
"""Name of a forgery to extension and content, by modality."""
