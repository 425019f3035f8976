"""Files of a published data set: find them, name them, share them out, read them unchanged."""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from cmkd_scale.errors import IntegrityError, UsageError

MODALITY_OF = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp"), "image"),
    **dict.fromkeys(("wav", "flac"), "audio"),
    "txt": "text",
    "npy": "features",
}
"""File extension -> modality, of the files that are stored as they are."""

VALIDATION_SHARE = 0.1
TEST_SHARE = 0.1

_LONGEST_KEY = 90  # what the builder of shards takes
_SIGNATURES = {
    # A JPEG named .png is common in the wild and decodes all the same, so: any of the kind.
    "image": re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP", re.DOTALL),
    "audio": re.compile(rb"RIFF....WAVE|RF64....WAVE|RIFX....WAVE|fLaC", re.DOTALL),
}


def list_files(directory: Path, extensions: Collection[str]) -> list[str]:
    """Sorted relative names, with ``/``, of files at any depth with one of ``extensions``.

    Hidden files are left out (``._x.jpg`` of macOS is no picture). Linked directories are
    followed, as in torchvision.
    """
    found = []
    for where, directories, names in os.walk(directory, followlinks=True):
        directories[:] = [name for name in directories if not name.startswith(".")]
        prefix = Path(where).relative_to(directory).as_posix()
        found += [
            name if prefix == "." else f"{prefix}/{name}"
            for name in names
            if not name.startswith(".") and extension_of(name) in extensions
        ]
    return sorted(found)


def extension_of(name: str) -> str:
    """``a/b.JPG`` -> ``jpg``."""
    return PurePosixPath(name).suffix[1:].lower()


def inside(source: Path, name: str) -> bool:
    """Whether ``name``, out of a table, is relative and leads to nothing outside ``source``."""
    path = PurePosixPath(name)
    if not name or "\0" in name or "\\" in name or path.is_absolute() or ".." in path.parts:
        return False
    try:
        return (source / name).resolve().is_relative_to(source.resolve())
    except (OSError, RuntimeError):  # links in a circle
        return False


def hash_share(name: str) -> float:
    """A number in 0 .. 1 decided by ``name`` alone: other files coming or going change nothing."""
    return (
        int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:6]) / 2**48
    )


def split_by_hash(name: str) -> str:
    """``test``, ``validation`` or ``train``, by the shares of this module."""
    share = hash_share(name)
    if share >= 1 - TEST_SHARE:
        return "test"
    return carve_validation(name)


def carve_validation(name: str) -> str:
    """``validation`` or ``train``, where only the test split is published."""
    return "validation" if hash_share(name) < VALIDATION_SHARE else "train"


def make_keys(names: Sequence[str]) -> list[str]:
    """A key of the allowed letters for each of the unique ``names``, close to it.

    The extension of a media file is left out. Names that would get the same key, or one that
    is too long, get a short digest appended.
    """
    stems = [
        name.rpartition(".")[0] if extension_of(name) in MODALITY_OF else name for name in names
    ]
    plain = [re.sub(r"[^A-Za-z0-9_-]+", "-", stem) for stem in stems]
    counts = Counter(plain)
    return [
        key if counts[key] == 1 and len(key) <= _LONGEST_KEY else f"{key[:77]}-{_digest(name)}"
        for key, name in zip(plain, names, strict=True)
    ]


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:12]


def read_table(path: Path, published: str) -> str:
    """The text of an annotation file.

    Raises:
        UsageError: it is missing or not UTF-8; ``published`` says where to get it.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read ({error.strerror}). It comes with the data set, {published}."
        ) from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not text in UTF-8 ({error}). Save it as UTF-8.") from None


def read_stored(path: Path) -> tuple[str, bytes]:
    """Extension without its dot, in lower case, and the unchanged bytes of a media file.

    Raises:
        IntegrityError: the file cannot be read or is not at all what its extension says.
    """
    extension = extension_of(path.name)
    try:
        content = path.read_bytes()
        _check(MODALITY_OF[extension], content)
    except (OSError, ValueError) as error:
        raise IntegrityError(
            f"{path} cannot be used: {error}. Download it again, or remove it."
        ) from None
    return ("jpg" if extension == "jpeg" else extension), content


def _check(modality: str, content: bytes) -> None:
    """Refuse with ``ValueError`` what no decoder will take, without decoding it."""
    if not content:
        raise ValueError("it is empty")
    if content.startswith(b"version https://git-lfs"):
        raise ValueError("it is a pointer of Git LFS, not the file itself (run `git lfs pull`)")
    if modality in _SIGNATURES and not _SIGNATURES[modality].match(content):
        raise ValueError(f"it does not begin as a file of {modality} does")
    if modality == "text":
        content.decode()
    if modality == "features":
        _check_array(content)


def _check_array(content: bytes) -> None:
    """Look at the header only: an array of objects would have to be unpickled."""
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    if dtype.hasobject:
        raise ValueError("it is an array of Python objects; save it as an array of numbers")
    expected, held = math.prod(shape) * dtype.itemsize, len(content) - stream.tell()
    if expected != held:
        raise ValueError(f"its numbers take {held} bytes instead of {expected}")
