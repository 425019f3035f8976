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
