"""``teacher.cache``: outputs of a frozen teacher, written by ``cmkd memory``, read in its place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor

from cmkd_scale import distributed
from cmkd_scale.config import Config, with_changes
from cmkd_scale.data.labels import LabelMap
from cmkd_scale.data.teacher_outputs import (
    SAMPLES,
    OutputsManifest,
    Samples,
    TeacherOutputs,
    is_complete,
    read_manifest,
)
from cmkd_scale.data.write_outputs import begin, finish, left_shards, write_shard
from cmkd_scale.errors import UsageError
from cmkd_scale.memory.statistics import refuse_diverged
from cmkd_scale.stages.common import load_trained, with_data_of
from cmkd_scale.stages.pass_identity import fingerprint, machine_kinds
from cmkd_scale.stages.pass_plan import Plan
from cmkd_scale.stages.reading import CachedReading, LiveReading, Reading, Said, Start, progress
from cmkd_scale.stages.runs import lock
from cmkd_scale.stages.streams import SplitData, manifest_of

SHARD_BATCHES = 16
_SHARD_BYTES = 64 * 2**20
_SHOWN = 40  # characters of a part that differs
_REMEDY = "Set teacher.cache to another directory, or remove that one to have it written again."
_FIXED = ("teacher", "transform", "data", "labels", "batch_size", "mixed_precision")
_DIFFERS = {
    "teacher": "another teacher",
    "transform": "another transform",
    "data": "other shards",
    "labels": "other labels",
    "batch_size": "another memory.batch_size",
    "mixed_precision": "another memory.mixed_precision",
    "machines": "unfinished, and begun on another kind of machine or version",
    "starts": "unfinished, and cut into other files by another version",
}


def is_written(config: Config, *splits: str) -> bool:
    """Whether ``teacher.cache`` holds what is asked of it, if anything is; a collective call."""
    cache = config.teacher.cache
    written = cache is None or all(is_complete(cache / split) for split in splits)
    return all(distributed.gather_integers(int(written)))


def open_reading(start: Start, data: SplitData, split: str) -> Reading:
    """The teacher's outputs for a split, read from ``teacher.cache`` if that is set.

    What the cache lacks is computed first, from where an earlier try has ended; a collective call.

    Raises:
        UsageError: the cache is of another teacher, transform, data or batch size, or unfinished
            and begun on other machines; or it cannot be written.
        IntegrityError: it is damaged, or more samples are than allowed.
        PreemptedError: a signal asked for a stop.
    """
    cache = start.config.teacher.cache
    if cache is None:
        return LiveReading(start, data)
    directory = cache / split
    plan = Plan.make(data, start.config.memory.batch_size)
    wanted = _manifest(start, data, plan)
    distributed.run_on_main(lambda: _begin(directory, wanted))
    if not distributed.gather_integers(int(is_complete(directory)))[0]:
        _write(start, data, plan, wanted, directory)
    return CachedReading(start, data, _open(directory))


def open_cached(config: Config) -> TeacherOutputs:
    """The outputs of the teacher that a student reads sample by sample; a collective call.

    What the config names is compared with them: the teacher of ``teacher.run``, and the manifest
    of its data; of the shards nothing is read. Without ``teacher.run`` they stand for themselves.

    Raises:
        UsageError: there are none, or they are of another teacher, transform or data.
        IntegrityError: they are damaged.
    """
    teacher, run = config.teacher, config.teacher.run
    cache, split = Path(str(teacher.cache)), config.data.train_split
    if run is None:
        if teacher.shards is not None:
            raise UsageError(
                "teacher.shards names samples for the teacher of teacher.run, which is unset: "
                "unset it, too, since teacher.cache holds what the teacher says of its samples."
            )
        return _open(cache / split)
    trained = load_trained(run, "teacher")
    theirs = with_data_of(trained, config)
    if teacher.shards is not None:
        theirs = with_changes(theirs, {"data.shards": teacher.shards})
    split = theirs.data.train_split
    outputs = _open(cache / split)
    manifest = manifest_of(theirs, split)
    index = LabelMap.make(manifest.label_names, theirs.data.label_map).index
    wanted = fingerprint(trained, manifest, index)
    _refuse_other(outputs.directory, outputs.manifest, wanted)
    return outputs


def _open(directory: Path) -> TeacherOutputs:
    found: list[TeacherOutputs] = []
    distributed.run_together(lambda: found.append(TeacherOutputs(directory)))
    (outputs,) = found
    if not distributed.same_digest(outputs.manifest.sha256[SAMPLES]):
        raise UsageError(
            f"The processes find different outputs in {directory}: put teacher.cache on a file "
            "system that all machines share."
        )
    return outputs


def _manifest(start: Start, data: SplitData, plan: Plan) -> OutputsManifest:
    """What the outputs of a split are to be; a collective call."""
    head, index = start.trained.model.head, data.reader.label_index
    row_bytes = 4 * (head.in_features + head.out_features)
    size = start.config.memory.batch_size
    batches = max(1, min(SHARD_BATCHES, _SHARD_BYTES // (row_bytes * size)))
    return OutputsManifest(
        fingerprint=fingerprint(start.trained, data.reader.manifest, index or ()),
        machines=machine_kinds(start.device),
        batch_size=size,
        mixed_precision=start.config.memory.mixed_precision,
        label_names=list(data.label_names),
        feature_dim=head.in_features,
        starts=[*plan.bounds[:-1:batches].tolist(), len(plan.places)],
    )


def _begin(directory: Path, wanted: OutputsManifest) -> None:
    """On rank 0: take up a directory, or make it; refuse one of anything else."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        finished = is_complete(directory)
        if not finished:
            lock(directory, "teacher.cache")
    except OSError as error:
        raise UsageError(f"{directory} cannot be written: {error}. {_REMEDY}") from None
    found = read_manifest(directory)
    if found is None:
        begin(directory, wanted)
    else:
        # What is finished serves on any machine, as a memory does; what is not must go on where
        # every output comes out the same, or no machine could make it again.
        grows = () if finished else ("machines", "starts")
        _refuse_other(directory, found, {name: _parts(wanted)[name] for name in (*_FIXED, *grows)})


def _parts(manifest: OutputsManifest) -> dict[str, JsonValue]:
    others = manifest.model_dump(include={"batch_size", "mixed_precision", "machines", "starts"})
    return {**manifest.fingerprint, **others}


def _refuse_other(
    directory: Path, manifest: OutputsManifest, wanted: Mapping[str, JsonValue]
) -> None:
    """Refuse outputs that differ from what is wanted in any of its parts.

    Raises:
        UsageError: naming all that differ.
    """
    found = _parts(manifest)
    different = [
        f"{_DIFFERS[name]} ({_short(found.get(name), value)} there, "
        f"{_short(value, found.get(name))} here)"
        for name, value in wanted.items()
        if found.get(name) != value
    ]
    if different:
        raise UsageError(
            f"The teacher's outputs in {directory} are of something else: {'; '.join(different)}. "
            f"{_REMEDY}"
        )


def _short(value: JsonValue, other: JsonValue) -> str:
    """What a part is, or of several options those that are not as in the other."""
    if isinstance(value, dict) and isinstance(other, dict):
        value = {name: own for name, own in value.items() if other.get(name) != own}
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


class _Filling:
    """Shards of one rank, each written when its last batch has passed."""

    def __init__(self, plan: Plan, manifest: OutputsManifest, directory: Path) -> None:
        self._plan, self._manifest, self._directory = plan, manifest, directory
        self._starts = np.array(manifest.starts)
        self._features, self._logits, self._present = self._empty(0)

    def _empty(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        width, classes = self._manifest.feature_dim, len(self._manifest.label_names)
        present = torch.zeros(count, dtype=torch.bool)
        return torch.zeros(count, width), torch.zeros(count, classes), present

    def add(self, number: int, said: Said) -> None:
        """Take a batch of the plan; those of a shard come in order.

        Raises:
            IntegrityError: a feature is not finite or too large.
            UsageError: the shard cannot be written.
        """
        left, _, output = said
        features = output.features.float().cpu()
        refuse_diverged(features)
        begin, stop = self._plan.bounds[number], self._plan.bounds[number + 1]
        shard = int(np.searchsorted(self._starts, begin, side="right")) - 1
        first, last = self._starts[shard], self._starts[shard + 1]
        if begin == first:
            self._features, self._logits, self._present = self._empty(int(last - first))
        rows = begin - first + np.searchsorted(self._plan.batch(number), left)
        self._features[rows] = features
        self._logits[rows] = output.logits.float().cpu()
        self._present[rows] = True
        if stop == last:
            missing = (~self._present).nonzero()[:, 0]
            write_shard(self._directory, shard, self._features, self._logits, missing)


def _write(
    start: Start, data: SplitData, plan: Plan, manifest: OutputsManifest, directory: Path
) -> None:
    """Pass what is left of a split through the teacher, a shard at a time; a collective call."""
    left: list[int] = []
    distributed.run_on_main(lambda: left.extend(left_shards(directory)))
    finished = distributed.gather_rows(torch.tensor(left, dtype=torch.int64)).numpy()
    todo = np.setdiff1d(np.arange(len(manifest.starts) - 1), finished)
    mine = np.array_split(todo, distributed.world_size())[distributed.rank()]
    # Of the b batches, those of this rank's shards.
    shard_of = np.searchsorted(np.array(manifest.starts), plan.bounds[:-1], side="right") - 1
    numbers = np.flatnonzero(np.isin(shard_of, mine)).tolist()
    parts = [plan.batch(number) for number in numbers]
    filling = _Filling(plan, manifest, directory)
    total, name = len(plan.places), data.reader.manifest.name
    done = total - int(np.diff(manifest.starts)[todo].sum())
    with progress(f"samples of {name} into {directory}") as tell:
        tell(done, total)

        def take(index: int, said: Said) -> None:
            nonlocal done
            filling.add(numbers[index], said)
            # Ranks have nearly equal shares, so this one's count stands for all.
            done += len(parts[index]) * distributed.world_size()
            tell(min(done, total), total)

        most = max(distributed.gather_integers(len(parts)))
        LiveReading(start, data).take_together(parts, most, take)
    distributed.run_on_main(lambda: finish(directory, manifest, _samples(start, data, plan)))


def _samples(start: Start, data: SplitData, plan: Plan) -> Samples:
    head = start.trained.model.head
    return Samples(
        places=torch.from_numpy(plan.places),
        labels=torch.from_numpy(data.labels[plan.places].astype(np.int64)),
        keys=tuple(data.reader.key(place) for place in plan.places.tolist()),
        head_weight=head.weight.detach().float().cpu(),
        head_bias=head.bias.detach().float().cpu(),
    )
