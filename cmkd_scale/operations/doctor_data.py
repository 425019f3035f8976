"""What ``cmkd doctor`` asks of the data: there, whole, enough, and with the memory's labels."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path

from cmkd_scale.config import Config
from cmkd_scale.data.builtin import PREFIX
from cmkd_scale.data.labels import LabelReport
from cmkd_scale.data.locate import open_manifest
from cmkd_scale.data.manifest import REMEDY, Manifest
from cmkd_scale.data.shards import lost_shards
from cmkd_scale.data.storage import LocalDirectory
from cmkd_scale.errors import CmkdError
from cmkd_scale.files import file_digest
from cmkd_scale.memory.bank import load_memory
from cmkd_scale.operations.doctor_findings import Finding, attempt, blocker_of
from cmkd_scale.operations.doctor_machine import in_units
from cmkd_scale.stages.common import load_trained
from cmkd_scale.stages.streams import SplitData, make_draw
from cmkd_scale.stages.student import memory_files
from cmkd_scale.training.checkpoint import candidates, problems

_SAMPLED_BYTES = 256 * 2**20  # of shards that each rank reads to compare digests
_LARGE_SHIFT = 0.1  # total variation


def inputs(config: Config, splits: Sequence[str]) -> list[Finding]:
    """What the run reads is there and whole, on this rank; nothing here is a collective call.

    Args:
        config: of the run.
        splits: that it reads.
    """
    findings: list[Finding] = []
    for path in memory_files(config.memory.run):
        memory, problem = attempt("memory", lambda path=path: load_memory(path))  # type: ignore[misc]
        findings += problem
        if memory is not None:
            text = f"{path}: {len(memory.prototypes)} prototypes, digest right"
            findings.append(Finding("memory", "ok", text))
    teacher = config.teacher.run
    if teacher is not None:
        trained, problem = attempt("teacher", lambda: load_trained(Path(str(teacher)), "teacher"))
        findings += problem
        if trained is not None:
            text = f"{teacher}: step {trained.state['step']}, digests right"
            findings.append(Finding("teacher", "ok", text))
    if config.data.shards is not None and not config.data.shards.startswith(PREFIX):
        for split in splits:
            manifest, problem = attempt("shards", lambda split=split: _manifest(config, split))  # type: ignore[misc]
            findings += problem or lost(manifest)
    return findings


def _manifest(config: Config, split: str) -> Manifest:
    return open_manifest(
        str(config.data.shards),
        split=split,
        modality=config.data.modality,
        cache_limit_bytes=config.data.cache_limit_bytes,
    )


def lost(manifest: Manifest | None) -> list[Finding]:
    """Shards that are missing, or have another size, in one finding."""
    if manifest is None:
        return []
    errors = [error for _, error in lost_shards(manifest)]
    if not errors:
        return []
    more = f" So are {len(errors) - 1} more of its shards." if len(errors) > 1 else ""
    return [Finding("shards", "blocker", f"{errors[0]}{more}", REMEDY, integrity=True)]


def sampled(manifest: Manifest, rank: int, budget: int = _SAMPLED_BYTES) -> list[Finding]:
    """Digests of some shards of a split, other ones on each rank.

    Args:
        manifest: of the split.
        rank: of this process.
        budget: bytes to read; one shard at least.
    """
    shards = list(manifest.shards)
    random.Random(f"{manifest.digest} {rank}").shuffle(shards)
    read, done = 0, 0
    for shard in shards:
        if done and read + shard.filesize > budget:
            break
        read, done = read + shard.filesize, done + 1
        try:
            # What is fetched from a server is checked on its way.
            os.close(manifest.storage.open(shard.url, size=shard.filesize, sha256=shard.sha256))
        except CmkdError as error:
            return [blocker_of("shards", error)]
        local = isinstance(manifest.storage, LocalDirectory)
        if local and file_digest(manifest.directory / shard.url) != shard.sha256:
            return [
                Finding(
                    "shards",
                    "blocker",
                    f"{manifest.address}/{shard.url} has another SHA-256 than its manifest says.",
                    f"{REMEDY} `cmkd shards verify {manifest.address}` looks at all of it.",
                    integrity=True,
                )
            ]
    text = f"{manifest.name}: {done} of {len(shards)} shards read ({in_units(read)}), digests right"
    return [Finding("shards", "ok", text)]


def counts(config: Config, data: SplitData) -> list[Finding]:
    """There are samples enough for a batch, and of each class."""
    epoch = make_draw(config, data).samples
    batch = config.train.global_batch_size
    if batch > epoch:
        return [
            Finding(
                "samples",
                "warning",
                f"A step reads {batch} samples, and an epoch has {epoch}: each is in a batch "
                f"{batch / epoch:.1f} times.",
                "Lower train.global_batch_size, or train on more data.",
            )
        ]
    seen = config.train.steps * batch / epoch
    return [Finding("samples", "ok", f"{epoch} an epoch; the run reads {seen:.1f} epochs")]


def labels(report: LabelReport) -> list[Finding]:
    """The student's classes are among the memory's, in like shares."""
    if not report.shared:
        return [
            Finding(
                "labels",
                "blocker",
                f"{report.here} and {report.there} have no class in common: nothing would be "
                "taught.",
                "Modalities meet by label names: rename with data.label_map.",
            )
        ]
    line, *others = report.lines()
    if report.only_here:
        return [
            Finding(
                "labels",
                "warning",
                " ".join([line + ".", *(f"{other}." for other in others)]),
                "Rename classes that are the same with data.label_map; the teacher says nothing of "
                "the others.",
            )
        ]
    if report.total_variation > _LARGE_SHIFT:
        return [
            Finding(
                "labels",
                "note",
                f"{line}.",
                "method.reweight=true (the default) follows the student's shares; "
                "data.sampling=balanced evens them out.",
            )
        ]
    return [Finding("labels", "ok", line)]


def checkpoints(directory: Path) -> list[Finding]:
    """The newest checkpoint of a run is valid, if it has any."""
    there = candidates(directory)
    faults = []
    for path in there:
        found = problems(path)
        if not found:
            break
        faults.append(f"{path.name}: {found[0]}")
    if not faults:
        text = f"continues from {there[0].name}" if there else "none yet"
        return [Finding("checkpoints", "ok", text)]
    if len(faults) == len(there):
        return [
            Finding(
                "checkpoints",
                "blocker",
                f"No checkpoint in {directory} is valid ({'; '.join(faults)}).",
                "Restore one from a copy, or remove the directory to start the run again.",
                integrity=True,
            )
        ]
    return [
        Finding(
            "checkpoints",
            "warning",
            f"The newest checkpoints in {directory} are not valid ({'; '.join(faults)}): the run "
            f"would go on from {there[len(faults)].name}.",
            "Restore them from a copy if those steps are worth it.",
        )
    ]
