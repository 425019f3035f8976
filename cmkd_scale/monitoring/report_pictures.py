"""Which pictures a report has, and what stands beside them.

Each picture is drawn if the runs hold what it shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
from cmkd_scale.monitoring.report_bound import bound_plot, bound_sentence, read_bounds
from cmkd_scale.monitoring.report_gains import Gains, gains_plot, read_gains
from cmkd_scale.monitoring.report_runs import Group
from cmkd_scale.monitoring.report_svg import Drawing

_PAIRS_LISTED = 10


@dataclass(frozen=True)
class Picture:
    """A picture of the report."""

    drawing: Drawing
    about: str
    """What it shows, for those who cannot see it."""


@dataclass(frozen=True)
class Pictures:
    """The pictures by file name, and what else their sections hold; None: no such section."""

    drawn: Mapping[str, Picture]
    gains: Gains | None
    confusion: Mapping[str, Any] | None
    map: Mapping[str, Any] | None
    bound: Mapping[str, Any] | None


def draw_pictures(groups: Sequence[Group], control: Group | None) -> Pictures:
    """Draw all that comparable groups, the most accurate first, have something for."""
    drawn: dict[str, Picture] = {}
    if any(group.accuracies for group in groups):
        about = "; ".join(f"{g.method} {100 * g.mean:.1f}%" for g in groups if g.accuracies)
        drawn["accuracy"] = Picture(
            report_plots.accuracy_plot(groups), f"Test accuracy by method: {about}"
        )
    logged = [group for group in groups if any(run.steps for run in group.runs)]
    if panels := _panels(logged):
        about = f"Learning curves: {', '.join(panels.values())} against the optimiser step"
        drawn["learning_curves"] = Picture(report_plots.curves_plot(logged, panels), about)
    gains = read_gains(groups, control)
    if gains is not None and gains.drawn:
        drawn["gains"] = Picture(gains_plot(gains), f"Gain of each class: {gains.sentence}")
    confusion = _confusion(groups, drawn)
    space = _map(groups, drawn)
    bound = _bound(groups, drawn)
    return Pictures(drawn, gains, confusion, space, bound)


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


def _confusion(groups: Sequence[Group], drawn: dict[str, Picture]) -> dict[str, Any] | None:
    """Draw and list the confusions of the best method that has predictions, seeds pooled."""
    for group in groups:
        found = _predictions(group)
        if not found:
            continue
        names = found[0].label_names
        counts = confusion_counts(found)
        drawn["confusion"] = Picture(
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


def _map(groups: Sequence[Group], drawn: dict[str, Picture]) -> dict[str, Any] | None:
    """Draw the map of the best run that has a memory and predictions; controls come last."""
    for group in sorted(groups, key=lambda group: "/" in group.method):
        for run in group.runs:
            predictions = read_predictions(run.path / "predictions.safetensors")
            if not run.memory_files or predictions is None:
                continue
            memory = read_prototypes(run.memory_files[0])
            plane = project(memory.prototypes, predictions.features)
            if plane is None:
                continue
            names = sorted({*memory.class_names, *predictions.label_names})
            group_of = dict(zip(names, label_groups(names), strict=True))
            drawing = report_plots.map_plot(
                plane,
                [group_of[memory.class_names[c]] for c in memory.prototype_class],
                [group_of[predictions.label_names[c]] for c in predictions.labels],
            )
            about = f"Teacher's prototypes and test features of {run.name} in two dimensions"
            drawn["prototype_map"] = Picture(drawing, about)
            share = sum(plane.variance_share)
            features = plane.features[:: report_plots.thinned(len(plane.features))]
            shown = f"{len(features)} of {len(plane.features)}"
            if len(features) == len(plane.features):
                shown = f"{len(features)}"
            caption = (
                f"Large marks: the memory's {len(plane.prototypes)} prototypes in the plane of "
                f"their first two principal components, which holds {share:.0%} of their variance. "
                f"Small dots: {shown} test features of {run.name}. Colour and letter "
                "are the true label or, with more than 20 classes, its first character. Dots among "
                "marks of their own colour: the student has taken over the teacher's structure."
            )
            return {"caption": caption}
    return None


def _bound(groups: Sequence[Group], drawn: dict[str, Picture]) -> dict[str, Any] | None:
    """Draw and list where the error of each method with a teacher comes from."""
    bounds = read_bounds(groups)
    if not bounds:
        return None
    sentence = bound_sentence(bounds)
    drawn["bound"] = Picture(bound_plot(bounds), f"Error by where it comes from: {sentence}")
    return {"sentence": sentence, "rows": bounds}
