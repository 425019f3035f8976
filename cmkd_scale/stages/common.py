"""What the stages share: opening data, building and loading a model."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cmkd_scale import distributed
from cmkd_scale.config import Config, with_changes
from cmkd_scale.data.processors import Processor
from cmkd_scale.errors import IntegrityError, UsageError
from cmkd_scale.memory.bank import PrototypeMemory, load_memory
from cmkd_scale.models.backbone_spec import BackboneSpec
from cmkd_scale.models.model import Model, build_model
from cmkd_scale.stages.backbones import DIRECTORY, backbone_spec, kept_processor
from cmkd_scale.stages.runs import read_config, versions
from cmkd_scale.stages.streams import SplitData, open_split
from cmkd_scale.training.checkpoint import blob_name, load_newest
from cmkd_scale.training.engine import AVERAGE_FILE, MODEL_FILE, Engine
from cmkd_scale.training.projectors import Projector

_log = logging.getLogger(__name__)

DEFAULT_FEATURE_DIM = 128

_OF_THE_TEACHER = (
    "shards",
    "modality",
    "source",
    "options",
    "label_map",
    "train_split",
    "validation_split",
)
"""Keys of ``data`` that are the teacher's own where ``data.shards`` is unset."""


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
    backbone: BackboneSpec | None = None

    def build(self, weights: Path | None = None) -> Model:
        """A model with fresh weights, its backbone's from a directory if one is given."""
        return build_model(
            encoder=self.encoder,
            shape=self.shape,
            width=self.width,
            depth=self.depth,
            feature_dim=self.feature_dim,
            classes=len(self.label_names),
            backbone=self.backbone,
            weights=weights,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values; without a backbone, those of versions that had none."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        backbone = values.pop("backbone")
        return values if backbone is None else {**values, "backbone": backbone.to_json()}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> ModelSpec:
        """The inverse of ``to_json`` after a trip through JSON."""
        lists = {"shape": tuple(value["shape"]), "label_names": tuple(value["label_names"])}
        about = value.get("backbone")
        backbone = None if about is None else BackboneSpec.from_json(about)
        return ModelSpec(**{**value, **lists, "backbone": backbone})


@dataclass(frozen=True, slots=True)
class Trained:
    """A model out of a finished run."""

    model: Model
    spec: ModelSpec
    config: Config
    state: dict[str, Any]
    taught_by: tuple[Taught, ...]
    processor: Processor | None = None
    """Of its backbone, if that has one."""


@dataclass(frozen=True, slots=True)
class Taught:
    """A memory that a student was aligned to, and the way from its features to that space."""

    memory: PrototypeMemory
    """In the student's classes."""
    projector: nn.Module


def start_engine(config: Config) -> Engine:
    """Join the launched world as the config says; a collective call.

    Raises:
        UsageError: the launch is not what it seems, or processes differ in version or config.
    """
    engine = Engine(
        mixed_precision=config.train.mixed_precision,
        world_size=config.run.world_size,
        collective_timeout_seconds=config.run.collective_timeout_seconds,
    )
    identity = f"{sorted(versions().items())} {config.digest()}"
    if not distributed.same_digest(hashlib.sha256(identity.encode()).hexdigest()):
        raise UsageError(
            "The processes run other versions of the program or its libraries, or other "
            f"configurations (here {identity}); give all machines the same environment and config."
        )
    return engine


def open_split_for(trained: Trained, config: Config, split: str) -> SplitData:
    """Open a split as a trained model reads it; a collective call.

    Raises:
        UsageError: the split has another modality or other label names than the model's.
    """
    data = open_split(
        with_changes(config, {"data.transform": trained.spec.transform}),
        split,
        lambda modality: trained.processor if modality == trained.spec.modality else None,
    )
    manifest = data.reader.manifest
    if manifest.modality != trained.spec.modality:
        raise UsageError(
            f"The model was trained on {trained.spec.modality}, and {manifest.address} holds "
            f"{manifest.modality}; give it shards of its own modality with data.shards=DIR."
        )
    if data.label_names != trained.spec.label_names:
        raise UsageError(
            f"The model was trained on other label names than those of {manifest.address}; "
            "give it shards with its own labels with data.shards=DIR."
        )
    return data


def with_data_of(trained: Trained, config: Config) -> Config:
    """The config with the shards that a model was trained on."""
    data = trained.config.model_dump(mode="json")["data"]
    return with_changes(config, {f"data.{key}": data[key] for key in _OF_THE_TEACHER})


def make_spec(config: Config, data: SplitData, feature_dim: int) -> ModelSpec:
    """The model that a config asks for on this data.

    Raises:
        UsageError: see ``backbone_spec``.
    """
    modality = data.reader.manifest.modality
    return ModelSpec(
        modality=modality,
        transform=dict(config.data.transform),
        encoder=config.model.encoder,
        shape=tuple(data.modality.shape),
        width=config.model.width,
        depth=config.model.depth,
        feature_dim=feature_dim,
        label_names=data.label_names,
        backbone=backbone_spec(config, modality, data.modality),
    )


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
    found = load_newest(run / "checkpoints") if config_file.exists() else None
    if found is None:
        raise UsageError(
            f"{run} holds no trained model to use as {role}. Train one with `cmkd {role} "
            f"--config FILE run.dir={run}`, or point to another run."
        )
    checkpoint, path = found
    try:
        spec = ModelSpec.from_json(checkpoint.state["model"])
        model = spec.build()
        weights = {**checkpoint.files[MODEL_FILE], **checkpoint.files.get(AVERAGE_FILE, {})}
        load_weights(model, weights)
        taught_by = taught_by_memories(path, weights)
        processor = kept_processor(spec.backbone, spec.modality, run / DIRECTORY)
    except (KeyError, TypeError, RuntimeError) as error:
        raise IntegrityError(
            f"Checkpoint {path} does not hold the model that its state describes ({error})."
        ) from None
    return Trained(
        model=model,
        spec=spec,
        config=read_config(run),
        state=checkpoint.state,
        taught_by=taught_by,
        processor=processor,
    )


def load_weights(model: Model, weights: Mapping[str, Tensor]) -> None:
    """Take the model's weights out of those of what was trained around it.

    Raises:
        RuntimeError: they are those of another model.
    """
    prefix = "model."
    model.load_state_dict(
        {
            name.removeprefix(prefix): value
            for name, value in weights.items()
            if name.startswith(prefix)
        }
    )


def projector_of(weights: Mapping[str, Tensor], number: int) -> nn.Module:
    """The way from a student's features to the space of its memory ``number``."""
    name = f"projectors.{number}"
    if f"{name}.weight" not in weights:
        return nn.Identity()
    matrix = weights[f"{name}.weight"]
    projector = Projector(matrix.shape[1], matrix.shape[0])
    projector.load_state_dict({"weight": matrix, "bias": weights[f"{name}.bias"]})
    return projector


def taught_by_memories(checkpoint: Path, weights: Mapping[str, Tensor]) -> tuple[Taught, ...]:
    """The memories that a checkpoint holds, with the projectors that were trained to them."""
    found: list[Taught] = []
    while (file := checkpoint / blob_name(len(found))).is_file():
        found.append(Taught(load_memory(file), projector_of(weights, len(found))))
    return tuple(found)


def weights_digest(model: Model) -> str:
    """SHA-256 of a model's parameters and buffers by name."""
    hasher = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        hasher.update(name.encode())
        hasher.update(value.detach().cpu().contiguous().numpy().tobytes())
    return hasher.hexdigest()
