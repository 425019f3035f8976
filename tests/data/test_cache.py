"""The cache: only finished and right files, fetched once, within its limit."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmkd_scale.data.cache import Fetch, Partial, ShardCache
from cmkd_scale.errors import IntegrityError, UsageError

REPOSITORY = Path(__file__).resolve().parents[2]
LARGE = 1 << 30


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def fetch(content: bytes) -> Fetch:
    return lambda partial: partial.write(content[partial.size :])


def no_fetch(partial: Partial) -> None:
    raise AssertionError("fetched again")


@contextlib.contextmanager
def opened(
    cache: ShardCache, content: bytes, by: Fetch | None = None, *, sized: bool = True
) -> Iterator[int]:
    size = len(content) if sized else None
    descriptor = cache.open(
        digest(content), size=size, address="s3://bucket/x.tar", fetch=by or fetch(content)
    )
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def add(cache: ShardCache, content: bytes) -> None:
    with opened(cache, content) as descriptor:
        assert os.pread(descriptor, len(content) + 1, 0) == content


def names(cache: ShardCache) -> set[str]:
    return {path.name for path in cache.root.iterdir()}


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", LARGE)


HELD = """
import os, sys
from pathlib import Path
from cmkd_scale.data.cache import ShardCache
root, sha256 = sys.argv[1:]
def fetch(partial):
    partial.write(b"first half, ")
    wait()
def wait():
    print("ready", flush=True)
    sys.stdin.read()
ShardCache(Path(root), 1 << 30).open(sha256, size=None, address="here", fetch=fetch)
wait()
"""


@contextlib.contextmanager
def other_process(cache: ShardCache, content: bytes) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that has the file open, or is in the middle of fetching it."""
    command = [sys.executable, "-c", HELD, str(cache.root), digest(content)]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("content", [b"", b"x", bytes(range(256)) * 9000])
@pytest.mark.parametrize("sized", [True, False])
def test_a_file_is_fetched_once_and_then_read_from_the_cache(
    cache: ShardCache, content: bytes, sized: bool
) -> None:
    for by in (fetch(content), no_fetch):
        with opened(cache, content, by, sized=sized) as descriptor:
            assert os.pread(descriptor, len(content) + 1, 0) == content
            with pytest.raises(OSError, match="descriptor"):
                os.write(descriptor, b"x")
    assert names(cache) == {digest(content)}


@given(parts=st.lists(st.binary(max_size=40), max_size=6))
@settings(max_examples=30)
def test_an_interrupted_file_is_continued(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes]
) -> None:
    cache = ShardCache(tmp_path_factory.mktemp("cache"), LARGE)
    content = b"".join(parts)
    reached = 0
    for part in parts[:-1]:

        def interrupted(partial: Partial, part: bytes = part, reached: int = reached) -> None:
            assert partial.size == reached
            partial.write(part)
            raise IntegrityError("the network failed")

        with pytest.raises(IntegrityError), opened(cache, content, interrupted, sized=False):
            pass
        reached += len(part)
    add(cache, content)
    assert names(cache) == {digest(content)}


def test_a_cached_file_of_the_wrong_size_is_replaced(cache: ShardCache) -> None:
    add(cache, b"content")
    (cache.root / digest(b"content")).write_bytes(b"cont")
    add(cache, b"content")
    with opened(cache, b"content", no_fetch):
        pass


@pytest.mark.parametrize("stale", [b"garbage", b"garbage that is longer than the file"])
def test_a_damaged_partial_is_discarded(cache: ShardCache, stale: bytes) -> None:
    cache.root.mkdir()
    (cache.root / f"{digest(b'the content')}.part").write_bytes(stale)
    add(cache, b"the content")


def test_a_file_that_stays_wrong_is_an_error_and_is_not_kept(cache: ShardCache) -> None:
    calls = []

    def wrong(partial: Partial) -> None:
        calls.append(partial.size)
        partial.write(b"other")

    with pytest.raises(IntegrityError) as error, opened(cache, b"right", wrong):
        pass
    assert calls == [0, 0, 0]
    assert "s3://bucket/x.tar: the server's file is not what the manifest states" in str(
        error.value
    )
    assert digest(b"other") in str(error.value)
    assert names(cache) == set()


def test_threads_that_want_the_same_file_fetch_it_once(cache: ShardCache) -> None:
    calls = []
    start = threading.Barrier(8)

    def counted(partial: Partial) -> None:
        calls.append(1)
        partial.write(b"shared")

    def want(_: int) -> bytes:
        start.wait()
        with opened(cache, b"shared", counted) as descriptor:
            return os.pread(descriptor, 100, 0)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(want, range(8))) == [b"shared"] * 8
    assert calls == [1]


def test_what_a_killed_process_fetched_is_continued_by_one_that_waits(cache: ShardCache) -> None:
    content = b"first half, second half"
    reached = []

    def rest(partial: Partial) -> None:
        reached.append(partial.size)
        partial.write(content[partial.size :])

    def wait_for_it() -> bytes:
        with opened(cache, content, rest) as descriptor:
            return os.pread(descriptor, 100, 0)

    with other_process(cache, content) as process, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait_for_it)
        assert reached == []
        process.send_signal(signal.SIGKILL)
        assert waiting.result() == content
    assert reached == [len("first half, ")]
    assert names(cache) == {digest(content)}


def age(cache: ShardCache, *names: str) -> None:
    """Last used in this order, long ago."""
    for time, name in enumerate(names):
        os.utime(cache.root / name, (time, time))


def test_least_recently_used_files_make_room(cache: ShardCache) -> None:
    a, b, c = b"a" * 10, b"b" * 10, b"c" * 10
    for content in (a, b):
        add(cache, content)
    age(cache, digest(a), digest(b))
    with opened(cache, a, no_fetch):  # used again: b is now the older one
        pass
    (cache.root / "notes.txt").write_text("not ours, and not counted")
    add(ShardCache(cache.root, 25), c)
    assert names(cache) == {digest(a), digest(c), "notes.txt"}


def test_room_is_made_before_a_file_is_fetched(cache: ShardCache) -> None:
    add(cache, b"a" * 10)

    def look(partial: Partial) -> None:
        assert digest(b"a" * 10) not in names(cache)
        partial.write(b"b" * 10)

    with opened(ShardCache(cache.root, 15), b"b" * 10, look):
        pass


def test_partial_files_that_nobody_continues_are_evicted(cache: ShardCache) -> None:
    cache.root.mkdir()
    stale = f"{digest(b'z')}.part"
    (cache.root / stale).write_bytes(b"z" * 20)
    age(cache, stale)
    add(ShardCache(cache.root, 25), b"c" * 10)
    assert names(cache) == {digest(b"c" * 10)}


def test_files_in_use_are_never_evicted_and_exceed_the_limit_with_one_warning(
    cache: ShardCache, caplog: pytest.LogCaptureFixture
) -> None:
    mine, theirs = b"m" * 10, b"t" * 10
    fetching = b"first half, second half"
    small = ShardCache(cache.root, 5)
    add(cache, theirs)
    with (
        opened(cache, mine) as descriptor,
        other_process(cache, theirs),
        other_process(cache, fetching),
        caplog.at_level(logging.WARNING),
    ):
        for content in (b"x" * 10, b"y" * 10):
            add(small, content)
        assert os.pread(descriptor, 10, 0) == mine
        in_use = {digest(mine), digest(theirs), f"{digest(fetching)}.part"}
        assert in_use <= names(cache)
    assert sum("files in use" in line for line in caplog.messages) == 1
    add(small, b"z")
    # Nobody uses them now. (A killed process's files are free as soon as it is gone.)
    assert names(cache) == {digest(b"z")}


def test_an_evicted_file_stays_readable_and_a_tight_limit_does_not_loop(cache: ShardCache) -> None:
    tight = ShardCache(cache.root, 0)
    for content in (b"one", b"two"):
        add(tight, content)
    assert names(cache) == {digest(b"two")}


def test_a_full_disk_names_the_directory_and_what_to_set(
    cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UsageError, match="No space left") as error, opened(cache, b"x"):
        pass
    for part in (str(cache.root), "CMKD_CACHE", "data.cache_limit_bytes"):
        assert part in str(error.value)


@pytest.mark.parametrize("place", ["a file", "/sys/cmkd_cache"])
def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path, place: str) -> None:
    (tmp_path / "a file").touch()
    root = tmp_path / place
    with pytest.raises(UsageError, match="CMKD_CACHE"), opened(ShardCache(root, LARGE), b"x"):
        pass


def test_those_who_wait_for_a_file_need_not_wait_for_its_readers(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 1 << 20)
    for number in range(20):
        content = b"x" * (number + 1)
        arrived = threading.Barrier(4)

        def fetch(partial: Partial, content: bytes = content) -> None:
            partial.write(content[partial.size :])

        def read(content: bytes = content, arrived: threading.Barrier = arrived) -> int:
            arrived.wait()
            digest = hashlib.sha256(content).hexdigest()
            return cache.open(digest, size=None, address="x", fetch=fetch)

        with ThreadPoolExecutor(4) as pool:
            # Each keeps its descriptor open while the others still wait for theirs.
            descriptors = list(pool.map(lambda _: read(), range(4)))
        for descriptor in descriptors:
            os.close(descriptor)
    assert not list((tmp_path / "cache").glob("*.lock"))
