"""Splits wherever they lie: what is read over the network is what lies on disk."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cmkd_scale.data.damage import DamagedError, Incident, Quarantine
from cmkd_scale.data.loader import TrainLoader
from cmkd_scale.data.locate import open_manifest
from cmkd_scale.data.manifest import Manifest
from cmkd_scale.data.modalities import TextModality
from cmkd_scale.data.order import Order
from cmkd_scale.data.sampling import Natural
from cmkd_scale.data.stream import SampleReader
from cmkd_scale.errors import IntegrityError, UsageError
from tests.data.examples import build_toy
from tests.data.servers import Fault, FaultyServer, files, put, serving

pytest.importorskip("aiohttp")
pytestmark = pytest.mark.usefixtures("fresh_connections", "own_cache")

FAULTS = [
    Fault("none"),
    Fault("status", status=500),
    Fault("reset", at=100),
    Fault("truncate", at=3000),
    Fault("reset"),
    Fault("status", status=503),
]


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CMKD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return build_toy(tmp_path_factory.mktemp("toy"))


def contents(manifest: Manifest, prefix: str) -> dict[str, bytes]:
    directory = manifest.directory
    return {f"{prefix}/{path.name}": path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture
def web(toy: Manifest) -> Iterator[FaultyServer]:
    with serving(files(contents(toy, "/data/text/train"))) as server:
        yield server


def make(manifest: Manifest, workers: int = 0, allowed: float = 0.0) -> TrainLoader:
    reader = SampleReader(manifest, TextModality().wants)
    return TrainLoader(
        reader,
        TextModality(),
        Order(Natural(len(reader)), reader.starts, 3),
        global_batch_size=12,
        rank=0,
        world_size=1,
        workers=workers,
        augment=False,
        quarantine=Quarantine(len(reader), max_bad_fraction=allowed),
    )


def read(loader: TrainLoader, count: int = 8) -> list[tuple[tuple[str, ...], list[int], bytes]]:
    batches = itertools.islice(loader.batches(), count)
    return [(b.keys, b.labels.tolist(), b.inputs.numpy().tobytes()) for b in batches]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_training_over_http_reads_what_lies_on_disk(
    toy: Manifest, web: FaultyServer, workers: int
) -> None:
    manifest = open_manifest(f"{web.url}/data/text/train", split="train")
    assert manifest.digest == toy.digest
    web.script(*FAULTS)
    loader = make(manifest, workers)
    assert read(loader) == read(make(toy))
    assert workers or loader.exchange()["read_retries"] + manifest.storage.retries > 0
    web.script()
    assert read(make(manifest)) == read(make(toy))
    assert web.requests == [], "what is in the cache is not asked for again"


def test_training_over_s3_reads_what_lies_on_disk(
    toy: Manifest, moto: str, s3: FaultyServer
) -> None:
    put(moto, contents(toy, "/toys/data/text/train"))
    manifest = open_manifest("s3://toys/data", split="train")  # S3 can list: no modality is named
    s3.script(*FAULTS)
    assert read(make(manifest)) == read(make(toy))


def test_a_server_that_gives_other_bytes_costs_those_samples_only(
    toy: Manifest, web: FaultyServer
) -> None:
    content = contents(toy, "/data/text/train")
    name = f"/data/text/train/{toy.shards[2].url}"
    content[name] = content[name].replace(b"train 40:", b"TRAIN 40:")
    web.reply = files(content)
    manifest = open_manifest(f"{web.url}/data/text/train", split="train")
    met: list[Incident] = []
    loader = make(manifest)
    loader.quarantine = Quarantine(60, max_bad_fraction=0.5, record=met.append)
    kept = set(itertools.chain(*(keys for keys, _, _ in read(loader, 5))))
    assert len(met) == toy.shards[2].nsamples  # not one byte of that file can be trusted
    assert {incident.shard for incident in met} == {toy.shards[2].url}
    assert kept == {f"toy-train-{n:06d}" for n in range(60) if n // 16 != 2}
    with pytest.raises(IntegrityError, match=r"shard-000002"):
        read(make(manifest), 5)


@pytest.mark.parametrize(
    ("below", "modality"), [("data/text/train", None), ("data/text", None), ("data", "text")]
)
def test_a_split_is_found_from_the_directories_above_it(
    toy: Manifest, web: FaultyServer, below: str, modality: str | None
) -> None:
    manifest = open_manifest(f"{web.url}/{below}", split="train", modality=modality)
    assert manifest.digest == toy.digest


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (lambda web: f"{web}/nothing", "no manifest.json there, in train/"),
        (lambda web: f"{web}/data/text/train?sig=secret", "other"),
        (lambda web: "simplecache::s3://bucket/x", "s3://, gs://"),
        (lambda web: "pipe://cat x", "s3://, gs://"),
        (lambda web: "file:///etc", "s3://, gs://"),
    ],
)
def test_what_is_not_there_is_said(
    web: FaultyServer, address: Callable[[str], str], words: str
) -> None:
    split = "other" if "sig" in address(web.url) else "train"
    with pytest.raises(UsageError, match=words) as caught:
        open_manifest(address(web.url), split=split)
    assert "secret" not in str(caught.value)


def test_a_cache_smaller_than_the_data_gives_the_same_stream(
    toy: Manifest, web: FaultyServer, own_cache: Path
) -> None:
    manifest = open_manifest(
        f"{web.url}/data/text/train", split="train", cache_limit_bytes=toy.shards[0].filesize
    )
    assert read(make(manifest)) == read(make(toy))
    # Shards in use stay; now that nobody reads them, the next that is fetched makes room.
    gc.collect()
    (own_cache / "shards" / toy.shards[3].sha256).unlink()
    reader = SampleReader(manifest)
    list(reader.read(np.array([59])))
    kept = sum(path.stat().st_size for path in (own_cache / "shards").iterdir())
    assert kept <= 2 * toy.shards[0].filesize


def test_an_outage_is_no_damage(web: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = open_manifest(f"{web.url}/data/text/train", split="train")
    for name, value in (("_attempts", 2), ("_backoff", 0.001)):
        monkeypatch.setattr(manifest.storage, name, value)
    reader = SampleReader(manifest)
    web.script(*[Fault("status", status=500)] * 20)
    with pytest.raises(IntegrityError, match=r"shard-0000.*could not be read") as caught:
        reader.read(np.arange(60))
    assert not isinstance(caught.value, DamagedError)
    web.script()
    assert not [sample for sample in reader.read(np.arange(60)) if isinstance(sample, Exception)]


def test_a_reader_keeps_little_of_a_cache_open(toy: Manifest, web: FaultyServer) -> None:
    room = 64 * 2 * toy.shards[0].filesize  # one reader may keep a 64th: two shards
    manifest = open_manifest(f"{web.url}/data/text/train", split="train", cache_limit_bytes=room)
    reader = SampleReader(manifest)
    reader.read(np.random.default_rng(0).permutation(60))
    assert len(reader._shards) == 2
