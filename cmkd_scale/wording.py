"""Results of verbs in words, for people; ``--json`` gives the same to programs."""

from __future__ import annotations

import textwrap
from typing import Any


def method_lines(rows: list[dict[str, Any]]) -> str:
    """The method table."""
    lines = []
    for row in rows:
        parts = ", ".join(f"{name} {weight:g}" for name, weight in row["weights"].items())
        inner = ", ".join(f"{name} x {steps}" for name, steps in row["inner"].items())
        lines.append(f"{row['name']}: {row['summary']}")
        lines.append(textwrap.indent(f"needs {_needs(row)}; {parts}", "    "))
        if inner:
            lines.append(textwrap.indent(f"at weights after inner steps of {inner}", "    "))
        source = f"{row['source']}; {row['departs']}" if row["departs"] else row["source"]
        if source:
            lines.append(textwrap.indent(source, "    "))
    return "\n".join(lines)


def _needs(row: dict[str, Any]) -> str:
    """What a method needs beside the student's labels, in words."""
    needs = []
    if row["needs_memory"]:
        several = f"{row['memories']} memories" if row["memories"] > 1 else "a memory"
        needs.append(several)
    if row["needs_live_teacher"]:
        along = " that learns along" if row["trains_teacher"] else ""
        needs.append(f"a live teacher{along} with its data (data.mode {' or '.join(row['modes'])})")
    if row["needs_unlabelled"]:
        needs.append("unlabelled samples")
    if row["students"] > 1:
        needs.append(f"{row['students']} students")
    return ", ".join(needs) or "nothing beside labels"


def forecast_lines(results: dict[str, Any]) -> str:
    """The candidates of a forecast."""
    lines = [
        f"without a teacher, after {results['steps']} steps: "
        f"{results['accuracy_without_teacher']:.1%} of held-out samples right"
    ]
    for row in results["candidates"]:
        found = row["agreement"]
        why = (
            f"class structures agree at {found['correlation']:.2f}, {found['z']:.1f} standard "
            f"deviations above chance"
            if found
            else "too few classes in common to tell"
        )
        gain = (
            f"expected gain {100 * row['gain']:+.0f} points ({100 * row['low']:+.0f} to "
            f"{100 * row['high']:+.0f}, 90 %)"
        )
        heads = (
            f"heads tried on held-out samples gain {100 * row['trial']['gain']:+.1f} points "
            f"(error {100 * row['trial']['error']:.1f})"
        )
        left_out = "" if row["trust"] > 0 else "; the guard would leave it out"
        lines += [f"{row['memory']}: {gain}", f"    {heads}", f"    {why}{left_out}"]
    return "\n".join(lines)


def stage_lines(results: dict[str, Any]) -> str:
    """What a stage has come to."""
    lines = [
        f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}"
        for name, value in results["metrics"].items()
        if not isinstance(value, dict | list)
    ]
    if results.get("memory_digest"):
        lines.append(f"memory digest: {results['memory_digest']}")
    return "\n".join([*lines, f"seconds: {results['wall_seconds']:.1f}"])


def split_lines(rows: list[dict[str, Any]]) -> str:
    """Splits of shards, a line each."""
    return "\n".join(
        f"{row['name']}: {row['samples']} samples in {row['shards']} shards, "
        f"{row['bytes'] / 1e6:.1f} MB, {row['classes']} classes of "
        f"{row['smallest_class']} to {row['largest_class']}"
        + (
            f"; two samples of a batch of 256 share a shard {row['shared_shards']:.2f} x as often "
            "as in a uniform order"
            if "shared_shards" in row
            else ""
        )
        for row in rows
    )


def checkpoint_lines(result: dict[str, Any]) -> str:
    """What the checkpoints of a run hold."""

    def line(row: dict[str, Any]) -> str:
        newest = " (latest)" if row["checkpoint"] == result["latest"] else ""
        size = f"{row['checkpoint']}{newest}: {row['bytes'] / 1e6:.1f} MB"
        if "unreadable" in row:
            return f"{size}, cannot be read: {row['unreadable']}"
        restarts = ", ".join(f"{count} x {name}" for name, count in row["restarts"].items())
        return (
            f"{size}, {row['method']}, {row['samples_seen']} samples seen; the model has "
            f"{row['numbers']} numbers in {row['tensors']} tensors; restarts: {restarts or 'none'}"
        )

    return "\n".join(map(line, result["checkpoints"]))


def manifest_lines(result: dict[str, Any]) -> str:
    """What was rendered, and what has to be there before it is applied."""
    lines = [f"{result['kind']} {result['name']}: {', then '.join(result['stages'])}"]
    lines += [f"wrote {file}" for file in result["files"]]
    lines += [f"{run} must be on the claim: no config here makes it" for run in result["expects"]]
    return "\n".join(lines)


def export_lines(result: dict[str, Any]) -> str:
    """What was exported, how to use it, and where it went."""
    size = sum(result["files"].values())
    opens = "AutoModel opens the encoder" if result["automodel"] else "no AutoModel, see its card"
    worst = max(result["difference"].values())
    lines = [
        f"exported to {result['directory']}",
        f"{result['method']} after {result['steps']} steps; {result['parameters']:,} parameters; "
        f"{len(result['files'])} files, {size / 1e6:.1f} MB",
        f"{opens}; read back, it differs by {worst:.1g} at most",
        f"use it: cmkd predict {result['directory']} FILE...",
    ]
    if result["pushed"] is not None:
        lines.append(f"uploaded: {result['pushed']}")
    return "\n".join(lines)


_MARKS = {"note": "note", "warning": "warning", "blocker": "BLOCKER"}


def doctor_lines(report: dict[str, Any]) -> str:
    """What a doctor has found, a paragraph each, and its summary; what is well goes unsaid."""
    lines = []
    for finding in _remarkable(report):
        lines.append(
            f"{_MARKS[finding['severity']]}: {finding['check']}{_whose(finding)}: "
            f"{finding['found']}"
        )
        if finding["remedy"]:
            lines.append(textwrap.indent(f"remedy: {finding['remedy']}", "    "))
    return "\n".join([*lines, doctor_summary(report)])


def print_doctor(report: dict[str, Any]) -> None:
    """The same as a table, on a terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    styles = {"note": "cyan", "warning": "yellow", "blocker": "bold red"}
    console = Console()
    table = Table("", "check", "found", "remedy", show_lines=True)
    for finding in _remarkable(report):
        texts = (finding["check"] + _whose(finding), finding["found"], finding["remedy"])
        mark = f"[{styles[finding['severity']]}]{_MARKS[finding['severity']]}[/]"
        table.add_row(mark, *map(escape, texts))
    if table.row_count:
        console.print(table)
    console.print(escape(doctor_summary(report)))


def _remarkable(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [finding for finding in report["findings"] if finding["severity"] != "ok"]


def _whose(finding: dict[str, Any]) -> str:
    ranks = finding["ranks"]
    return f" (rank {', '.join(map(str, ranks))})" if ranks else ""


def doctor_summary(report: dict[str, Any]) -> str:
    """One line: how it looks, and what the run will take."""
    counts = {name: 0 for name in _MARKS}
    for finding in _remarkable(report):
        counts[finding["severity"]] += 1
    looked = f"{len(report['findings'])} checks in {report['seconds']:.0f} s"
    if not any(counts.values()):
        verdict = f"all well ({looked})"
    else:
        said = ", ".join(
            f"{count} {name}{'s' if count > 1 else ''}" for name, count in counts.items() if count
        )
        verdict = f"{said} ({looked})"
    estimate = report["estimate"]
    if estimate is None:
        return verdict
    cost = "" if estimate["cost"] is None else f", cost {estimate['cost']:.2f}"
    advised = estimate["advised"]
    backend = estimate["backend"]
    advice = f", {advised} would do" if advised not in (None, backend) else ""
    return (
        f"{verdict}: {report['stage']} of {estimate['parameters'] / 1e6:.2f} M parameters, "
        f"{_span(estimate['hours'])}{cost}; {estimate['rank_bytes'] / 2**30:.2f} GiB a rank with "
        f"{backend}{advice}; {report['ranks']} rank"
        f"{'s' if report['ranks'] > 1 else ''}"
    )


def _span(hours: float) -> str:
    """A duration as people say it."""
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} s"
    return f"{60 * hours:.1f} min" if hours < 1 else f"{hours:.1f} h"


def plan_lines(plan: dict[str, Any]) -> str:
    """How long, how much memory, and on which assumptions."""
    cluster, forecast = plan["cluster"], plan["forecast"]
    measured = plan["calibration"]
    step, exposed, waiting = (
        1000 * forecast[f"{name}_seconds"] for name in ("step", "exposed", "straggler")
    )
    cost = "" if plan["price"] is None else f", cost {plan['price']:.2f}"
    lines = [
        f"{plan['stage']} {plan['method']} on {cluster['nodes']} nodes x "
        f"{cluster['devices_per_node']} devices with {plan['backend']}: "
        f"{_span(forecast['hours'])} (5 to 95 %: {_span(forecast['hours_p5'])} to "
        f"{_span(forecast['hours_p95'])}){cost}",
        f"step {step:.1f} ms, of it {exposed:.2f} exchange, {waiting:.2f} waiting for the slowest; "
        f"checkpoints {forecast['checkpoint_share']:.2%} of the time; "
        f"{forecast['failures']:.3g} failures expected; best interval between checkpoints "
        f"{_span(forecast['best_checkpoint_seconds'] / 3600)}",
        f"{plan['parameters'] / 1e6:.2f} M parameters; "
        f"{plan['flops_per_sample'] / 1e9:.3f} GFLOP a sample (forward and backward); "
        f"checkpoints of {plan['checkpoint_bytes'] / 2**20:.1f} MiB",
        "memory of a rank, GiB on the device and beside it:",
    ]
    for backend, memory in plan["memory"].items():
        marks = " (fits, sends least)" if backend == plan["advised"] else ""
        lines.append(
            f"    {backend}: {memory['device_bytes'] / 2**30:.3f} + "
            f"{memory['host_bytes'] / 2**30:.3f}{marks}"
        )
    lines += [
        f"measured here ({measured['device']}, {measured['samples']} samples a step, "
        f"{measured['steps']} steps): {1000 * measured['step_seconds']:.1f} ms "
        f"(+- {measured['step_spread']:.0%}), of it waiting for data "
        f"{1000 * measured['data_seconds']:.1f}, forward {1000 * measured['forward_seconds']:.1f}, "
        f"backward and update {1000 * measured['backward_seconds']:.1f}",
        "assumed: "
        + ", ".join(
            f"{name} {value:g}"
            for name, value in cluster.items()
            if name not in ("nodes", "devices_per_node")
        ),
        "if an assumption is another:",
        *(f"    {title}: {_span(hours)}" for title, hours in plan["sensitivity"].items()),
    ]
    return "\n".join(lines)
