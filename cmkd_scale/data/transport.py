"""How bytes of a remote file arrive: one attempt of one transfer, for each kind of server.

HTTP, which ``hf://`` comes down to, is streamed in one request; a server that ignores ranges
is read from its first byte on. S3 and Google Cloud Storage are read chunk by chunk through
their ``fsspec`` file systems. Whatever goes wrong is one of three errors: ``Failure`` (try
again), ``Missing`` or ``Refused``.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import re
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from cmkd_scale.data.remote_address import HUB

_READ_BUFFER = 1 << 20
# Modules of errors of the network; anything else is a fault of ours and is shown as it is.
_LIBRARIES = (
    *("aiohttp", "aiobotocore", "botocore", "fsspec", "gcsfs", "google"),
    *("httpx", "httpx2", "huggingface_hub", "requests", "urllib3"),
)
# Neither shared with a forked child nor closed by it, hence the process id.
_connections: dict[tuple[int, str], Any] = {}


class Failure(Exception):  # noqa: N818 - a reason to try again
    """A transfer ended early; the text is the reason, without credentials."""


class Missing(Exception):  # noqa: N818
    """There is no such file or directory."""


class Refused(Exception):  # noqa: N818
    """The server wants other credentials; the text is its reason."""


class _HttpStatusError(OSError):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status} {text}")
        self.status = status


def disconnect() -> None:
    """Forget this process's connections, so that credentials and endpoints are read anew."""
    for key in [key for key in _connections if key[0] == os.getpid()]:
        _connections.pop(key, None)


def pieces(
    url: str, *, start: int, end: int | None, timeout_seconds: float, chunk_bytes: int
) -> Generator[bytes]:
    """Bytes of a file from ``start`` on, as they arrive, up to ``end`` or the file's end.

    It ends early, without an error, where the file is shorter. Closing it ends the transfer.

    Raises:
        Failure, Missing, Refused: see there.
    """
    sync = importlib.import_module("fsspec.asyn").sync
    scheme = urlsplit(url).scheme
    system = _connect(scheme)
    source: AsyncGenerator[bytes]
    if scheme in ("s3", "gs"):
        source = _chunks(system, url, start, end, timeout_seconds, chunk_bytes)
    else:
        source = _stream(system, *_web(url), start, end, timeout_seconds)
    try:
        while True:
            try:
                with _translated():
                    piece = sync(system.loop, source.__anext__)
            except StopAsyncIteration:
                return
            yield piece
    finally:
        # It is still running if the wait for it was interrupted by the keyboard.
        with contextlib.suppress(RuntimeError):
            sync(system.loop, source.aclose)


def directories(url: str, *, timeout_seconds: float) -> list[str]:
    """Names of the sub-directories of ``s3:// gs:// hf://``.

    Raises:
        Failure, Missing, Refused: see there.
    """
    with _translated():
        if url.startswith("hf:"):
            return _hub_directories(url)
        system = _connect(urlsplit(url).scheme)
        sync = importlib.import_module("fsspec.asyn").sync
        path = url.partition("://")[2]
        found = sync(system.loop, system._ls, path, detail=True, timeout=timeout_seconds)
        folders = [entry["name"] for entry in found if entry["type"] == "directory"]
        return [name.rstrip("/").rpartition("/")[2] for name in folders]


def _connect(scheme: str) -> Any:
    """This process's file system for a scheme; it connects when it is first used."""
    key = (os.getpid(), scheme if scheme in ("s3", "gs") else "http")
    if key not in _connections:
        # Of two threads that come here at once the slower one's is dropped, unused.
        _connections.setdefault(key, _CONNECT[key[1]]())
    return _connections[key]


def _connect_s3() -> Any:
    # Attempts are counted and spaced in one place, which is not here.
    config = {"retries": {"total_max_attempts": 1}, "max_pool_connections": 64}
    system = importlib.import_module("s3fs").S3FileSystem(
        skip_instance_cache=True, use_listings_cache=False, config_kwargs=config
    )
    system.retries = 1
    return system


def _connect_gs() -> Any:
    return importlib.import_module("gcsfs").GCSFileSystem(
        skip_instance_cache=True, use_listings_cache=False
    )


def _connect_http() -> Any:
    options = {"trust_env": True, "auto_decompress": False, "read_bufsize": _READ_BUFFER}
    return importlib.import_module("fsspec.implementations.http").HTTPFileSystem(
        skip_instance_cache=True, client_kwargs=options
    )


_CONNECT: Mapping[str, Callable[[], Any]]
_CONNECT = {"s3": _connect_s3, "gs": _connect_gs, "http": _connect_http}


def _web(url: str) -> tuple[str, Mapping[str, str]]:
    """The address to ask over HTTP for a file, and the headers that authorise it."""
    hub = HUB.fullmatch(url)
    if hub is None:
        return url, {}
    package = importlib.import_module("huggingface_hub")
    address = package.hf_hub_url(
        hub["repo"],
        hub["path"],
        repo_type=hub["type"],
        revision=hub["revision"],
        endpoint=os.environ.get("HF_ENDPOINT"),
    )
    return address, package.utils.build_hf_headers()


def _hub_directories(url: str) -> list[str]:
    hub = HUB.fullmatch(url)
    assert hub is not None
    package = importlib.import_module("huggingface_hub")
    tree = package.HfApi(endpoint=os.environ.get("HF_ENDPOINT")).list_repo_tree(
        hub["repo"],
        path_in_repo=hub["path"] or None,
        repo_type=hub["type"],
        revision=hub["revision"],
    )
    folders = [entry.path for entry in tree if isinstance(entry, package.hf_api.RepoFolder)]
    return [path.rpartition("/")[2] for path in folders]


async def _stream(
    system: Any, url: str, headers: Mapping[str, str], start: int, end: int | None, timeout: float
) -> AsyncGenerator[bytes]:
    aiohttp = importlib.import_module("aiohttp")
    limits = aiohttp.ClientTimeout(connect=timeout, sock_connect=timeout, sock_read=timeout)
    span = f"bytes={start}-{'' if end is None else end - 1}"
    headers = {**headers, "Range": span, "Accept-Encoding": "identity"}
    session = await system.set_session()
    async with session.get(system.encode_url(url), headers=headers, timeout=limits) as response:
        if response.status == 416:  # the file ends here
            return
        # 200: the server ignores ranges and sends the whole file.
        position = 0 if response.status == 200 else start
        told = response.headers.get("Content-Range", "")
        if response.status != 200 and not told.startswith(f"bytes {start}-"):
            raise _HttpStatusError(response.status, response.reason or "")
        async for piece in response.content.iter_chunked(_READ_BUFFER):
            wanted = piece[max(0, start - position) : None if end is None else end - position]
            position += len(piece)
            if wanted:
                yield wanted
            if end is not None and position >= end:
                return


async def _chunks(
    system: Any, url: str, start: int, end: int | None, timeout: float, chunk: int
) -> AsyncGenerator[bytes]:
    path = url.partition("://")[2]
    if url.startswith("s3:"):
        await system.set_session()  # takes long, and is not the server's time
    while end is None or start < end:
        stop = start + chunk if end is None else min(start + chunk, end)
        try:
            data = await asyncio.wait_for(system._cat_file(path, start=start, end=stop), timeout)
        except Exception as error:
            if _status(error) == 416:  # the file ends here
                return
            raise
        if len(data) > stop - start:  # the range was ignored
            data = data[start:stop]
        if data:
            yield data
        start += len(data)
        if start < stop:
            return


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        library = type(error).__module__.partition(".")[0]
        if not isinstance(error, OSError) and library not in _LIBRARIES:
            raise
        status, name = _status(error), type(error).__name__
        # Addresses in the messages of libraries have credentials in them.
        text = re.sub(r"//[^/@\s]*@|\?[^\s'\")]*", "", str(error))[:200]
        reason = text if isinstance(error, _HttpStatusError) else f"{name}: {text}"
        if isinstance(error, TimeoutError):
            reason = "no answer in time"
        if isinstance(error, FileNotFoundError) or status in (404, 410):
            raise Missing(reason) from None
        if isinstance(error, PermissionError) or status in (401, 403, 407) or "Credential" in name:
            raise Refused(reason) from None
        raise Failure(reason) from None


def _status(error: BaseException) -> int | None:
    """The HTTP status that a library's error stands for."""
    for each in filter(None, (error, error.__cause__)):
        response: Any = getattr(each, "response", None)
        if isinstance(response, dict):
            return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) or None
        for holder, key in ((response, "status_code"), (each, "status"), (each, "code")):
            if isinstance(status := getattr(holder, key, None), int):
                return status
    return None
