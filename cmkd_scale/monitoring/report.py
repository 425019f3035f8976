"""The report of runs: one self-contained HTML page, and its pictures as PNG files beside it.

What a run directory lacks is left out of the page. Everything that comes from files is
escaped by the template; the page holds no script and asks nothing of any server.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmkd_scale.errors import UsageError
from cmkd_scale.monitoring import report_plots
from cmkd_scale.monitoring.report_analysis import (
    Predictions,
    confusion_counts,
    hardest_pairs,
    label_groups,
    project,
    read_predictions,
    read_prototypes,
)
from cmkd_scale.monitoring.report_bound import bound_plot, bound_sentence, nats, read_bounds
from cmkd_scale.monitoring.report_guard import read_guards
from cmkd_scale.monitoring.report_runs import Group, Run, group_runs, load_runs
from cmkd_scale.monitoring.report_verdict import find_control, verdict

_PAIRS_LISTED = 10


@dataclass(frozen=True)
class Picture:
    """A PNG of the report."""

    png: bytes
    about: str
    """What it shows, for those who cannot see it."""

    @property
    def uri(self) -> str:
        """The picture as a data URI."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


def write_report(runs: Sequence[Path], out: Path) -> list[Path]:
    """Write the report of some run directories.

    Args:
        runs: run directories; runs of one ``method`` are treated as its seeds.
        out: the HTML file; its pictures go to ``plots/`` beside it.

    Returns:
        The files written, the page first.

    Raises:
        UsageError: a directory holds nothing of a run, matplotlib or Jinja2 is missing, or
            ``out`` cannot be written.
        IntegrityError: a file of a run is malformed.
    """
    page, pictures = _compose(load_runs(runs))
    html = render(page)
    files = {out: html.encode("utf-8", "xmlcharrefreplace")}
    for name, picture in pictures.items():
        files[out.parent / "plots" / f"{name}.png"] = picture.png
    try:
        for file, content in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    except OSError as error:
        raise UsageError(
            f"The report cannot be written to {out}: {error}. Name a file in a directory that "
            "can be written."
        ) from None
    return list(files)


def render(page: Mapping[str, Any]) -> str:
    """Render the template with autoescape; a name that the page lacks is an error."""
    try:
        import jinja2
    except ImportError:
        raise UsageError(
            "The report needs Jinja2, which is not installed: pip install 'cmkd_scale[report]'"
        ) from None
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cmkd_scale.monitoring"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda value: f"{100 * value:.1f}"
    environment.filters["duration"] = _duration
    environment.filters["nats"] = nats
    return environment.get_template("report.html.j2").render(page)


def _compose(runs: Sequence[Run]) -> tuple[dict[str, Any], dict[str, Picture]]:
    """Gather what the template shows, and the pictures by file name."""
    groups = group_runs(runs)
    compared = [group for group in groups if group.is_student] or groups
    pictures: dict[str, Picture] = {}
    if any(group.accuracies for group in compared):
        about = "; ".join(f"{g.method} {100 * g.mean:.1f}%" for g in compared if g.accuracies)
        pictures["accuracy"] = Picture(
            report_plots.accuracy_plot(compared), f"Test accuracy by method: {about}"
        )
    logged = [group for group in compared if any(run.steps for run in group.runs)]
    if panels := _panels(logged):
        about = f"Learning curves: {', '.join(panels.values())} against the optimiser step"
        pictures["learning_curves"] = Picture(report_plots.curves_plot(logged, panels), about)
    confusion = _confusion(compared, pictures)
    space = _map(compared, pictures)
    bound = _bound(compared, pictures)
    page = {
        "verdict": verdict(compared),
        "groups": groups,
        "control": find_control(compared),
        "pictures": pictures,
        "confusion": confusion,
        "map": space,
        "bound": bound,
        "guards": read_guards(compared),
        "runs": [run for group in groups for run in group.runs],
        "versions": _versions(runs),
        "configs": [(g.method, g.runs[0].name, g.runs[0].config) for g in groups],
    }
    return page, pictures


def _panels(groups: Sequence[Group]) -> dict[str, str]:
    """Choose what the learning curves show: key of a logged step -> label of its axis.

    Total losses of different methods have different summands, so the first component that
    all methods have is shown beside them: that one can be compared.
    """
    keys = [
        {key for run in group.runs for record in run.steps for key in record} for group in groups
    ]
    panels = {}
    if any("loss" in found for found in keys):
        panels["loss"] = "total loss (nats)"
    if len(keys) > 1:
        shared = sorted(key for key in set.intersection(*keys) if key.startswith("loss/"))
        panels |= {key: f"{key.removeprefix('loss/')} (nats)" for key in shared[:1]}
    if any("test/accuracy" in found for found in keys):
        panels["test/accuracy"] = "test accuracy (share)"
    return panels


def _confusion(groups: Sequence[Group], pictures: dict[str, Picture]) -> dict[str, Any] | None:
    """Draw and list the confusions of the best method that has predictions, seeds pooled."""
    for group in groups:
        found = _predictions(group)
        if not found:
            continue
        names = found[0].label_names
        counts = confusion_counts(found)
        pictures["confusion"] = Picture(
            report_plots.confusion_plot(counts, names, label_groups(names)),
            f"Confusion matrix of {group.method}, {len(names)} classes",
        )
        pairs = [
            (names[true], names[predicted], count, share)
            for true, predicted, count, share in hardest_pairs(counts, _PAIRS_LISTED)
        ]
        return {"method": group.method, "runs": len(found), "pairs": pairs, "classes": len(names)}
    return None


def _predictions(group: Group) -> list[Predictions]:
    """Predictions of the group's runs that name the same classes as the first one."""
    found = [
        predictions
        for run in group.runs
        if (predictions := read_predictions(run.path / "predictions.safetensors")) is not None
        and predictions.labels.size
    ]
    return [predictions for predictions in found if predictions.label_names == found[0].label_names]


def _map(groups: Sequence[Group], pictures: dict[str, Picture]) -> dict[str, Any] | None:
    """Draw the map of the best run that has a memory and predictions; controls come last."""
    for group in sorted(groups, key=lambda group: "/" in group.method):
        for run in group.runs:
            memory_file = _memory_file(run)
            predictions = read_predictions(run.path / "predictions.safetensors")
            if memory_file is None or predictions is None:
                continue
            memory = read_prototypes(memory_file)
            plane = project(memory.prototypes, predictions.features)
            if plane is None:
                continue
            names = sorted({*memory.class_names, *predictions.label_names})
            group_of = dict(zip(names, label_groups(names), strict=True))
            png = report_plots.map_plot(
                plane,
                [group_of[memory.class_names[c]] for c in memory.prototype_class],
                [group_of[predictions.label_names[c]] for c in predictions.labels],
            )
            about = f"Teacher's prototypes and test features of {run.name} in two dimensions"
            pictures["prototype_map"] = Picture(png, about)
            share = sum(plane.variance_share)
            caption = (
                f"Large marks: the memory's {len(plane.prototypes)} prototypes in the plane of "
                f"their first two principal components, which holds {share:.0%} of their variance. "
                f"Small dots: {len(plane.features)} test features of {run.name}. Colour and letter "
                "are the true label or, with more than 20 classes, its first character. Dots among "
                "marks of their own colour: the student has taken over the teacher's structure."
            )
            return {"caption": caption}
    return None


def _bound(groups: Sequence[Group], pictures: dict[str, Picture]) -> dict[str, Any] | None:
    """Draw and list where the error of each method with a teacher comes from."""
    bounds = read_bounds(groups)
    if not bounds:
        return None
    sentence = bound_sentence(bounds)
    pictures["bound"] = Picture(bound_plot(bounds), f"Error by where it comes from: {sentence}")
    return {"sentence": sentence, "rows": bounds}


def _memory_file(run: Run) -> Path | None:
    """Find the memory that a run recorded, seen from the run or from here."""
    recorded = run.results.get("memory_file")
    candidates = [run.path / recorded, Path(recorded)] if recorded else []
    return next((file for file in candidates if file.is_file()), None)


def _versions(runs: Sequence[Run]) -> dict[str, str]:
    """Version of each package; several where the runs differ."""
    found: dict[str, set[str]] = {}
    for run in runs:
        for package, version in run.results.get("versions", {}).items():
            found.setdefault(package, set()).add(str(version))
    return {package: ", ".join(sorted(versions)) for package, versions in sorted(found.items())}


def _duration(seconds: float) -> str:
    """Write seconds for people: ``41 s``, ``3 min 20 s``, ``2 h 5 min``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
