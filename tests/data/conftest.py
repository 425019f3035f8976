"""What tests of the data room share: a real S3 server, and splits to be damaged."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.data.fuzz_checks import little_room
from tests.data.fuzz_splits import FuzzSplit, make_splits
from tests.data.servers import FaultyServer, forwarded, serving


@pytest.fixture
def fresh_connections(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No connection of this process outlives the test's servers."""
    from cmkd_scale.data import transport

    monkeypatch.setenv("NO_PROXY", "*")
    yield
    transport.disconnect()


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """Address of an S3 server with an empty bucket ``bucket``."""
    module = pytest.importorskip("moto.server")
    server = module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(
    moto: str, monkeypatch: pytest.MonkeyPatch, fresh_connections: None
) -> Iterator[FaultyServer]:
    """Where ``s3://`` leads; spoils what its script says."""
    pytest.importorskip("s3fs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with serving(forwarded(moto)) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        yield server


@pytest.fixture(scope="session")
def splits(tmp_path_factory: pytest.TempPathFactory) -> list[FuzzSplit]:
    """One split of each modality; who damages one works on copies of its files."""
    return make_splits(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture
def limit(splits: list[FuzzSplit]) -> Iterator[None]:
    """Little memory, so that a bomb fails a test."""
    with little_room():
        yield
