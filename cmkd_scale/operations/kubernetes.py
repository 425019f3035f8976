"""``cmkd kubernetes render``: manifests that run a chain of stages on a cluster.

The chain is followed back from one config: the run that it names as ``memory.run`` or
``teacher.run`` is made by the config beside it with that ``run.dir``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from cmkd_scale import __version__
from cmkd_scale.config import Config, load_config
from cmkd_scale.errors import UsageError
from cmkd_scale.files import write_atomically
from cmkd_scale.operations.kubernetes_kinds import KINDS
from cmkd_scale.operations.kubernetes_pod import APP, Manifest, Options, Stage
from cmkd_scale.operations.kubernetes_surroundings import (
    config_map,
    in_pod,
    network_policy,
    volume_claim,
)

_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")  # "-memory-2-0-12345" makes it a host's
_OBJECT = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_QUANTITY = re.compile(r"[1-9][0-9]*(Ki|Mi|Gi|Ti)")
_FORMS = {
    "name": (_NAME, "a lower-case word of letters, digits and dashes, 40 at most"),
    "namespace": (_NAME, "the name of a namespace"),
    "queue": (_OBJECT, "the name of a local queue"),
    "pvc": (_OBJECT, "the name of a claim"),
    "secret": (_OBJECT, "the name of a secret"),
    **{name: (_QUANTITY, "a size as in 32Gi") for name in ("memory", "shm", "scratch", "pvc_size")},
}
_AT_LEAST = {
    "nodes": 1,
    "gpus_per_node": 0,
    "processes_per_node": 1,
    "cpus_per_process": 1,
    "grace_seconds": 1,
    "max_restarts": 0,
}


def render(file: Path, kind: str, out: Path, **options: Any) -> dict[str, Any]:
    """Write the manifests of the chain that ends in the stage of ``file``.

    Args:
        file: the config of that stage.
        kind: a key of ``KINDS``.
        out: directory; files of the same names are replaced.
        options: fields of ``Options``; one that is None or absent has its default.

    Returns:
        ``kind``, ``name``, ``stages``, ``files``, and as ``expects`` the directories of runs that
        the chain builds on and that no config beside ``file`` makes.

    Raises:
        UsageError: a config or an option is wrong, or a config names a path that no pod has.
    """
    found, expects = _chain(file)
    cluster = _options(found[-1][1], {k: v for k, v in options.items() if v is not None})
    stages = _stages(found)
    surroundings = [config_map(stages, cluster), network_policy(kind, cluster)]
    if cluster.pvc_size is not None:
        surroundings.append(volume_claim(cluster.pvc_size, cluster))
    files = {"surroundings.yaml": surroundings, **KINDS[kind](stages, cluster)}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, objects in files.items():
            write_atomically(out / name, _yaml(objects).encode())
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error}.") from None
    return {
        "kind": kind,
        "name": cluster.name,
        "stages": [stage.name for stage in stages],
        "files": [str(out / name) for name in files],
        "expects": expects,
    }


class _Block(yaml.SafeDumper):
    """Writes texts of several lines as such: the configs in a ConfigMap."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Block.add_representer(str, _text)
_Block.ignore_aliases = lambda self, data: True  # type: ignore[method-assign]


def _yaml(objects: list[Manifest]) -> str:
    return yaml.dump_all(objects, Dumper=_Block, sort_keys=False, width=100)


def _options(config: Config, given: dict[str, Any]) -> Options:
    """The options, checked.

    Raises:
        UsageError: naming all that are wrong.
    """
    build = "cuda" if given.get("gpus_per_node") else "cpu"
    made = Options(
        **{"name": _default_name(config), "image": f"{APP}:{__version__}-{build}", **given}
    )
    problems = [
        f"{name} {getattr(made, name)!r} is not {form}"
        for name, (pattern, form) in _FORMS.items()
        if getattr(made, name) is not None and not pattern.fullmatch(getattr(made, name))
    ]
    problems += [
        f"{name} must be at least {least}, not {getattr(made, name)}"
        for name, least in _AT_LEAST.items()
        if getattr(made, name) < least
    ]
    if not re.fullmatch(r"\S+", made.image) or made.image.endswith(":latest"):
        problems.append(f"image {made.image!r} must name one version of it, not the latest")
    if problems:
        raise UsageError(f"This cannot be rendered: {'; '.join(problems)}.")
    return made


def _default_name(config: Config) -> str:
    """After the directory that the runs of the chain share, by convention."""
    word = Path(str(config.run.dir)).parent.name.lower()
    return re.sub(r"[^a-z0-9]+", "-", word).strip("-")[:40].strip("-") or "cmkd"


def _stages(found: list[tuple[str, Config]]) -> list[Stage]:
    """Stages with names of their own: several memories are numbered."""
    verbs = [verb for verb, _ in found]
    stages = []
    for position, (verb, config) in enumerate(found):
        number = verbs[: position + 1].count(verb)
        name = verb if verbs.count(verb) == 1 else f"{verb}-{number}"
        stages.append(Stage(name, verb, in_pod(config)))
    return stages


def _chain(file: Path) -> tuple[list[tuple[str, Config]], list[str]]:
    """Verbs and configs in the order in which they must run, and the runs that must be there."""
    neighbours = _neighbours(file)
    found: dict[Path, tuple[str, Config]] = {}
    expects: list[str] = []

    def follow(config: Config, later: tuple[Path, ...]) -> None:
        config.require("run.dir")
        own = Path(str(config.run.dir))
        if own in later:
            raise UsageError(f"The run {own} builds on itself: see memory.run and teacher.run.")
        for run in _builds_on(config):
            if run in neighbours and run not in found:
                follow(neighbours[run], (*later, own))
            elif run not in found and str(run) not in expects:
                expects.append(str(run))
        found[own] = (_verb(config), config)

    follow(load_config(file), ())
    return list(found.values()), expects


def _neighbours(file: Path) -> dict[Path, Config]:
    """Configs beside ``file`` by their run's directory; those of other programs are none."""
    found: dict[Path, Config] = {}
    for other in sorted(file.parent.glob("*.y*ml")):
        try:
            config = load_config(other)
        except UsageError:
            continue
        if config.run.dir is not None:
            found[config.run.dir] = config
    return found


def _builds_on(config: Config) -> list[Path]:
    memories = config.memory.run if isinstance(config.memory.run, list) else [config.memory.run]
    files = [path for path in memories if path is not None]
    runs = [path.parent if path.suffix == ".safetensors" else path for path in files]
    return [*([] if config.teacher.run is None else [config.teacher.run]), *runs]


def _verb(config: Config) -> str:
    """The stage that a config is for, by what it builds on."""
    if config.memory.run is not None or config.method.name not in (None, "ce"):
        return "student"
    return "teacher" if config.teacher.run is None else "memory"
