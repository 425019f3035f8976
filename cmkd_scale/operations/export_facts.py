"""What an export says of its model: everything out of the run's own files, nothing assumed.

No path of a machine and no name of a host is in it: an export is made to be passed on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cmkd_scale import __version__
from cmkd_scale.config import Config
from cmkd_scale.data.builtin import PREFIX
from cmkd_scale.data.locate import open_manifest
from cmkd_scale.data.manifest import Manifest
from cmkd_scale.errors import CmkdError, UsageError
from cmkd_scale.monitoring.report_runs import load_runs, read_object
from cmkd_scale.stages.common import Trained, weights_digest

_OF_A_TEACHER = {
    "modality": "modality",
    "weights": "teacher_weights",
    "steps": "teacher_step",
    "shards": "shards",
    "manifest": "manifest",
}
"""Key of a teacher here -> that of a memory's provenance."""
_SAME_TEST = ("shards", "modality", "source", "options", "label_map", "test_split")
"""Keys of ``data`` that two runs have in common if they were tested on the same samples."""


def provenance(run: Path, trained: Trained, controls: Sequence[Path] = ()) -> dict[str, Any]:
    """Where a model comes from and how good it is, as plain values.

    Args:
        run: the run directory.
        trained: the model out of it.
        controls: finished runs that were tested on the same samples, to be named beside it.

    Raises:
        UsageError: a control was tested on something else, or not at all.
        IntegrityError: a file of a run is malformed.
    """
    state, config = trained.state, trained.config
    results = _results(run, state)
    metrics = dict(results.get("metrics") or {})
    bound = metrics.pop("bound", [])
    return {
        "stage": read_object(run / "env.json").get("stage"),
        "method": state["method"],
        "seed": config.run.seed,
        "steps": state["step"],
        "samples_seen": state["samples_seen"],
        "averaged_weights": config.train.ema_decay is not None,
        "config_digest": state["config_digest"],
        "weights_digest": weights_digest(trained.model),
        "memory_digest": state["memory_digest"],
        "live_teacher": state["teacher_digest"],
        "pairs": config.data.mode if state["teacher_digest"] is not None else None,
        "teachers": [
            {key: taught.memory.provenance.get(name) for key, name in _OF_A_TEACHER.items()}
            for taught in trained.taught_by
        ],
        "guard": results.get("guard") or [],
        "data": _data(config, state),
        "metrics": metrics,
        "measured": _measured(config, results),
        "bound": [{k: v for k, v in entry.items() if k != "per_class"} for entry in bound],
        "controls": [_control(path, config) for path in controls],
        "versions": results.get("versions") or {},
        "exported_by": __version__,
    }


def _results(run: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """The newest results of this very model on the run's own data; empty if there are none."""
    first = read_object(run / "results.json")
    found = [
        results
        for results in (first, read_object(run / "evaluation.json"))
        if results.get("steps") == state["step"]
        and results.get("config_digest") == state["config_digest"]
    ]
    if not found:
        return {}
    newest = max(found, key=lambda results: str(results.get("finished")))
    # An evaluation has no guard of its own.
    return {**newest, "guard": first.get("guard")}


def _measured(config: Config, results: Mapping[str, Any]) -> dict[str, Any] | None:
    if not results:
        return None
    return {
        "by": results.get("stage"),
        "split": results.get("split", config.data.test_split),
        "finished": results.get("finished"),
    }


def _data(config: Config, state: Mapping[str, Any]) -> dict[str, Any]:
    """What the model was trained on, as far as it is known here."""
    address = str(config.data.shards)
    digest = state["loader"]["manifest"]
    manifest = _manifest(config, address, digest)
    builtin = address.removeprefix(PREFIX).partition("/")[0] if address.startswith(PREFIX) else None
    if manifest is None:
        return {"dataset": builtin, "name": None, "manifest": digest, "samples": None}
    return {
        "dataset": manifest.dataset,
        "name": manifest.name,
        "manifest": digest,
        "samples": manifest.samples,
        "samples_per_class": [min(manifest.class_counts), max(manifest.class_counts)],
        "n_per_class": config.data.n_per_class,
    }


def _manifest(config: Config, address: str, digest: str) -> Manifest | None:
    """That of the training split, if it lies on this machine and is still the same."""
    if not Path(address).is_dir():
        return None
    try:
        found = open_manifest(address, split=config.data.train_split, modality=config.data.modality)
    except CmkdError:
        return None
    return found if found.digest == digest else None


def _control(path: Path, config: Config) -> dict[str, Any]:
    run = load_runs([path])[0]
    accuracy = run.metric("test/accuracy")
    if accuracy is None:
        raise UsageError(f"{path} has no test result to name as a control; finish it first.")
    own = config.model_dump(mode="json")["data"]
    other = [key for key in _SAME_TEST if run.setting("data", key) != own[key]]
    if other:
        raise UsageError(
            f"{path} was tested on other samples than this run (different: "
            f"{', '.join(f'data.{key}' for key in other)}), so it is no control for it."
        )
    return {
        "method": run.method,
        "stage": run.stage,
        "seed": run.seed,
        "steps": run.last_step,
        "metrics": {
            "test/accuracy": accuracy,
            "test/cross_entropy": run.metric("test/cross_entropy"),
        },
    }
