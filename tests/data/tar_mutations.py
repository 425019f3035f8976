"""Damage for the fuzz: tars whose headers lie, with checksums that are right."""

from __future__ import annotations

import random

Files = dict[str, bytes]
"""Of a split, by name; a file that is not there is missing."""

BLOCK = 512


def pick(rng: random.Random, files: Files, ending: str = "") -> str:
    """One of the files that are there."""
    return rng.choice(sorted(name for name in files if name.endswith(ending)))


def base256(number: int) -> bytes:
    """A size field as GNU tar writes what octal digits cannot hold."""
    mark = b"\x80" if number >= 0 else b"\xff"
    return mark + (number % 2**88).to_bytes(11, "big")


_FIELDS: dict[str, tuple[int, int, list[bytes]]] = {
    "name": (
        *(0, 100),
        [
            *(b"../x.txt", b"a/../../x.txt", b"/etc/x.txt", b"a\0b.txt", b"\xff\xfe.txt", b"\0"),
            *(b"x.pickle", b"x.pyd", b"x.pkl", b"x.jpg.pkl", b"noending", b".txt", b"a\nb.txt"),
            *(b"a" * 100, b"pipe:cat x.txt", b"directory/"),
        ],
    ),
    "size": (
        *(124, 136),
        [
            *(b"%011o\0" % size for size in (0, 1, BLOCK + 1, 10**6, 8**11 - 1)),
            *map(base256, (2**40, 2**62, 2**63, 2**80, -1, -BLOCK, -3 * BLOCK, -(2**40))),
            *(b"garbage\0", b" " * 12, b"-0000000777\0"),
        ],
    ),
    "kind": (156, 157, [bytes([kind]) for kind in b"\x001234567LKxgSVDMNXZ"]),
    "link": (157, 257, [b"/etc/passwd", b"../../x"]),
    "prefix": (345, 500, [b"..", b"/", b"a" * 155, b"\xff"]),
}


def headers(tar: bytes) -> list[int]:
    """Where the headers of members lie."""
    starts = range(0, len(tar) - BLOCK + 1, BLOCK)
    return [start for start in starts if tar[start + 257 : start + 262] == b"ustar"] or [0]


def header(block: bytes, field: str, value: bytes) -> bytes:
    """A header with another value and a checksum that is right."""
    begin, end, _ = _FIELDS[field]
    changed = bytearray(block.ljust(BLOCK, b"\0"))
    changed[begin:end] = value.ljust(end - begin, b"\0")
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed)
    return bytes(changed)


def change_header(rng: random.Random, files: Files) -> None:
    name = pick(rng, files, ".tar")
    tar = files[name]
    start = rng.choice(headers(tar))
    block = tar[start : start + BLOCK]
    for field in rng.sample(sorted(_FIELDS), rng.choice([1, 1, 2])):
        block = header(block, field, rng.choice(_FIELDS[field][2]))
    files[name] = tar[:start] + block + tar[start + BLOCK :]


def pax_record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    length += len(str(length + len(str(length))))
    return b"%d %s=%s\n" % (length, key, value)


_RECORDS = [
    *((b"path", path) for path in (b"../x.txt", b"/x.txt", b"\xff.txt", b"", b"a\nb.txt", b"x.py")),
    *((b"size", size) for size in (b"-512", b"-1536", b"0", b"9" * 30, b"9" * 5000, b"1e5")),
    *((b"GNU.sparse.map", sparse) for sparse in (b"0,1", b"0,x", b"1,2,3")),
    *((b"GNU.sparse.size", size) for size in (b"9", b"x")),
    *((b"GNU.sparse.realsize", b"-1"), (b"GNU.sparse.name", b"../x.txt")),
    *((b"linkpath", b"/etc/passwd"), (b"hdrcharset", b"rot13"), (b"mtime", b"nan")),
]


def add_header(rng: random.Random, files: Files) -> None:
    """Put an extended header in front of a member, or a chain of them."""
    name = pick(rng, files, ".tar")
    tar = files[name]
    start = rng.choice(headers(tar))
    block = header(tar[start : start + BLOCK], "kind", rng.choice([b"x", b"g", b"L", b"K"]))
    record = pax_record(*rng.choice(_RECORDS)) if rng.random() < 0.8 else rng.randbytes(20)
    extended = header(block, "size", b"%011o\0" % len(record))
    extended += record.ljust(-(-len(record) // BLOCK) * BLOCK, b"\0")
    if rng.random() < 0.1:
        extended = 500 * header(block, "size", b"0" * 11)
    files[name] = tar[:start] + extended + tar[start:]


def change_payload(rng: random.Random, files: Files) -> None:
    """Other content of the same length, behind a header that still fits it."""
    name = pick(rng, files, ".tar")
    tar = files[name]
    start = rng.choice(headers(tar)) + BLOCK
    digits = tar[start - BLOCK + 124 : start - BLOCK + 135]
    size = int(digits, 8) if digits.strip().isdigit() and b"8" not in digits else BLOCK
    payload = rng.randbytes(len(tar[start : start + min(size, BLOCK)]))
    files[name] = tar[:start] + payload + tar[start + len(payload) :]
