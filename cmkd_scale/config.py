"""YAML -> validated configuration; overrides ``a.b=c``; all errors at once.

A config file is a short diff over the defaults in ``config_sections``; ``base: other.yaml``
starts it from another file. The resolved configuration is saved in the run directory. It
stops at the builders: layers and losses take flat keyword arguments and never see a config.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from cmkd_scale.config_sections import (
    DataConfig,
    MemoryConfig,
    MethodConfig,
    ModelConfig,
    MonitorConfig,
    RunConfig,
    Section,
    TeacherConfig,
    TrainConfig,
)
from cmkd_scale.errors import UsageError, did_you_mean
from cmkd_scale.files import write_atomically

_SHAPES_NO_RESULT: dict[str, Any] = {
    "run": {"dir", "world_size", "collective_timeout_seconds", "watchdog_seconds"},
    "data": {"workers", "cache_bytes", "cache_limit_bytes", "max_bad_fraction", "log_order"},
    "train": {
        "gradient_accumulation_steps",
        "activation_checkpointing",
        "compile",
        "max_rollbacks",
        "max_checkpoint_failures",
        "check_ranks_every_steps",
        "log_every_steps",
        "checkpoint_every_steps",
        "keep_checkpoints",
    },
    "monitor": True,
}
"""Keys that may change when a run is continued."""

_ADDED: dict[str, set[str]] = {
    "model": {
        "backbone",
        "revision",
        "backbone_config",
        "tuning",
        "lora_rank",
        "lora_alpha",
        "lora_targets",
        "pooling",
        "attention",
    },
    "teacher": {"cache"},
    "memory": {"mixed_precision"},
}
"""Keys that runs were begun without: at their defaults they have no part in the digest, so that
a newer version continues those runs."""


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
        for section, names in _ADDED.items():
            usual = Config.model_fields[section].default.model_dump(mode="json")
            for name in names:
                if content[section][name] == usual[name]:
                    del content[section][name]
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
