"""The report of runs: one self-contained HTML page, and its pictures as PNG files beside it.

What a run directory lacks is left out of the page. Everything that comes from files is
escaped by the template; the page holds no script and asks nothing of any server, which its
content security policy makes browsers keep to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cmkd_scale.errors import UsageError
from cmkd_scale.monitoring.report_bound import nats
from cmkd_scale.monitoring.report_compare import read_differences
from cmkd_scale.monitoring.report_data import read_labels, read_streams
from cmkd_scale.monitoring.report_faults import read_faults
from cmkd_scale.monitoring.report_guard import read_guards
from cmkd_scale.monitoring.report_pictures import Picture, draw_pictures
from cmkd_scale.monitoring.report_progress import read_progress, read_speeds
from cmkd_scale.monitoring.report_runs import Run, group_runs, load_runs
from cmkd_scale.monitoring.report_svg import DARK, variable
from cmkd_scale.monitoring.report_verdict import find_control, verdict

_UNSEEN = re.compile(
    # Control characters but tab and newline; halves of surrogate pairs; what turns the
    # direction of the text after it, which would not end with the name that holds it.
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


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
    files = {out: html.encode()}
    for name, picture in pictures.items():
        files[out.parent / "plots" / f"{name}.png"] = picture.drawing.png
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
        finalize=_seen,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda value: f"{100 * value:.1f}"
    environment.filters["duration"] = _duration
    environment.filters["nats"] = nats
    return environment.get_template("report.html.j2").render(page)


def _compose(runs: Sequence[Run]) -> tuple[dict[str, Any], Mapping[str, Picture]]:
    """Gather what the template shows, and the pictures by file name."""
    groups = group_runs(runs)
    compared = [group for group in groups if group.is_student] or groups
    listed = [run for group in groups for run in group.runs]
    control = find_control(compared)
    pictures = draw_pictures(compared, control)
    page = {
        "verdict": verdict(compared),
        "groups": groups,
        "control": control,
        "pictures": pictures.drawn,
        "gains": pictures.gains,
        "confusion": pictures.confusion,
        "map": pictures.map,
        "bound": pictures.bound,
        "guards": read_guards(compared),
        "streams": read_streams(groups),
        "labels": read_labels(groups),
        "progress": read_progress(listed),
        "speeds": read_speeds(listed),
        "faults": read_faults(listed),
        "differences": read_differences(listed),
        "runs": listed,
        "versions": _versions(runs),
        "configs": [(g.method, g.runs[0].name, g.runs[0].config) for g in groups],
        "colours": [(variable(light), light, dark) for light, dark in DARK.items()],
    }
    return page, pictures.drawn


def _seen(value: object) -> object:
    """Text with a mark in the place of each character that is not seen but does something."""
    if not isinstance(value, str) or hasattr(value, "__html__"):  # what is markup has been here
        return value
    return _UNSEEN.sub("\ufffd", value)


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
