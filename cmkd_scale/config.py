"""YAML -> validated configuration; overrides ``a.b=c``; all errors at once.

A config file is a short diff over the defaults below; ``base: other.yaml`` starts it from
another file. The resolved configuration is saved in the run directory. It stops at the
builders: layers and losses take flat keyword arguments and never see a config object.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cmkd_scale.errors import UsageError, did_you_mean
from cmkd_scale.files import write_atomically


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused, fields explain themselves."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)


class RunConfig(Section):
    """Where a run lives and what makes it repeatable."""

    dir: Path | None = None
    """Run directory; a stage started again on it continues from its newest valid checkpoint."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of initial weights, order, augmentation and labelled subset."""
    world_size: int | None = Field(None, ge=1)
    """Number of processes this run must have; unset takes what the launcher gives."""


class DataConfig(Section):
    """What is read, and how it becomes tensors."""

    shards: str | None = None
    """A directory of shards or ``builtin:numbers/MODALITY``, built into the cache on first use."""
    modality: str | None = None
    """Which modality to read when the directory holds several."""
    source: Path | None = None
    """For ``builtin:``: directory of the raw data (for ``numbers/audio`` the FSDD)."""
    options: dict[str, str | int | float] = Field(default_factory=dict)
    """For ``builtin:``: options of the data set's builder, as in ``cmkd shards build``."""
    n_per_class: int | None = Field(None, ge=1)
    """Train on this many labelled samples a class, chosen by ``run.seed``; unset: on all."""
    train_split: str = "train"
    """Split to train on, and to build the memory from."""
    validation_split: str = "validation"
    """Held-out split for the teacher's risk in the memory."""
    test_split: str = "test"
    """Split to evaluate on; never used for any choice."""
    workers: int = Field(0, ge=0)
    """Decoding processes of each rank; 0 decodes in the training process."""
    cache_bytes: int = Field(512 * 2**20, ge=0)
    """Decoded samples kept in memory by each process, at most this many bytes."""
    augment: bool = True
    """Augment training samples."""
    transform: dict[str, float | int] = Field(default_factory=dict)
    """Options of the modality's decoding and augmentation, e.g. ``n_mels``, ``frames``."""


class ModelConfig(Section):
    """Encoder, projection to the shared feature space, head."""

    encoder: str | None = None
    """Name in the table of encoders; unset takes the usual one of the modality."""
    width: int = Field(16, ge=8)
    """Channels of the encoder's first stage (ResNet) or its hidden width (transformer)."""
    depth: int = Field(1, ge=1)
    """Blocks a stage (ResNet) or layers (transformer)."""
    feature_dim: int | None = Field(None, ge=2)
    """Width of the shared feature space; unset: 128, or the memory's for a student."""


class TeacherConfig(Section):
    """The teacher that a memory is built from."""

    run: Path | None = None
    """Run directory of a finished ``cmkd teacher``."""


class MemoryConfig(Section):
    """The prototype memory."""

    run: Path | None = None
    """Run directory of ``cmkd memory`` (or its ``memory.safetensors``) that a student uses."""
    prototypes_per_class: int | None = Field(None, ge=1)
    """Prototypes a class; unset: about the square root of the class's count, at most 64."""
    max_samples_per_class: int = Field(4096, ge=1)
    """Samples a class that k-means sees, chosen by a hash of their place."""
    temperature: float = Field(4.0, gt=0)
    """Temperature of the teacher's soft labels."""
    batch_size: int = Field(128, ge=1)
    """Samples in a forward pass of the frozen teacher."""


class MethodConfig(Section):
    """How the student learns from the memory; weights left unset are the method's own."""

    name: str | None = None
    """Name in the table of methods (``cmkd methods``); unset: ``ce`` for a teacher,
    ``ucmkd_global`` for a student."""
    control: Literal["none", "permuted", "random"] = "none"
    """Teacher replaced by one with permuted classes, or by an untrained one: a null control."""
    weights: dict[str, float] = Field(default_factory=dict)
    """Weight of a loss component by name, instead of the method's own."""
    epsilon_start: float = Field(0.1, gt=0)
    """Entropic regularisation at step 0, in units of the median cost."""
    epsilon_end: float = Field(0.02, gt=0)
    """Entropic regularisation at the end, reached geometrically half-way."""
    potential_rate: float = Field(0.1, gt=0)
    """Step size of the transport potentials."""


class TrainConfig(Section):
    """The one step loop."""

    steps: int = Field(300, ge=1)
    """Optimiser steps."""
    global_batch_size: int = Field(64, ge=1)
    """Samples a step over all processes."""
    learning_rate: float = Field(2e-3, gt=0)
    """Peak of the schedule."""
    warmup_steps: int = Field(20, ge=0)
    """Steps of linear warm-up before the cosine to zero."""
    weight_decay: float = Field(0.05, ge=0)
    """AdamW's decoupled weight decay of matrices; norms and biases are exempt."""
    gradient_clip_norm: float = Field(5.0, gt=0)
    """Largest norm of the whole gradient."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Autocast of the forward pass; losses are computed in float32 always."""
    log_every_steps: int = Field(10, ge=1)
    """Steps between two lines of ``metrics.jsonl``."""
    checkpoint_every_steps: int = Field(100, ge=1)
    """Steps between two checkpoints; one more is written at the end."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints kept."""


class MonitorConfig(Section):
    """How a run is watched."""

    prometheus_port: int | None = Field(None, ge=0, le=65535)
    """Port of ``/metrics`` and ``/healthz``; unset: no endpoint."""
    prometheus_address: str = "127.0.0.1"
    """Address that the endpoint listens on."""


_SHAPES_NO_RESULT: dict[str, Any] = {
    "run": {"dir", "world_size"},
    "data": {"workers", "cache_bytes"},
    "train": {"log_every_steps", "checkpoint_every_steps", "keep_checkpoints"},
    "monitor": True,
}
"""Keys that may change when a run is continued."""


class Config(Section):
    """A whole run."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    teacher: TeacherConfig = TeacherConfig()
    memory: MemoryConfig = MemoryConfig()
    method: MethodConfig = MethodConfig()
    train: TrainConfig = TrainConfig()
    monitor: MonitorConfig = MonitorConfig()

    def digest(self) -> str:
        """SHA-256 of everything that shapes the result."""
        content = self.model_dump(mode="json", exclude=_SHAPES_NO_RESULT)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def require(self, *names: str) -> None:
        """Refuse a config that leaves any of the dotted ``names`` unset.

        Raises:
            UsageError: naming all of them, with the override that would set each.
        """
        missing = [name for name in names if self._get(name) is None]
        if missing:
            lines = ", ".join(f"{name} (add {name}=...)" for name in missing)
            raise UsageError(f"This stage needs values that the config leaves unset: {lines}.")

    def _get(self, name: str) -> Any:
        value: Any = self
        for part in name.split("."):
            value = getattr(value, part)
        return value


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply overrides ``a.b=c`` and validate the whole.

    Raises:
        UsageError: listing every problem, with the nearest valid name of unknown keys.
    """
    tree = _read_yaml(path, seen=())
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise UsageError(f"Override '{override}' is not of the form section.key=value.")
        _assign(tree, name.split("."), _parse_value(override, text))
    return make_config(tree, source=str(path))


def make_config(tree: dict[str, Any], source: str = "the config") -> Config:
    """Validate a nested dictionary.

    Raises:
        UsageError: as ``load_config``.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems = [_explain(dict(detail)) for detail in error.errors()]
        listing = "\n".join(f"  - {problem}" for problem in problems)
        plural = "problem" if len(problems) == 1 else "problems"
        raise UsageError(f"{source} has {len(problems)} {plural}:\n{listing}") from None


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    write_atomically(path, text.encode())


def with_changes(config: Config, changes: dict[str, Any]) -> Config:
    """A copy of ``config`` with dotted names set to new values, validated again."""
    tree = config.model_dump(mode="json")
    for name, value in changes.items():
        _assign(tree, name.split("."), value)
    return make_config(tree)


def _read_yaml(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise UsageError(f"Config {path} is its own base; remove the `base:` line of one file.")
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"Config {path} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        place = " ".join(str(error).split())
        raise UsageError(f"Config {path} is not valid YAML: {place}.") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UsageError(
            f"Config {path} must be sections of `key: value` lines, not a {type(tree).__name__}."
        )
    base = tree.pop("base", None)
    if base is None:
        return tree
    merged = _read_yaml(path.parent / str(base), (*seen, path.resolve()))
    return _merge(merged, tree)


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in change.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = _merge(result[key], value)
        else:
            result[key] = value
    return result


def _parse_value(override: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UsageError(f"Override '{override}': its value is not valid YAML.") from None


def _assign(tree: dict[str, Any], parts: list[str], value: Any) -> None:
    node = tree
    for depth, part in enumerate(parts[:-1]):
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise UsageError(
                f"Override of {'.'.join(parts)}: {'.'.join(parts[: depth + 1])} is a value, "
                "not a section."
            )
        node = child
    node[parts[-1]] = value


def _explain(detail: dict[str, Any]) -> str:
    """One line on one validation error: where, what is wrong, the nearest valid name."""
    location = [str(part) for part in detail["loc"]]
    where = ".".join(location)
    if detail["type"] == "extra_forbidden":
        valid = _fields_at(location[:-1])
        return f"{where}: unknown key; {did_you_mean(location[-1], valid)}"
    shown = repr(detail.get("input"))
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return f"{where}: {detail['msg'][0].lower()}{detail['msg'][1:]} (got {shown})"


def _fields_at(location: Sequence[str]) -> list[str]:
    model: type[BaseModel] = Config
    for part in location:
        annotation = model.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
