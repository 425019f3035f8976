"""What the stages share: run directory, data, building and loading a model, results."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from cmkd_scale import __version__, distributed
from cmkd_scale.config import Config, make_config, save_config
from cmkd_scale.data.builtin import locate_shards
from cmkd_scale.data.loader import TrainLoader
from cmkd_scale.data.modalities import MODALITIES, Modality
from cmkd_scale.data.shards import load_manifest, resolve
from cmkd_scale.data.stream import SampleReader, labelled_subset
from cmkd_scale.errors import IntegrityError, UsageError, did_you_mean
from cmkd_scale.models.model import Model, build_model
from cmkd_scale.training.checkpoint import load_newest
from cmkd_scale.training.engine import Engine

_log = logging.getLogger(__name__)

DEFAULT_FEATURE_DIM = 128


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What rebuilds a model without its data; stored in every checkpoint."""

    modality: str
    transform: dict[str, float | int]
    encoder: str | None
    shape: tuple[int, ...]
    width: int
    depth: int
    feature_dim: int
    label_names: tuple[str, ...]

    def build(self) -> Model:
        """A model with fresh weights."""
        return build_model(
            encoder=self.encoder,
            shape=self.shape,
            width=self.width,
            depth=self.depth,
            feature_dim=self.feature_dim,
            classes=len(self.label_names),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> ModelSpec:
        """The inverse of ``to_json`` after a trip through JSON."""
        lists = {"shape": tuple(value["shape"]), "label_names": tuple(value["label_names"])}
        return ModelSpec(**{**value, **lists})


@dataclass(frozen=True, slots=True)
class SplitData:
    """A split that is ready to be read."""

    reader: SampleReader
    modality: Modality
    label_names: tuple[str, ...]

    def labelled(self) -> NDArray[np.int64]:
        """Places of all labelled samples."""
        return labelled_subset(
            self.reader.index, classes=len(self.label_names), n_per_class=None, seed=0
        )


@dataclass(frozen=True, slots=True)
class Trained:
    """A model out of a finished run."""

    model: Model
    spec: ModelSpec
    config: Config
    state: dict[str, Any]


def start_engine(config: Config) -> Engine:
    """Join the launched world as the config says."""
    return Engine(mixed_precision=config.train.mixed_precision, world_size=config.run.world_size)


def open_split(config: Config, split: str) -> SplitData:
    """Open a split of the run's shards; a collective call, since it may build them.

    Raises:
        UsageError: no such shards or split, or an option the modality does not have.
    """
    config.require("data.shards")
    root = locate_shards(
        str(config.data.shards), source=config.data.source, options=config.data.options
    )
    manifest = load_manifest(resolve(root, split=split, modality=config.data.modality))
    modality = make_modality(manifest.modality, config.data.transform)
    return SplitData(SampleReader(manifest), modality, manifest.label_names)


def make_modality(name: str, transform: Mapping[str, float | int]) -> Modality:
    """A modality with some of its options set.

    Raises:
        UsageError: unknown modality or option.
    """
    if name not in MODALITIES:
        raise UsageError(f"Modality '{name}' is unknown; {did_you_mean(name, MODALITIES)}")
    kind = MODALITIES[name]
    valid = [field.name for field in fields(kind)]
    for option in transform:
        if option not in valid:
            raise UsageError(
                f"data.transform.{option} is not an option of modality '{name}'; "
                f"{did_you_mean(option, valid)}"
            )
    return kind(**transform)


def make_train_loader(config: Config, data: SplitData) -> TrainLoader:
    """This rank's endless training batches."""
    subset = labelled_subset(
        data.reader.index,
        classes=len(data.label_names),
        n_per_class=config.data.n_per_class,
        seed=config.run.seed,
    )
    return TrainLoader(
        data.reader,
        data.modality,
        subset,
        global_batch_size=config.train.global_batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        seed=config.run.seed,
        augment=config.data.augment,
        workers=config.data.workers,
        cache_bytes=config.data.cache_bytes,
    )


def make_spec(config: Config, data: SplitData, feature_dim: int) -> ModelSpec:
    """The model that a config asks for on this data."""
    return ModelSpec(
        modality=data.reader.manifest.modality,
        transform=dict(config.data.transform),
        encoder=config.model.encoder,
        shape=tuple(data.modality.shape),
        width=config.model.width,
        depth=config.model.depth,
        feature_dim=feature_dim,
        label_names=data.label_names,
    )


def open_run(config: Config, stage: str) -> Path:
    """Make or take up the run directory; a collective call.

    Raises:
        UsageError: ``run.dir`` is unset, not writable, or holds a run of another stage or
            another configuration.
    """
    config.require("run.dir")
    directory = Path(str(config.run.dir))
    if distributed.is_main():
        try:
            directory.mkdir(parents=True, exist_ok=True)
            _check_same_run(directory, config, stage)
            save_config(config, directory / "config.yaml")
            write_json(directory / "env.json", _environment(stage))
        except OSError as error:
            raise UsageError(
                f"The run directory {directory} cannot be written: {error}. Choose another with "
                "run.dir=DIR or make it writable."
            ) from None
    distributed.barrier()
    return directory


def load_trained(run: Path, role: str) -> Trained:
    """The model of the newest valid checkpoint of a run.

    Args:
        run: a run directory of ``cmkd teacher`` or ``cmkd student``.
        role: what it is needed as, for the message.

    Raises:
        UsageError: no run or no checkpoint there.
        IntegrityError: no checkpoint there is valid.
    """
    config_file = run / "config.yaml"
    found = load_newest(run / "checkpoints") if config_file.is_file() else None
    if found is None:
        raise UsageError(
            f"{run} holds no trained model to use as {role}. Train one with `cmkd {role} "
            f"--config FILE run.dir={run}`, or point to another run."
        )
    checkpoint, path = found
    try:
        spec = ModelSpec.from_json(checkpoint.state["model"])
        model = spec.build()
        prefix = "model."
        weights = {
            name.removeprefix(prefix): value
            for name, value in checkpoint.files["model.safetensors"].items()
            if name.startswith(prefix)
        }
        model.load_state_dict(weights)
    except (KeyError, TypeError, RuntimeError) as error:
        raise IntegrityError(
            f"Checkpoint {path} does not hold the model that its state describes ({error})."
        ) from None
    model.eval()
    tree = yaml.safe_load(config_file.read_text())
    return Trained(
        model=model,
        spec=spec,
        config=make_config(tree, source=str(config_file)),
        state=checkpoint.state,
    )


def write_results(
    directory: Path,
    *,
    stage: str,
    config: Config,
    metrics: Mapping[str, Any],
    began: float,
    name: str = "results.json",
    **more: Any,
) -> dict[str, Any]:
    """Write ``results.json`` on rank 0 and return its content on all.

    Args:
        directory: the run directory.
        stage: the verb.
        config: resolved configuration.
        metrics: e.g. ``test/accuracy``.
        began: ``time.perf_counter()`` at the start of the stage.
        name: file name.
        more: further top-level keys.
    """
    results = {
        "stage": stage,
        "seed": config.run.seed,
        "metrics": dict(metrics),
        "config_digest": config.digest(),
        "wall_seconds": round(time.perf_counter() - began, 3),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions(),
        **more,
    }
    if distributed.is_main():
        write_json(directory / name, results)
    return results


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def versions() -> dict[str, str]:
    """Versions of what shapes a result."""
    found = {"cmkd_scale": __version__, "python": platform.python_version()}
    for package in ("torch", "accelerate", "transformers", "numpy"):
        found[package] = metadata.version(package)
    return found


def weights_digest(model: Model) -> str:
    """SHA-256 of a model's parameters and buffers by name."""
    hasher = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        hasher.update(name.encode())
        hasher.update(value.detach().cpu().contiguous().numpy().tobytes())
    return hasher.hexdigest()


def _environment(stage: str) -> dict[str, Any]:
    return {
        "stage": stage,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "command": sys.argv,
        "world_size": distributed.world_size(),
        "versions": versions(),
    }


def _check_same_run(directory: Path, config: Config, stage: str) -> None:
    """Refuse to continue a run under another stage or configuration."""
    config_file, env_file = directory / "config.yaml", directory / "env.json"
    if not config_file.is_file() or not env_file.is_file():
        return
    try:
        before = make_config(yaml.safe_load(config_file.read_text()), source=str(config_file))
        stage_before = json.loads(env_file.read_text())["stage"]
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise IntegrityError(
            f"{directory} holds a run whose config.yaml or env.json is damaged ({error}); use "
            "another run.dir."
        ) from None
    remedy = "Use another run.dir, or remove that directory to start again."
    if stage_before != stage:
        raise UsageError(f"{directory} is a run of `cmkd {stage_before}`. {remedy}")
    if before.digest() != config.digest():
        changed = ", ".join(_differences(before.model_dump(), config.model_dump())) or "options"
        raise UsageError(
            f"{directory} holds a run with another configuration (different: {changed}), and "
            f"continuing it would mix two runs. {remedy}"
        )


def _differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in after.items():
        old = before.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            found += _differences(old, value, f"{prefix}{key}.")
        elif value != old:
            found.append(f"{prefix}{key}")
    return found
