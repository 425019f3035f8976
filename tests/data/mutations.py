"""Damage for the fuzz: changes to the files of a split, each decided by a random generator.

A split is a mapping from file name to content. A change alters the mapping in place; a file
that it leaves out is missing. ``restate`` makes all digests right again, as a forger would.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from typing import Any

from cmkd_scale.data.manifest import MANIFEST, manifest_digest
from tests.data.tar_mutations import (
    BLOCK,
    Files,
    add_header,
    change_header,
    change_payload,
    pick,
)

Change = Callable[[random.Random, Files], None]

# ----------------------------------------------------------------------------- any file


def change_bytes(rng: random.Random, files: Files) -> None:
    """Flip, insert, delete, zero or repeat bytes."""
    name = pick(rng, files)
    content = bytearray(files[name])
    at = rng.randrange(len(content) + 1)
    end = at + rng.choice([1, 1, 2, 7, 64, BLOCK, 2000])
    match rng.randrange(6):
        case 0:
            content[at:end] = bytes(byte ^ 1 << rng.randrange(8) for byte in content[at:end])
        case 1:
            content[at:at] = rng.randbytes(end - at)
        case 2:
            del content[at:end]
        case 3:
            content[at:end] = bytes(len(content[at:end]))
        case 4:
            content[at:at] = content[at:end]
        case _:
            content[at:end] = rng.randbytes(len(content[at:end]))
    files[name] = bytes(content)


def change_length(rng: random.Random, files: Files) -> None:
    """Truncate, empty or extend."""
    name = pick(rng, files)
    content = files[name]
    files[name] = rng.choice(
        [
            content[: rng.randrange(len(content) + 1)],
            content[: -rng.choice([1, 8, BLOCK, 2 * BLOCK])],
            b"",
            content + bytes(rng.choice([1, BLOCK, 20 * BLOCK])),
            content + rng.randbytes(rng.choice([1, BLOCK])),
            2 * content,
        ]
    )


def lose_file(rng: random.Random, files: Files) -> None:
    del files[pick(rng, files)]


def swap_files(rng: random.Random, files: Files) -> None:
    """Two files change places, or one takes the place of both."""
    ending = rng.choice([".tar", ".safetensors", ""])
    one, other = pick(rng, files, ending), pick(rng, files, ending)
    if rng.random() < 0.5:
        files[one] = files[other]
    else:
        files[one], files[other] = files[other], files[one]


# ------------------------------------------------------------------- indexes, manifests

_WRONG: list[Any] = [
    *(None, True, -1, 0, 1, 2**31, 2**62, 2**63 - 1, 2**63, 10**300, 0.5, -0.0, float("nan")),
    *("", "x", "..", "../x.tar", "/etc/passwd", "pipe:cat x", "a/b.tar", "\n", "\x00", "é" * 999),
    *([], {}, [0], ["txt"], [0, 2**62], [8, 0], [[]], {"x": {}}, "I64", "U8", MANIFEST),
]


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place inside of parsed JSON."""
    if isinstance(value, dict):
        pairs = list(value.items())
    else:
        pairs = list(enumerate(value)) if isinstance(value, list) else []
    inner = [found for key, item in pairs for found in _paths(item, (*path, key))]
    return [path, *inner] if path else inner


def change_json(rng: random.Random, tree: Any) -> None:
    """Put something else, nothing, or a deep nest at a random place of parsed JSON."""
    *path, last = rng.choice(_paths(tree))
    parent = tree
    for key in path:
        parent = parent[key]
    match rng.randrange(8):
        case 0:
            del parent[last]
        case 1:
            nest: Any = 0
            for _ in range(rng.choice([3, 150])):
                nest = [nest]
            parent[last] = nest
        case 2 if isinstance(parent, list):
            parent.append(parent[last])
        case 3 if isinstance(parent[last], int):
            parent[last] += rng.choice([-1, 1, 8])
        case _:
            parent[last] = rng.choice(_WRONG)


def change_manifest(rng: random.Random, files: Files) -> None:
    text = files.get(MANIFEST, b"{}")
    try:
        tree = json.loads(text)
        change_json(rng, tree)
        text = json.dumps(tree, indent=1).encode()
    except (ValueError, IndexError, RecursionError):  # an earlier change has broken it
        text += b" "
    if rng.random() < 0.1:
        text = rng.choice(
            [
                b"[" * 10**5,
                text.replace(b'"options": ', b'"options": ' + b'{"a":' * 10**4),
                text.replace(b'"name"', b'"name": 1, "name"'),
                text.replace(b'"samples": ', b'"samples": 0, "samples": '),
                text.replace(b'"samples": ', b'"samples": ' + b"9" * 5000),
            ]
        )
    files[MANIFEST] = text


def change_index(rng: random.Random, files: Files) -> None:
    """Another header of a sample index, or other numbers behind it."""
    name = pick(rng, files, ".safetensors")
    content = files[name]
    length = int.from_bytes(content[:8], "little")
    try:
        tree = json.loads(content[8 : 8 + length])
        about = json.loads(tree["__metadata__"]["cmkd"])
        change_json(rng, about if rng.random() < 0.3 else tree)
        if isinstance(tree.get("__metadata__"), dict):
            tree["__metadata__"]["cmkd"] = json.dumps(about)
        text = json.dumps(tree).encode()
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        text = b"[" * 60_000
    numbers = bytearray(content[8 + length :])
    if rng.random() < 0.5 and len(numbers) >= 8:
        at = rng.randrange(len(numbers) // 8) * 8
        value = rng.choice([-1, -2, 0, 1, BLOCK, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63)])
        numbers[at : at + 8] = value.to_bytes(8, "little", signed=True)
        text = content[8 : 8 + length]
    stated = len(text) if rng.random() < 0.9 else rng.choice([0, 2**20, 2**63, 2**64 - 1])
    files[name] = stated.to_bytes(8, "little") + text + bytes(numbers)


CHANGES: list[Change] = [
    *(change_bytes, change_length, lose_file, swap_files),
    *(change_header, add_header, change_payload, change_index, change_manifest),
]
FORGERIES: list[Change] = [change_header, add_header, change_payload, change_index, change_manifest]


def damaged(rng: random.Random, pristine: Files, changes: list[Change]) -> tuple[Files, str]:
    """A copy with one to three changes, and their names; a copy always has a file of each kind."""
    files, names = dict(pristine), []
    for change in rng.choices(changes, k=rng.choice([1, 1, 2, 3])):
        names.append(change.__name__)
        change(rng, files)
    return files, ", ".join(names)


def restate(files: Files) -> None:
    """Make sizes and digests in a manifest those of the files, and its own digest right."""
    try:
        tree = json.loads(files[MANIFEST])
        for shard in tree["shardlist"]:
            if (tar := files.get(shard["url"])) is not None and shard["url"].endswith(".tar"):
                shard["filesize"], shard["sha256"] = len(tar), hashlib.sha256(tar).hexdigest()
            if (index := files.get(shard["index"])) is not None:
                shard["index_sha256"] = hashlib.sha256(index).hexdigest()
        tree["cmkd"]["digest"] = manifest_digest(tree)
        files[MANIFEST] = json.dumps(tree, indent=1).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return  # not even a forger can make this right
