"""Remote directories over real HTTP and S3, with servers that fail in every known way."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmkd_scale.data import transport
from cmkd_scale.data.cache import ShardCache
from cmkd_scale.data.remote import SCHEMES, RemoteDirectory, is_remote
from cmkd_scale.errors import IntegrityError, UsageError
from tests.data.servers import Fault, FaultyServer, Request, files, put, serving

REPOSITORY = Path(__file__).resolve().parents[2]
CONTENT = random.Random(0).randbytes(200_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()
CHUNK = 70_000
FAST: dict[str, Any] = {"timeout_seconds": 0.5, "backoff_seconds": 0.001, "chunk_bytes": CHUNK}
PATIENT: dict[str, Any] = {**FAST, "timeout_seconds": 60}

pytest.importorskip("aiohttp")


pytestmark = pytest.mark.usefixtures("fresh_connections")


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 1 << 30)


@pytest.fixture
def web() -> Iterator[FaultyServer]:
    content = {"/split/shard.tar": CONTENT, "/split/manifest.json": b"{}", "/split/empty": b""}
    with serving(files(content)) as server:
        yield server


@pytest.fixture(autouse=True, scope="module")
def bucket(moto: str) -> None:
    """Two directories."""
    keys = ("data/train/shard.tar", "data/test/shard.tar", "data/notes.txt")
    put(moto, {f"/bucket/{key}": CONTENT for key in keys})


def content_of(directory: RemoteDirectory, *, size: int | None = len(CONTENT)) -> bytes:
    descriptor = directory.open("shard.tar", size=size, sha256=DIGEST)
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


# ------------------------------------------------------------------------ addresses


@pytest.mark.parametrize(
    "url",
    [
        *("pipe:cat x", "file:///etc", "memory://x", "ftp://host/x", "simplecache::s3://b/x"),
        *("s3://b/simplecache::x", "/local/dir", "S3://b/x", ""),
    ],
)
def test_other_kinds_of_addresses_are_refused(url: str, cache: ShardCache) -> None:
    with pytest.raises(UsageError) as error:
        RemoteDirectory(url, cache)
    assert all(f"{scheme}://" in str(error.value) for scheme in SCHEMES)


@pytest.mark.parametrize(
    "url",
    [
        *("https://", "https:///path", "http://host:port/x", "http://[::1/x", "https://h/x#part"),
        *("s3://", "s3://id:secret@bucket/x", "s3://bucket/x?sig=secret", "s3://bucket/x#secret"),
        *("hf://name", "hf://datasets/owner", "hf://buckets/owner/name/x", "hf://u@o/name/x"),
    ],
)
def test_incomplete_addresses_are_refused_without_their_secrets(
    url: str, cache: ShardCache
) -> None:
    with pytest.raises(UsageError) as error:
        RemoteDirectory(url, cache)
    assert "secret" not in str(error.value)


def test_remote_means_an_address_with_a_scheme() -> None:
    assert is_remote("s3://bucket/x")
    assert not is_remote("builtin:numbers/audio")
    assert not is_remote("/data/shards")


@pytest.mark.parametrize(
    ("url", "package"),
    [
        *[("s3://b/x", "s3fs"), ("gs://b/x", "gcsfs"), ("https://h/x", "aiohttp")],
        *[("http://h/x", "aiohttp"), ("hf://datasets/o/n", "huggingface_hub")],
    ],
)
def test_a_missing_package_names_the_extra(
    url: str, package: str, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else name)
    with pytest.raises(UsageError, match=rf"{package}.*pip install 'cmkd_scale\[remote\]'"):
        RemoteDirectory(url, cache)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/etc/passwd", "a?b", ".part"])
def test_names_are_bare(name: str, cache: ShardCache) -> None:
    directory = RemoteDirectory("https://host/x", cache)
    with pytest.raises(UsageError):
        directory.read(name, max_bytes=1)
    with pytest.raises(UsageError):
        directory.open(name, size=None, sha256=DIGEST)
    with pytest.raises(UsageError):
        directory.child(name)


def test_user_and_query_are_sent_and_never_shown(web: FaultyServer, cache: ShardCache) -> None:
    url = web.url.replace("//", "//me:secret@") + "?sig=secret%2B1"
    directory = RemoteDirectory(url, cache, attempts=1, **FAST).child("split")
    assert directory.read("manifest.json", max_bytes=10) == b"{}"
    assert web.requests[0].path == "/split/manifest.json?sig=secret%2B1"
    assert web.requests[0].headers["Authorization"].startswith("Basic ")
    shown = [directory.address, repr(directory)]
    for fault in (
        Fault("status", status=403),
        Fault("status", status=500),
        Fault("truncate", at=0),
    ):
        web.script(fault)
        with pytest.raises((UsageError, IntegrityError)) as error:
            directory.read("manifest.json", max_bytes=10)
        shown.append(str(error.value))
    assert not [text for text in shown if "secret" in text]
    assert directory.address == f"{web.url}/split"


@pytest.mark.parametrize(
    ("base", "path"),
    [
        ("hf://datasets/owner/name/a", "/datasets/owner/name/resolve/main/a/f"),
        ("hf://datasets/owner/name@v1.0", "/datasets/owner/name/resolve/v1.0/f"),
        ("hf://owner/name@refs/pr/3/a", "/owner/name/resolve/refs%2Fpr%2F3/a/f"),
    ],
)
def test_the_hub_is_read_over_http_with_its_token(
    base: str, path: str, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    with serving(files({path: b"content"})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        directory = RemoteDirectory(base, cache, **FAST)
        assert directory.read("f", max_bytes=10) == b"content"
        assert hub.requests[-1].headers["Authorization"] == "Bearer hf_token"


def test_directories_of_the_hub_are_listed(
    cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub")
    entry = {"oid": "0" * 40, "size": 1}
    tree = [
        {**entry, "type": "directory", "path": "data/train"},
        {**entry, "type": "file", "path": "data/notes.txt"},
    ]

    def reply(request: Request) -> tuple[int, dict[str, str], bytes]:
        assert request.path.startswith("/api/datasets/owner/name/tree/v1/data")
        return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()

    with serving(reply) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        directory = RemoteDirectory("hf://datasets/owner/name@v1/data", cache, **FAST)
        assert directory.directories() == ["train"]


# ------------------------------------------------------------------------ HTTP

FAULTS = [
    *[Fault("status", status=status) for status in (500, 503, 429, 408)],
    *[Fault("reset"), Fault("reset", at=1000), Fault("stall"), Fault("stall", at=1000)],
    *[Fault("truncate"), Fault("truncate", at=0), Fault("truncate", at=1000)],
    *[Fault("ignore range"), Fault("corrupt")],
]


@pytest.mark.parametrize("size", [len(CONTENT), None])
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_http_faults_are_survived(
    fault: Fault, size: int | None, web: FaultyServer, cache: ShardCache
) -> None:
    directory = RemoteDirectory(f"{web.url}/split/", cache, **FAST)
    # After a part has arrived, so that the fault hits a continued transfer too.
    web.script(fault, Fault("truncate", at=70_000), fault)
    assert content_of(directory, size=size) == CONTENT
    web.requests.clear()
    assert content_of(directory, size=size) == CONTENT
    assert web.requests == []  # from the cache


def test_a_transfer_goes_on_at_the_byte_reached(web: FaultyServer, cache: ShardCache) -> None:
    directory = RemoteDirectory(f"{web.url}/split", cache, **FAST)
    web.script(Fault("stall", at=70_000), Fault("status"), Fault("stall", at=10_000))
    assert content_of(directory) == CONTENT
    asked = [(text or "").removeprefix("bytes=").split("-") for text in web.ranges()]
    assert {int(last) for _, last in asked} == {len(CONTENT) - 1}
    first, second, third, fourth = (int(first) for first, _ in asked)
    assert 0 == first < second == third < fourth
    assert directory.retries == 3


def test_a_server_without_ranges_is_skipped_through(web: FaultyServer, cache: ShardCache) -> None:
    directory = RemoteDirectory(f"{web.url}/split", cache, **FAST)
    web.script(Fault("truncate", at=70_000), Fault("ignore range"))
    assert content_of(directory) == CONTENT
    assert len(web.requests) == 2


@given(
    faults=st.lists(
        st.builds(
            Fault,
            kind=st.sampled_from(["status", "reset", "truncate", "ignore range", "corrupt"]),
            at=st.none() | st.integers(0, 300),
            status=st.sampled_from([429, 500, 502, 503]),
        ),
        max_size=8,
    ),
    length=st.integers(0, 250),
    sized=st.booleans(),
)
@settings(max_examples=60)
def test_whatever_http_does_the_bytes_are_right_or_the_error_is_clean(
    tmp_path_factory: pytest.TempPathFactory, faults: list[Fault], length: int, sized: bool
) -> None:
    content = CONTENT[:length]
    cache = ShardCache(tmp_path_factory.mktemp("cache"), 1 << 30)
    sha256 = hashlib.sha256(content).hexdigest()
    with serving(files({"/f": content}), faults) as server:
        directory = RemoteDirectory(server.url, cache, attempts=4, **PATIENT)
        try:
            descriptor = directory.open("f", size=length if sized else None, sha256=sha256)
        except IntegrityError:
            assert faults
            assert sha256 not in os.listdir(cache.root)
        else:
            with os.fdopen(descriptor, "rb") as file:
                assert file.read() == content


def test_a_small_file_is_read_whole_or_is_absent(web: FaultyServer, cache: ShardCache) -> None:
    directory = RemoteDirectory(f"{web.url}/split", cache, **FAST)
    web.script(Fault("status"), Fault("truncate", at=1))
    assert directory.read("manifest.json", max_bytes=2) == b"{}"
    assert directory.read("empty", max_bytes=2) == b""
    assert directory.read("absent", max_bytes=2) is None
    with pytest.raises(IntegrityError, match="more than 100 bytes"):
        directory.read("shard.tar", max_bytes=100)
    assert directory.directories() == []
    assert not cache.root.exists()


def test_a_missing_file_is_not_asked_for_again(web: FaultyServer, cache: ShardCache) -> None:
    directory = RemoteDirectory(f"{web.url}/split", cache, **FAST)
    with pytest.raises(IntegrityError, match=r"split/absent\.tar is missing"):
        directory.open("absent.tar", size=3, sha256=DIGEST)
    assert len(web.requests) == 1
    assert os.listdir(cache.root) == []


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_is_final_and_says_where_credentials_come_from(
    status: int, web: FaultyServer, cache: ShardCache
) -> None:
    directory = RemoteDirectory(f"{web.url}/split", cache, **FAST)
    web.script(Fault("status", status=status))
    with pytest.raises(UsageError, match="netrc"):
        content_of(directory)
    assert len(web.requests) == 1


def test_after_enough_failures_the_address_and_the_reason_are_named(
    web: FaultyServer, cache: ShardCache
) -> None:
    directory = RemoteDirectory(f"{web.url}/split", cache, attempts=3, **FAST)
    web.script(Fault("stall", at=10), *[Fault("status", status=502)] * 3)
    with pytest.raises(IntegrityError, match=r"/split/shard.tar .*HTTP 502.* 3 attempts"):
        content_of(directory)
    assert len(web.requests) == 4  # the one that brought something does not count
    web.script()
    assert content_of(directory) == CONTENT
    assert web.ranges() == [f"bytes=10-{len(CONTENT) - 1}"]  # what had arrived was kept


def test_an_unreachable_server_is_a_clean_error(web: FaultyServer, cache: ShardCache) -> None:
    url = web.url
    web.close()
    with pytest.raises(IntegrityError, match="ClientConnector"):
        content_of(RemoteDirectory(url, cache, attempts=2, **FAST))


@pytest.mark.parametrize("served", [CONTENT[:-1], b"x" + CONTENT, b"", CONTENT[::-1]])
def test_another_file_than_the_manifest_states_is_an_error(
    served: bytes, cache: ShardCache
) -> None:
    with serving(files({"/shard.tar": served})) as server:
        directory = RemoteDirectory(server.url, cache, **FAST)
        for size in (len(CONTENT), None):
            with pytest.raises(IntegrityError, match="not what the manifest states"):
                content_of(directory, size=size)
    assert os.listdir(cache.root) == []


def test_a_trickle_of_bytes_does_not_go_on_for_ever(web: FaultyServer, cache: ShardCache) -> None:
    web.script(*[Fault("truncate", at=1)] * 1000)
    with pytest.raises(IntegrityError, match="could not be read"):
        content_of(RemoteDirectory(f"{web.url}/split", cache, attempts=1, **FAST))
    assert len(web.requests) <= 50


# ------------------------------------------------------------------------ processes


def test_threads_open_several_files_at_once_and_each_is_fetched_once(cache: ShardCache) -> None:
    contents = {f"/f{i}": CONTENT[i:] for i in range(6)}
    with serving(files(contents)) as server:
        directory = RemoteDirectory(server.url, cache, **PATIENT)

        def want(i: int) -> bool:
            content = contents[f"/f{i % 6}"]
            sha256 = hashlib.sha256(content).hexdigest()
            descriptor = directory.open(f"f{i % 6}", size=len(content), sha256=sha256)
            with os.fdopen(descriptor, "rb") as file:
                return file.read() == content

        with ThreadPoolExecutor(12) as pool:
            assert all(pool.map(want, range(24)))
        assert len(server.requests) == 6


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_it_works_in_a_child_process_after_use_in_the_parent(
    method: str, web: FaultyServer, tmp_path: Path
) -> None:
    web.script(Fault("status"))
    # Not from here: a fork of a process with threads as many as pytest's may do anything.
    command = [sys.executable, "-m", "tests.scripts.child_reads", f"{web.url}/split"]
    subprocess.run([*command, str(tmp_path), method], cwd=REPOSITORY, check=True, timeout=120)
    assert len(web.requests) == 4


FETCH = """
import os, sys
from pathlib import Path
from cmkd_scale.data.cache import ShardCache
from cmkd_scale.data.remote import RemoteDirectory
url, root, size, sha256 = sys.argv[1:]
cache = ShardCache(Path(root), 1 << 30)
directory = RemoteDirectory(url, cache, timeout_seconds=1, backoff_seconds=0)
with os.fdopen(directory.open("shard.tar", size=int(size), sha256=sha256), "rb") as file:
    assert len(file.read()) == int(size)
"""


@contextlib.contextmanager
def fetching(url: str, cache: ShardCache) -> Iterator[subprocess.Popen[bytes]]:
    arguments = [url, str(cache.root), str(len(CONTENT)), DIGEST]
    with subprocess.Popen([sys.executable, "-c", FETCH, *arguments], cwd=REPOSITORY) as process:
        try:
            yield process
        finally:
            process.kill()


def test_processes_that_share_a_cache_fetch_a_file_once(
    web: FaultyServer, cache: ShardCache
) -> None:
    url = f"{web.url}/split"
    with fetching(url, cache) as first, fetching(url, cache) as second:
        assert (first.wait(60), second.wait(60)) == (0, 0)
    assert len(web.requests) == 1


def test_what_a_killed_process_fetched_is_continued(web: FaultyServer, cache: ShardCache) -> None:
    web.script(Fault("stall", at=120_000), *[Fault("stall")] * 10)
    with fetching(f"{web.url}/split", cache) as process:
        # When the second request arrives, what the first one brought has been written.
        assert web.stalls.acquire(timeout=60)
        assert web.stalls.acquire(timeout=60)
        process.send_signal(signal.SIGKILL)
        process.wait()
    reached = web.ranges()[1]
    assert reached != web.ranges()[0]
    assert set(os.listdir(cache.root)) == {f"{DIGEST}.part", f"{DIGEST}.lock"}
    web.script()
    assert content_of(RemoteDirectory(f"{web.url}/split", cache, **FAST)) == CONTENT
    assert web.ranges() == [reached]
    assert os.listdir(cache.root) == [DIGEST]


# ------------------------------------------------------------------------ S3


@pytest.mark.parametrize("size", [len(CONTENT), None])
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_s3_faults_are_survived(
    fault: Fault, size: int | None, s3: FaultyServer, cache: ShardCache
) -> None:
    directory = RemoteDirectory("s3://bucket/data/train", cache, **FAST)
    s3.script(fault, Fault("none"), fault)
    assert content_of(directory, size=size) == CONTENT
    s3.requests.clear()
    assert content_of(directory, size=size) == CONTENT
    assert s3.requests == []


def test_s3_is_read_by_chunks_and_continued(s3: FaultyServer, cache: ShardCache) -> None:
    directory = RemoteDirectory("s3://bucket/data/train", cache, **PATIENT)
    s3.script(Fault("none"), Fault("status"), Fault("none"))
    assert content_of(directory) == CONTENT
    # Chunks of 70 000 bytes; after a failure, of 64 KiB.
    chunks = [(0, 69_999), (70_000, 139_999), (70_000, 139_999), (140_000, 199_999)]
    assert s3.ranges() == [f"bytes={first}-{last}" for first, last in chunks]
    assert directory.retries == 1


def test_s3_lists_and_tells_what_is_missing(s3: FaultyServer, cache: ShardCache) -> None:
    directory = RemoteDirectory("s3://bucket/data", cache, **PATIENT)
    s3.script(Fault("status"))
    assert directory.directories() == ["test", "train"]
    assert directory.child("train").directories() == []
    assert directory.child("absent").directories() == []
    assert directory.read("absent", max_bytes=1) is None
    assert content_of(directory.child("test")) == CONTENT
    with pytest.raises(IntegrityError, match=r"s3://bucket/data/absent.tar is missing"):
        directory.open("absent.tar", size=1, sha256=DIGEST)


def test_s3_without_or_with_wrong_credentials_names_the_variables(
    s3: FaultyServer, cache: ShardCache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    directory = RemoteDirectory("s3://bucket/data/train", cache, **FAST)
    s3.script(Fault("status", status=403))
    with pytest.raises(UsageError, match="AWS_ACCESS_KEY_ID"):
        content_of(directory)
    assert len(s3.requests) == 1
    transport.disconnect()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(UsageError, match="AWS_ACCESS_KEY_ID"):
        content_of(directory)
