"""Where samples lie in a tar: what may be in one, and the file that says it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from cmkd_scale.data.sample_index import (
    MEMBER_TYPES,
    SampleIndex,
    index_bytes,
    is_known,
    read_index,
)
from cmkd_scale.data.shards import UNREADABLE
from cmkd_scale.data.tar_walk import index_open_tar, index_tar
from cmkd_scale.errors import IntegrityError
from cmkd_scale.records import UNLABELLED

SAMPLES = {
    "a": {"cls": b"2", "txt": b"first", "json": b"{}"},
    "sub/b": {"000.jpg": b"frame 0", "001.jpg": b"", "cls": b"0"},
    "ünï": {"txt": "zwölf".encode()},
}


def tar_of(
    members: Mapping[str, bytes] | list[tuple[str, bytes]],
    kind: int = tarfile.PAX_FORMAT,
    **header: object,
) -> bytes:
    """A tar with these members; ``header`` sets attributes of the last one."""
    buffer = io.BytesIO()
    pairs = list(members.items() if isinstance(members, Mapping) else members)
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for number, (name, content) in enumerate(pairs, start=1):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if number == len(pairs):
                for key, value in header.items():
                    setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def names_of(samples: Mapping[str, Mapping[str, bytes]]) -> dict[str, bytes]:
    return {
        f"{key}.{extension}": content
        for key, members in samples.items()
        for extension, content in members.items()
    }


@contextlib.contextmanager
def descriptor(path: Path, content: bytes) -> Iterator[int]:
    path.unlink(missing_ok=True)  # what is mapped into memory must not become shorter
    path.write_bytes(content)
    file = os.open(path, os.O_RDONLY)
    try:
        yield file
    finally:
        os.close(file)


def index_of(tmp_path: Path, content: bytes) -> SampleIndex:
    path = tmp_path / "shard.tar"
    path.write_bytes(content)
    return index_tar(path)


def read(tmp_path: Path, content: bytes, sha256: str | None = None) -> SampleIndex:
    with descriptor(tmp_path / "index.safetensors", content) as file:
        return read_index(file, sha256=sha256)


# -------------------------------------------------------------------------------- the walk


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_index_leads_to_every_member_and_its_checksum(tmp_path: Path, kind: int) -> None:
    content = tar_of(names_of(SAMPLES), kind)
    index = index_of(tmp_path, content)
    assert list(index.keys()) == list(SAMPLES)
    assert index.labels.tolist() == [2, 0, UNLABELLED]
    assert index.extensions == ("000.jpg", "001.jpg", "cls", "json", "txt")
    for row, members in enumerate(SAMPLES.values()):
        found = {}
        for column, extension in enumerate(index.extensions):
            offset, size = int(index.offset[row, column]), int(index.size[row, column])
            if size >= 0:
                found[extension] = content[offset : offset + size]
                assert index.crc32[row, column] == zlib.crc32(found[extension])
            else:
                assert (offset, size, index.crc32[row, column]) == (-1, -1, 0)
        assert found == members


def test_long_names_and_directories_are_no_samples(tmp_path: Path) -> None:
    long = "d/" * 60 + "k" * 150
    content = tar_of({f"{long}.txt": b"1", f"{long}.cls": b"7"})
    buffer = io.BytesIO(content)
    with tarfile.open(fileobj=buffer, mode="a") as tar:
        folder = tarfile.TarInfo("folder.pyd")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    index = index_of(tmp_path, buffer.getvalue())
    assert list(index.keys()) == [long]
    assert index.labels.tolist() == [7]


def test_an_empty_tar_is_a_shard_of_no_samples(tmp_path: Path) -> None:
    index = index_of(tmp_path, tar_of({}))
    assert len(index) == 0
    assert read(tmp_path, index_bytes(index)) == index


def test_large_members_are_summed_in_parts(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes((1 << 20) + 17)
    index = index_of(tmp_path, tar_of({"a.npy": content}))
    assert index.crc32.tolist() == [[zlib.crc32(content)]]


@pytest.mark.parametrize("extension", [*sorted(MEMBER_TYPES), "000.jpg", "0.png", "12345.webp"])
def test_known_members_are_data(tmp_path: Path, extension: str) -> None:
    assert is_known(extension)
    index = index_of(tmp_path, tar_of({f"a.{extension}": b"3"}))
    assert index.extensions == (extension,)


@pytest.mark.parametrize(
    "extension",
    ["pyd", "pickle", "pkl", "pt", "pth", "exe", "JPG", "jpg.pyd", "x.jpg", "0.1.jpg", ".jpg", "7"],
)
def test_members_of_unknown_types_are_refused(tmp_path: Path, extension: str) -> None:
    assert not is_known(extension)
    with pytest.raises(IntegrityError, match=r"of an unknown type; members are cls, flac, .*wav"):
        index_of(tmp_path, tar_of({"a.txt": b"1", f"a.{extension}": b"1"}))


@pytest.mark.parametrize("name", ["../a.txt", "d/../a.txt", "/a.txt", "/etc/a.txt", "a/.."])
def test_names_that_point_out_of_the_shard_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(IntegrityError, match=r"points out of the shard|not named KEY"):
        index_of(tmp_path, tar_of({name: b"1"}))


@pytest.mark.parametrize("name", ["a", "d/a", ".txt", "d/.txt", "a."])
def test_names_without_key_or_extension_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(IntegrityError, match=r"not named KEY\.EXTENSION"):
        index_of(tmp_path, tar_of({name: b"1"}))


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE],
)
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    with pytest.raises(IntegrityError, match=r"'a\.txt' is a link or a device"):
        index_of(tmp_path, tar_of({"a.txt": b""}, type=kind, linkname="/etc/passwd"))


def test_sparse_members_are_refused(tmp_path: Path) -> None:
    pax = {"GNU.sparse.map": "0,1", "GNU.sparse.size": "4096"}
    with pytest.raises(IntegrityError, match="is a link or a device"):
        index_of(tmp_path, tar_of({"a.txt": b"1"}, pax_headers=pax))
    with pytest.raises(IntegrityError):
        index_of(tmp_path, tar_of({"a.txt": b""}, tarfile.GNU_FORMAT, type=tarfile.GNUTYPE_SPARSE))


def test_members_that_occur_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"'a\.txt' occurs twice"):
        index_of(tmp_path, tar_of([("a.txt", b"1"), ("a.cls", b"1"), ("a.txt", b"2")]))


@pytest.mark.parametrize(
    "label", [b"", b"-1", b"x", b"1.0", b"2147483648", b"1" * 21, b"1 2", "²".encode(), b"1\0"]
)
def test_labels_that_are_no_class_index_are_refused(tmp_path: Path, label: bytes) -> None:
    with pytest.raises(IntegrityError, match=r"a\.cls'.* class index"):
        index_of(tmp_path, tar_of({"a.cls": label}))


@pytest.mark.parametrize(("label", "expected"), [(b"0", 0), (b"007", 7), (b" 12\n", 12)])
def test_labels_are_integers_in_text(tmp_path: Path, label: bytes, expected: int) -> None:
    assert index_of(tmp_path, tar_of({"a.cls": label})).labels.tolist() == [expected]


@pytest.mark.parametrize("size", [-1, -512, -1024, -1536, -(2**40), 2**40, 2**62])
def test_impossible_sizes_are_refused(tmp_path: Path, size: int) -> None:
    content = bytearray(tar_of({"a.txt": b"1", "b.txt": b"2"}, tarfile.USTAR_FORMAT))
    header = content[1024:1536]
    header[124:136] = bytes([255 if size < 0 else 128]) + size.to_bytes(11, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    content[1024:1536] = header
    with pytest.raises(IntegrityError, match=r"shard\.tar"):
        index_of(tmp_path, bytes(content))


def test_a_shard_that_ends_inside_a_member_is_refused(tmp_path: Path) -> None:
    content = tar_of({"a.txt": b"x" * 2000})
    for length in (512, 513, 1024, 2511):
        with pytest.raises(IntegrityError, match=r"shard\.tar is not a readable WebDataset"):
            index_of(tmp_path, content[:length])


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="cannot be read"):
        index_tar(tmp_path / "nothing.tar")


@settings(max_examples=150)
@given(data=st.data())
def test_damaged_tars_raise_only_our_errors(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(tar_of(names_of(SAMPLES), data.draw(st.sampled_from([0, 1, 2]))))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 6000))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.tar"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with path.open("rb") as file, contextlib.suppress(IntegrityError):
        index = index_open_tar(file, "damaged.tar")
        assert read(tmp_path_factory.getbasetemp(), index_bytes(index)) == index


# -------------------------------------------------------------------------------- the file


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    return index_of(tmp_path_factory.mktemp("index"), tar_of(names_of(SAMPLES)))


def test_an_index_is_mapped_and_outlives_its_descriptor(tmp_path: Path, index: SampleIndex) -> None:
    content = index_bytes(index)
    found = read(tmp_path, content, hashlib.sha256(content).hexdigest())
    mapped = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith("index.safetensors")
    ]
    (tmp_path / "index.safetensors").unlink()
    assert found == index
    assert list(found.keys()) == list(SAMPLES)
    for name in ("offset", "size", "crc32", "labels", "key_bytes", "key_offset"):
        array = getattr(found, name)
        assert array.dtype == getattr(index, name).dtype
        assert not array.flags.writeable
        begin = array.__array_interface__["data"][0]
        assert any(first <= begin < last for first, last in mapped), "it was copied"


def test_the_file_is_what_safetensors_reads(index: SampleIndex) -> None:
    for name, array in load_safetensors(index_bytes(index)).items():
        np.testing.assert_array_equal(array, getattr(index, name))


def test_equal_indexes_give_equal_bytes(tmp_path: Path, index: SampleIndex) -> None:
    again = index_of(tmp_path, tar_of(names_of(SAMPLES)))
    assert again == index
    assert (
        index_bytes(again) == index_bytes(index) == index_bytes(read(tmp_path, index_bytes(index)))
    )
    other = index_of(tmp_path, tar_of(names_of({**SAMPLES, "a": {"txt": b"fjrst"}})))
    assert other != index
    assert index_bytes(other) != index_bytes(index)
    assert index != "something else"


def test_another_digest_is_refused(tmp_path: Path, index: SampleIndex) -> None:
    with pytest.raises(ValueError, match="SHA-256"):
        read(tmp_path, index_bytes(index), "00" * 32)


def restated(index: SampleIndex, **changes: object) -> bytes:
    """The file of an index, some of it changed, with a right header."""
    names = ("offset", "size", "crc32", "labels", "key_bytes", "key_offset")
    about = {"extensions": list(index.extensions), "format_version": 2}
    about.update({key: value for key, value in changes.items() if key in about})
    arrays = {name: np.array(changes.get(name, getattr(index, name))) for name in names}
    return save_safetensors(arrays, metadata={"cmkd": json.dumps(about)})


NO_KEYS = np.zeros(0, np.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 1}, "another version"),
        ({"format_version": 3}, "another version"),
        ({"extensions": ["000.jpg", "001.jpg", "cls", "json"]}, "other shapes"),
        ({"extensions": ["txt", "001.jpg", "cls", "json", "txt"]}, "other arrays"),
        ({"extensions": ["000.jpg", "001.jpg", "cls", "json", "pickle"]}, "unknown types"),
        ({"labels": np.array([2, 0, -2], np.int32)}, "impossible places or labels"),
        ({"labels": np.array([2, 0], np.int32)}, "other shapes"),
        ({"labels": np.array([2, 0, -1], np.int64)}, "other arrays"),
        ({"labels": np.array([[2, 0, -1]], np.int32)}, "other arrays"),
        ({"offset": np.full((3, 5), 9)}, "impossible places"),
        ({"size": np.full((3, 5), -1)}, "impossible places"),
        ({"crc32": np.zeros((3, 4), np.uint32)}, "other shapes"),
        ({"key_offset": np.array([0, 1, 6])}, "impossible keys"),
        ({"key_offset": np.array([0, 1, 1, 11])}, "impossible keys"),
        ({"key_offset": np.array([0, 6, 1, 11])}, "impossible keys"),
        ({"key_offset": np.array([1, 2, 6, 11])}, "impossible keys"),
        ({"key_offset": np.array([0, 1, 6, 10])}, "impossible keys"),
        ({"key_offset": np.array([0, 1, 7, 11])}, "impossible keys"),  # inside of a letter
        ({"key_bytes": NO_KEYS}, "impossible keys"),
        ({"key_bytes": np.full(11, 255, np.uint8)}, "decode"),
    ],
)
def test_indexes_that_contradict_themselves_are_refused(
    tmp_path: Path, index: SampleIndex, changes: dict[str, object], message: str
) -> None:
    assert read(tmp_path, restated(index)) == index
    with pytest.raises(ValueError, match=message):
        read(tmp_path, restated(index, **changes))


def test_keys_may_not_go_round_all_integers(tmp_path: Path) -> None:
    four = index_of(tmp_path, tar_of({f"{key}.txt": b"" for key in ("abc", "def", "gh", "ijk")}))
    limits = np.iinfo(np.int64)
    # Differences of neighbours are above 0 where they overflow.
    ends = np.array([0, limits.max, limits.min, -1, 11])
    with pytest.raises(ValueError, match="impossible keys"):
        read(tmp_path, restated(four, key_offset=ends))


def test_long_headers_are_refused(tmp_path: Path, index: SampleIndex) -> None:
    content = index_bytes(index)
    length = struct.unpack("<Q", content[:8])[0]
    header, payload = content[8 : 8 + length], content[8 + length :]
    assert read(tmp_path, header_of(header.ljust(1 << 16), payload)) == index
    with pytest.raises(ValueError, match="impossible length"):
        read(tmp_path, header_of(header.ljust((1 << 16) + 8), payload))


def header_of(text: str | bytes, payload: bytes = b"") -> bytes:
    encoded = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(encoded)) + encoded + payload


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        bytes(8),
        b"\xff" * 64,
        struct.pack("<Q", 1 << 20) + bytes(1 << 21),
        header_of("{}"),
        header_of("[]"),
        header_of("null"),
        header_of("[" * 60_000),
        header_of('{"__metadata__": {"cmkd": "[]"}}'),
        header_of('{"__metadata__": {"cmkd": "{}"}}'),
        header_of('{"__metadata__": 3}'),
        header_of(b"\xff{}"),
        header_of('{"__metadata__": {"cmkd": "' + "9" * 5000 + '"}}'),
    ],
)
def test_what_is_no_index_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UNREADABLE):
        read(tmp_path, content)


ENTRY = st.none() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=3)


@settings(max_examples=200)
@given(
    name=st.sampled_from(["offset", "size", "crc32", "labels", "key_bytes", "key_offset"]),
    entry=st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["I64", "U32", "I32", "U8", "F64"]) | ENTRY,
            "shape": st.lists(st.integers(-2, 20) | ENTRY, max_size=3) | st.integers(),
            "data_offsets": st.lists(st.integers(-8, 400) | ENTRY, max_size=3) | st.integers(),
        },
    ),
)
@example(name="labels", entry={"data_offsets": [0, 2**70]})
@example(name="labels", entry={"shape": [2**40, 2**40, 0]})
def test_forged_headers_raise_only_what_readers_expect(
    tmp_path_factory: pytest.TempPathFactory,
    index: SampleIndex,
    name: str,
    entry: dict[str, object],
) -> None:
    content = index_bytes(index)
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    header[name].update(entry)
    forged = header_of(json.dumps(header), content[8 + length :])
    with contextlib.suppress(*UNREADABLE):
        found = read(tmp_path_factory.getbasetemp(), forged)
        assert len(list(found.keys())) == len(found)


@settings(max_examples=300)
@given(
    flips=st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), max_size=4),
    cut=st.none() | st.integers(0, 10**4),
    more=st.binary(max_size=20),
)
def test_damaged_indexes_raise_only_what_readers_expect(
    tmp_path_factory: pytest.TempPathFactory,
    index: SampleIndex,
    flips: list[tuple[int, int]],
    cut: int | None,
    more: bytes,
) -> None:
    whole = index_bytes(index)
    content = bytearray(whole)
    for place, value in flips:
        content[place % len(content)] = value
    damaged = bytes(content[:cut]) + more
    with contextlib.suppress(*UNREADABLE):
        found = read(tmp_path_factory.getbasetemp(), damaged)
        assert len(list(found.keys())) == len(found)
    if damaged != whole:
        with pytest.raises(ValueError, match=r"SHA-256|too short"):
            read(tmp_path_factory.getbasetemp(), damaged, hashlib.sha256(whole).hexdigest())
