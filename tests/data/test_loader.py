from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from cmkd_scale.data.damage import Incident, Quarantine
from cmkd_scale.data.loader import TrainLoader, ordered_batches
from cmkd_scale.data.manifest import Manifest
from cmkd_scale.data.modalities import TextModality
from cmkd_scale.data.order import Order, permutation
from cmkd_scale.data.sampling import Natural
from cmkd_scale.data.stream import SampleReader
from cmkd_scale.errors import IntegrityError, UsageError
from tests.data.examples import build_toy

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> SampleReader:
    return SampleReader(build_toy(tmp_path_factory.mktemp("toy")))


@dataclass(frozen=True)
class NoisyText(TextModality):
    """Text whose augmentation leaves a random mark, to see what its generator depends on."""

    def augment(self, inputs: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        marked = inputs.clone()
        marked[-1] = int(rng.integers(1, 257))
        return marked


def make(
    reader: SampleReader,
    *,
    rank: int = 0,
    world_size: int = 1,
    batch: int = 12,
    seed: int = 0,
    augment: bool = False,
    workers: int = 0,
    cache_bytes: int = 0,
    quarantine: Quarantine | None = None,
) -> TrainLoader:
    return TrainLoader(
        reader,
        NoisyText(),
        Order(Natural(len(reader)), reader.starts, seed),
        global_batch_size=batch,
        rank=rank,
        world_size=world_size,
        augment=augment,
        workers=workers,
        cache_bytes=cache_bytes,
        quarantine=quarantine,
    )


def keys(loader: TrainLoader, count: int) -> list[tuple[str, ...]]:
    return [batch.keys for batch in itertools.islice(loader.batches(), count)]


def test_batches_follow_the_order_across_epochs(reader: SampleReader) -> None:
    batches = keys(make(reader, batch=16), 8)  # 128 samples of epochs 0, 1 and 2
    expected = [reader.key(int(place)) for epoch in range(3) for place in permutation(60, 0, epoch)]
    assert list(itertools.chain(*batches)) == expected[:128]


@pytest.mark.slow
def test_the_state_is_that_of_the_last_delivered_batch(reader: SampleReader) -> None:
    loader = make(reader, workers=2)
    batches = loader.batches()
    first = [next(batches).keys, next(batches).keys]
    state = loader.state()
    batches.close()
    assert (state["epoch"], state["position"]) == (0, 24)
    resumed = make(reader)
    resumed.load_state(state)
    assert first + keys(resumed, 3) == keys(make(reader), 5)


@pytest.mark.slow
def test_augmentation_depends_on_seed_and_position_alone(reader: SampleReader) -> None:
    def marks(**options: Any) -> dict[tuple[int, str], int]:
        world_size = options.get("world_size", 1)
        found = {}
        for rank in range(world_size):
            loader = make(reader, augment=True, rank=rank, **options)
            for step, batch in enumerate(itertools.islice(loader.batches(), 7)):
                for key, inputs in zip(batch.keys, batch.inputs, strict=True):
                    found[step, key] = int(inputs[-1])
        return found

    alone = marks()
    assert marks(world_size=3) == alone
    assert marks(workers=2) == alone
    assert marks(cache_bytes=2**20) == alone
    assert marks(seed=1) != alone
    epochs = [[value for (step, _), value in alone.items() if step // 5 == e] for e in (0, 1)]
    assert epochs[0][:20] != epochs[1][:20], "an epoch draws anew"


def test_a_state_of_other_data_or_seed_is_refused(reader: SampleReader, tmp_path: Path) -> None:
    state = make(reader).state()
    other = SampleReader(build_toy(tmp_path, count=52))
    with pytest.raises(IntegrityError, match="other data"):
        make(other).load_state(state)
    with pytest.raises(IntegrityError, match="seed"):
        make(reader, seed=1).load_state(state)


def test_the_cache_holds_no_more_than_it_may(reader: SampleReader) -> None:
    size = 64 * 8  # bytes of one decoded text
    loader = make(reader, cache_bytes=10 * size)
    keys(loader, 10)
    assert len(loader.decoder._cache) == 10


def test_evaluation_gives_each_sample_once_in_batches_that_do_not_depend_on_ranks(
    reader: SampleReader,
) -> None:
    places = np.arange(3, 58)

    def share(rank: int, world_size: int) -> list[tuple[str, ...]]:
        batches = ordered_batches(
            reader,
            TextModality(),
            places,
            batch_size=8,
            rank=rank,
            world_size=world_size,
            quarantine=Quarantine(0, max_bad_fraction=0),
        )
        return [batch.keys for _, batch in batches]

    alone = share(0, 1)
    assert list(itertools.chain(*alone)) == [reader.key(int(place)) for place in places]
    for world_size in (2, 3, 9):
        shares = [share(rank, world_size) for rank in range(world_size)]
        assert sorted(itertools.chain(*shares)) == sorted(alone)


def damage(manifest: Manifest, *numbers: int) -> None:
    """Change the texts of some samples in the shards, but not their lengths."""
    for number in numbers:
        for record in manifest.shards:
            shard = manifest.directory / record.url
            content = shard.read_bytes()
            shard.write_bytes(content.replace(b"train %d:" % number, b"TRAIN %d:" % number))


def lenient(reader: SampleReader, fraction: float = 0.2) -> tuple[Quarantine, list[Incident]]:
    met: list[Incident] = []
    quarantine = Quarantine(len(reader), max_bad_fraction=fraction, record=met.append)
    return quarantine, met


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_damaged_sample_ends_a_run_that_allows_none(tmp_path: Path, workers: int) -> None:
    manifest = build_toy(tmp_path)
    damage(manifest, 5)
    with pytest.raises(IntegrityError, match=r"toy-train-000005.*shard-000000.*has changed"):
        keys(make(SampleReader(manifest), workers=workers), 5)


def test_damaged_samples_are_replaced_alike_on_any_world(tmp_path: Path) -> None:
    manifest = build_toy(tmp_path)
    whole = list(itertools.chain(*keys(make(SampleReader(manifest)), 10)))
    damage(manifest, 5, 17, 44)
    bad = {f"toy-train-{number:06d}" for number in (5, 17, 44)}

    def stream(world_size: int) -> list[str]:
        shares = []
        for rank in range(world_size):
            reader = SampleReader(manifest)
            quarantine, met = lenient(reader)
            shares.append(
                keys(make(reader, rank=rank, world_size=world_size, quarantine=quarantine), 10)
            )
            assert {incident.key for incident in met} <= bad
            assert all(incident.reason == "checksum" for incident in met)
        return [
            key
            for step in zip(*shares, strict=True)
            for row in zip(*step, strict=True)
            for key in row
        ]

    alone = stream(1)
    assert stream(3) == alone
    assert not bad.intersection(alone)
    # Only the damaged ones were replaced.
    assert [a for a, b in zip(alone, whole, strict=True) if b not in bad] == [
        key for key in whole if key not in bad
    ]


def test_what_was_left_out_is_counted_once_by_sample_and_always_by_meeting(
    tmp_path: Path,
) -> None:
    manifest = build_toy(tmp_path)
    damage(manifest, 5)
    reader = SampleReader(manifest)
    quarantine, met = lenient(reader)
    loader = make(reader, quarantine=quarantine)
    keys(loader, 10)  # two epochs
    assert [incident.key for incident in met] == ["toy-train-000005"]
    assert quarantine.met["checksum"] >= 2
    values = loader.exchange()
    assert values == {"samples_skipped/checksum": quarantine.met["checksum"], "read_retries": 0}
    assert loader.exchange() == {"read_retries": 0}


def test_evaluation_leaves_damaged_samples_out(tmp_path: Path) -> None:
    manifest = build_toy(tmp_path)
    damage(manifest, 5, 30)
    for world_size in (1, 3):
        found: list[str] = []
        for rank in range(world_size):
            reader = SampleReader(manifest)
            quarantine, _ = lenient(reader)
            for places, batch in ordered_batches(
                reader,
                TextModality(),
                np.arange(60),
                batch_size=7,
                rank=rank,
                world_size=world_size,
                quarantine=quarantine,
            ):
                assert [reader.key(int(place)) for place in places] == list(batch.keys)
                found += batch.keys
        assert sorted(found) == [f"toy-train-{n:06d}" for n in range(60) if n not in (5, 30)]


def test_a_shard_cut_short_is_named(tmp_path: Path) -> None:
    manifest = build_toy(tmp_path)
    reader = SampleReader(manifest)
    list(reader.read(np.arange(60)))  # all shards are open: the change comes later
    shard = manifest.directory / manifest.shards[1].url
    os.truncate(shard, 2048)
    with pytest.raises(IntegrityError, match=r"shard-000001.*ends before"):
        keys(make(reader), 5)


def test_a_lost_shard_is_as_bad_as_its_samples(tmp_path: Path) -> None:
    manifest = build_toy(tmp_path)
    (manifest.directory / manifest.shards[3].url).unlink()
    reader = SampleReader(manifest)
    quarantine, met = lenient(reader)
    kept = set(itertools.chain(*keys(make(reader, quarantine=quarantine), 5)))
    assert kept == {f"toy-train-{n:06d}" for n in range(48)}
    assert len(quarantine) == len(met) == 12
    assert {incident.reason for incident in met} == {"missing_shard"}


def test_a_rank_without_a_part_is_refused(reader: SampleReader) -> None:
    with pytest.raises(UsageError, match="leaves some of 3"):
        make(reader, batch=2, world_size=3)


FEW_FILES = """
import os, resource, sys
from pathlib import Path
import numpy as np
from cmkd_scale.data.manifest import load_manifest
from cmkd_scale.data.stream import SampleReader

resource.setrlimit(resource.RLIMIT_NOFILE, (96, 96))
reader = SampleReader(load_manifest(Path(sys.argv[1])))
others = [open(os.devnull) for _ in range(int(sys.argv[2]))]  # what a trainer has open beside it
samples = reader.read(np.random.default_rng(0).permutation(len(reader)))
damaged = [sample for sample in samples if isinstance(sample, Exception)]
print(len(samples), len(damaged))
"""


@pytest.mark.parametrize("others", [0, 75])
def test_a_low_limit_of_open_files_damages_nothing(tmp_path: Path, others: int) -> None:
    manifest = build_toy(tmp_path, count=200, per_shard=1)
    done = subprocess.run(
        [sys.executable, "-c", FEW_FILES, manifest.directory, str(others)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["200", "0"]


PARENT = """
import itertools, os, sys, time
from pathlib import Path
from cmkd_scale.data.manifest import load_manifest
from cmkd_scale.data.stream import SampleReader
from tests.data.test_loader import make

if __name__ == "__main__":
    batches = make(SampleReader(load_manifest(Path(sys.argv[1]))), workers=2).batches()
    next(batches)
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(20):
        next(batches)
    print("still reading", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_program_that_fails_while_it_reads_ends_at_once(tmp_path: Path) -> None:
    manifest = build_toy(tmp_path)
    program = tmp_path / "parent.py"
    program.write_text(PARENT.replace("sys.stdin.readline()", "sys.exit(3)"))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    # The timeout is no measure: without the cure it waits for its workers for ever.
    done = subprocess.run(
        [sys.executable, program, manifest.directory], env=environment, check=False, timeout=120
    )
    assert done.returncode == 3


@pytest.mark.slow
def test_workers_outlive_signals_and_die_with_their_parent(tmp_path: Path) -> None:
    manifest = build_toy(tmp_path)
    program = tmp_path / "parent.py"
    program.write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(
        [sys.executable, program, manifest.directory],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        started = psutil.Process(parent.pid).children(recursive=True)
        workers = [child for child in started if "forkserver" in " ".join(child.cmdline())]
        assert len(workers) >= 3  # the server and two of them
        for worker in workers:
            worker.send_signal(signal.SIGTERM)
            worker.send_signal(signal.SIGUSR1)
        parent.stdin.write(b"go on\n")
        parent.stdin.flush()
        assert parent.stdout.readline() == b"still reading\n"
        assert all(worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
        parent.kill()
        _, alive = psutil.wait_procs(workers, timeout=60)
        assert not alive, "they outlived their parent"
