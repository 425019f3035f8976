"""``.npy`` files: what numpy reads, and nothing that it would have to trust."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from cmkd_scale.data.array import read_array

MOST = 10_000

DTYPES = (
    hnp.boolean_dtypes()
    | hnp.integer_dtypes(endianness="?")
    | hnp.unsigned_integer_dtypes(endianness="?")
    | hnp.floating_dtypes(endianness="?", sizes=(16, 32, 64))
)
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
ARRAYS = hnp.arrays(DTYPES, SHAPES)


def npy(array: object, version: tuple[int, int] | None = None) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asanyarray(array), version=version)
    return buffer.getvalue()


def by_numpy(content: bytes) -> NDArray[np.generic]:
    loaded: NDArray[np.generic] = np.load(io.BytesIO(content), allow_pickle=False)
    return loaded


def stated(header: str, payload: bytes = b"") -> bytes:
    """A file with a header of one's own."""
    line = header.encode("latin1") + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(line)) + line + payload


def header(descr: str = "<f4", order: str = "False", shape: str = "(2,)") -> str:
    return f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}"


def assert_equal(found: NDArray[np.generic], expected: NDArray[np.generic]) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


@given(array=ARRAYS, fortran=st.booleans(), version=st.sampled_from([(1, 0), (2, 0), (3, 0)]))
@pytest.mark.filterwarnings("ignore:Stored array in format:UserWarning")
def test_arrays_are_read_as_numpy_reads_them(
    array: NDArray[np.generic], fortran: bool, version: tuple[int, int]
) -> None:
    content = npy(array.copy(order="F") if fortran else array, version)
    assert_equal(read_array(content, MOST), by_numpy(content))
    assert_equal(read_array(content, MOST), array)


def test_real_files_of_numpy_are_read() -> None:
    for array in (np.eye(3), np.arange(6).reshape(2, 3).T, np.float32(3.5), np.zeros((0, 4))):
        buffer = io.BytesIO()
        np.save(buffer, array)
        assert_equal(read_array(buffer.getvalue(), MOST), np.asarray(array))


@pytest.mark.parametrize(
    "array",
    [
        np.array([{"a": 1}, None], dtype=object),
        np.array([(1, 2.0)], dtype=[("a", "<i4"), ("b", "<f4")]),
        np.array([1 + 2j]),
        np.array(["text"]),
        np.array([b"bytes"]),
        np.array(["2020-01-01"], dtype="M8[D]"),
        np.zeros(2, dtype="V8"),
    ],
    ids=["object", "structured", "complex", "text", "bytes", "date", "void"],
)
def test_anything_but_plain_numbers_is_refused(array: NDArray[np.generic]) -> None:
    with pytest.raises(ValueError, match="something else than plain numbers"):
        read_array(npy(array), MOST)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"not an \.npy file"),
        (b"\x93NUMPY\x01\x00", r"not an \.npy file"),
        (b"\x80\x04N.", r"not an \.npy file"),  # a pickle
        (b"PK\x03\x04" + bytes(40), r"not an \.npy file"),  # an .npz file
        (npy(np.zeros(3))[:-1], "another length"),
        (npy(np.zeros(3)) + b"\0", "another length"),
        (npy(np.zeros(3))[:60], "impossible header"),
        (b"\x93NUMPY\x01\x00\xff\xff" + bytes(70_000), "impossible header"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(70_000), "impossible header"),
        (b"\x93NUMPY\x01\x00\x00\x00" + bytes(8), "plain numbers"),
        (b"\x93NUMPY\x04\x00" + npy(np.zeros(3))[8:], "unknown version"),
        (b"\x93NUMPY\x01\x01" + npy(np.zeros(3))[8:], "unknown version"),
    ],
)
def test_what_is_no_array_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_array(content, MOST)


@pytest.mark.parametrize(
    "text",
    [
        header(descr="|O"),
        header(descr="<f3", shape="(0,)"),
        header(descr="<u99", shape="(0,)"),
        header(descr="<c8"),
        header(shape="(00)"),
        header(shape="(0)"),
        header(shape="(01, 0)"),
        header(shape="(-2,)"),
        header(shape="(2.0,)"),
        header(shape="(True, True)"),
        header(shape="(999999999999, 999999999999, 0)"),
        header(shape="(" + "1, " * 20 + "2)") + " # more",
        header(order="1"),
        header() + "+[]",
        header() * 2,
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), 'descr': '|O', }",
        "__import__('os').abort()",
        "",
    ],
)
def test_other_headers_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"npy file|reshape"):
        read_array(stated(text, bytes(8)), MOST)


@pytest.mark.parametrize(
    "shape", ["(10001,)", "(101, 100)", "(999999999999,)", "(" + "999999999999, " * 200 + "2)"]
)
def test_more_numbers_than_are_read_are_refused_before_they_are_made(shape: str) -> None:
    with pytest.raises(ValueError, match="more than the 10000 numbers"):
        read_array(stated(header(shape=shape)), MOST)


def test_too_many_axes_are_refused() -> None:
    text = header(shape="(" + "1, " * 65 + "1)")
    with pytest.raises(ValueError, match="dimension"):
        read_array(stated(text, bytes(4)), MOST)


@settings(max_examples=400)
@given(
    array=ARRAYS,
    flips=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), max_size=3),
    cut=st.none() | st.integers(0, 300),
)
@example(array=np.zeros((11, 0), np.float32), flips=[(61, ord("0"))], cut=None)
@example(array=np.zeros(0, np.float32), flips=[(62, ord("0"))], cut=None)
def test_damaged_files_are_refused_or_read_as_numpy_reads_them(
    array: NDArray[np.generic], flips: list[tuple[int, int]], cut: int | None
) -> None:
    content = bytearray(npy(array))
    for place, value in flips:
        content[place % len(content)] = value
    try:
        found = read_array(bytes(content[:cut]), MOST)
    except ValueError:
        return
    assert_equal(found, by_numpy(bytes(content[:cut])))


@settings(max_examples=200)
@given(
    descr=st.from_regex(r"[<>|=][biufcOSUV][0-9]{0,2}", fullmatch=True),
    shape=st.from_regex(r"\(([0-9]{1,2}(, ?[0-9]{1,2}){0,2},? ?)?\)", fullmatch=True),
    size=st.integers(0, 64),
)
def test_headers_are_refused_or_read_as_numpy_reads_them(descr: str, shape: str, size: int) -> None:
    content = stated(header(descr=descr, shape=shape), bytes(size))
    try:
        found = read_array(content, MOST)
    except ValueError:
        return
    assert_equal(found, by_numpy(content))


@given(content=st.binary(max_size=200))
def test_any_bytes_raise_only_value_errors(content: bytes) -> None:
    for start in (b"", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x02\x00"):
        with pytest.raises(ValueError, match=r"npy file"):
            read_array(start + content, MOST)
