"""Writes the safetensors format from tensors where they lie, hashing on the way.

The library's own writer copies each tensor into an object of Python while it holds the
interpreter's lock, so that a checkpoint that is written beside training would stop it. The
format is a JSON header and the tensors' bytes (github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHUNK = 8 * 2**20  # bytes that are hashed and written at a time, without the lock


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write and sync a file.

    Args:
        path: of the file.
        tensors: by name, contiguous and on the CPU.

    Returns:
        The SHA-256 of its bytes.

    Raises:
        OSError: it cannot be written.
    """
    hasher = hashlib.sha256()
    # Wide types first, so that each tensor is aligned to its own width.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    with path.open("wb", buffering=0) as file:
        for piece in (_header(ordered), *(_bytes(value) for _, value in ordered)):
            for begin in range(0, len(piece), _CHUNK):
                chunk = piece[begin : begin + _CHUNK]
                hasher.update(chunk)
                _write_all(file.fileno(), chunk)
        os.fsync(file.fileno())
    return hasher.hexdigest()


def _header(ordered: list[tuple[str, Tensor]]) -> memoryview:
    end, entries = 0, {}
    for name, value in ordered:
        begin, end = end, end + value.numel() * value.element_size()
        entries[name] = {
            "dtype": _NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return memoryview(len(text).to_bytes(8, "little") + text)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _write_all(handle: int, chunk: memoryview) -> None:
    while len(chunk):
        chunk = chunk[os.write(handle, chunk) :]
