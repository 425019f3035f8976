"""``.npy`` files in memory: read without pickle, and without trust."""

from __future__ import annotations

import functools
import re

import numpy as np
from numpy.typing import NDArray

_MAGIC = b"\x93NUMPY"
_LENGTH_BYTES = {b"\x01\x00": 2, b"\x02\x00": 4, b"\x03\x00": 4}
"""How many bytes say the length of the header, by version of the format."""

_LONGEST_HEADER = 4096  # bytes
_SIZE = rb"(?:0|[1-9]\d{0,11})"
_HEADER = re.compile(
    rb"\{'descr': '([<>|][biuf]\d{1,2})', 'fortran_order': (False|True), "
    rb"'shape': \(((?:%s, ?)+%s|%s,|)\), ?\} *\n" % (_SIZE, _SIZE, _SIZE)
)
"""What ``numpy.save`` writes for an array of numbers; nothing in it is evaluated."""


def read_array(content: bytes, max_elements: int) -> NDArray[np.generic]:
    """The array in an ``.npy`` file: booleans, integers or floating-point numbers.

    ``numpy.load`` takes ten times as long for a small array, most of it to evaluate the header
    as Python.

    Args:
        content: of the file.
        max_elements: larger arrays are refused.

    Raises:
        ValueError: it is no such file; says what is wrong.
    """
    if content[:6] != _MAGIC or len(content) < 12:
        raise ValueError("not an .npy file")
    width = _LENGTH_BYTES.get(content[6:8])
    if width is None:
        raise ValueError("an .npy file of an unknown version")
    begin = 8 + width
    length = int.from_bytes(content[8:begin], "little")
    if length > _LONGEST_HEADER or begin + length > len(content):
        raise ValueError("an .npy file with an impossible header")
    dtype, fortran, shape, count = _parse(content[begin : begin + length])
    if count > max_elements:
        raise ValueError(f"an array of more than the {max_elements} numbers that are read")
    if len(content) - begin - length != count * dtype.itemsize:
        raise ValueError("an .npy file of another length than its header says")
    array = np.frombuffer(content, dtype, offset=begin + length) if count else np.empty(0, dtype)
    return array.reshape(shape, order="F" if fortran else "C")


@functools.lru_cache(maxsize=1024)  # the arrays of a data set have few different headers
def _parse(header: bytes) -> tuple[np.dtype[np.generic], bool, tuple[int, ...], int]:
    match = _HEADER.fullmatch(header)
    if match is None:
        raise ValueError("an .npy file of something else than plain numbers")
    try:
        dtype = np.dtype(match[1].decode())
    except TypeError:
        raise ValueError(f"an .npy file of unknown type {match[1].decode()}") from None
    shape = tuple(int(size) for size in match[3].replace(b" ", b"").split(b",") if size)
    count = 1
    for size in shape:
        count *= size
    return dtype, match[2] == b"True", shape, count
