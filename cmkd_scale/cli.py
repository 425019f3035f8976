"""``cmkd``: the verbs. A stage is imported only when it is asked for.

Results go to stdout (with ``--json`` one JSON object and nothing else), logs and progress to
stderr. Exit codes: 0 done, 1 a fault of the program, 2 wrong config or usage, 42 data or
checkpoint integrity, 138 preempted with the state saved.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cmkd_scale import __version__
from cmkd_scale.errors import EXIT_DONE, CmkdError

Run = Callable[[argparse.Namespace], None]

_EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    options = _parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("cmkd_scale").setLevel(logging.INFO)
    try:
        run: Run = options.run
        run(options)
    except CmkdError as error:
        if options.debug:
            traceback.print_exc()
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f" [rank {rank}]"
        print(f"cmkd{where}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("cmkd: interrupted", file=sys.stderr)
        return _EXIT_INTERRUPTED
    return EXIT_DONE


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse; words ``key=value`` may stand anywhere, which argparse alone cannot do."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    pairs = [word for word in rest if "=" in word and not word.startswith("-")]
    if len(pairs) < len(rest) or (pairs and not hasattr(options, "pairs")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if pairs:
        options.pairs = [*options.pairs, *pairs]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cmkd",
        description="Cross-modal knowledge distillation without paired data, at scale.",
        epilog="Start with: cmkd quickstart",
    )
    parser.add_argument("--version", action="version", version=f"cmkd {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    _add_quickstart(verbs)
    _add_shards(verbs)
    _add_stage(verbs, "teacher", _teacher, "train a teacher on its modality's labels")
    _add_stage(verbs, "memory", _memory, "build the prototype memory of a trained teacher")
    _add_stage(verbs, "student", _student, "train a student, aligned to a memory")
    _add_stage(verbs, "evaluate", _evaluate, "evaluate a trained run on its test split")
    _add_inspection(verbs)
    return parser


def _verb(verbs: Any, name: str, run: Run, summary: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(run=run)
    return parser


def _add_quickstart(verbs: Any) -> None:
    parser = _verb(
        verbs,
        "quickstart",
        _quickstart,
        "the whole story on bundled real data, on a CPU, in minutes",
        "cmkd quickstart --out runs/quickstart --fsdd /data/free-spoken-digit-dataset",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), metavar="DIR")
    parser.add_argument("--seed", type=int, default=0, help="first of the three seeds")
    parser.add_argument(
        "--fsdd", type=Path, metavar="DIR", help="Free Spoken Digit Dataset: real speech"
    )


def _add_shards(verbs: Any) -> None:
    parser = verbs.add_parser("shards", help="build, check and read WebDataset shards")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    build = _verb(
        actions,
        "build",
        _shards_build,
        "write shards and their manifest",
        "cmkd shards build numbers --out data/numbers --modality image train_per_class=40",
    )
    build.add_argument("dataset")
    build.add_argument("--out", type=Path, required=True, metavar="DIR")
    build.add_argument("--source", type=Path, metavar="DIR", help="raw data")
    build.add_argument("--modality")
    build.add_argument("--split")
    build.add_argument("--samples-per-shard", type=int, default=1000, metavar="N")
    build.add_argument("pairs", nargs="*", metavar="key=value")
    for name, run, summary in (
        ("verify", _shards_verify, "check every digest"),
        ("info", _shards_info, "print counts, sizes and classes"),
    ):
        action = _verb(actions, name, run, summary, f"cmkd shards {name} data/numbers")
        action.add_argument("directory", type=Path)
    stream = _verb(
        actions,
        "stream",
        _shards_stream,
        "print the order in which training reads",
        "cmkd shards stream data/numbers/audio --rank 0 --world-size 2 --print-keys",
    )
    stream.add_argument("directory", type=Path)
    stream.add_argument("--rank", type=int, required=True)
    stream.add_argument("--world-size", type=int, required=True)
    stream.add_argument("--seed", type=int, default=0)
    stream.add_argument("--split", default="train")
    stream.add_argument("--modality")
    stream.add_argument("--stop-after", type=int, metavar="N", help="counted for this rank")
    stream.add_argument("--state", type=Path, metavar="FILE", help="continue from here")
    stream.add_argument("--save-state", type=Path, metavar="FILE")
    stream.add_argument("--print-keys", action="store_true")


def _add_stage(verbs: Any, name: str, run: Run, summary: str) -> None:
    parser = _verb(
        verbs,
        name,
        run,
        summary,
        f"cmkd {name} --config configs/debug/{'student' if name == 'evaluate' else name}.yaml "
        f"run.dir=runs/debug/{'student' if name == 'evaluate' else name}",
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE")
    parser.add_argument("pairs", nargs="*", metavar="section.key=value")


def _add_inspection(verbs: Any) -> None:
    _verb(verbs, "methods", _methods, "the method table and what each row needs", "cmkd methods")
    parser = _verb(
        verbs,
        "memory-info",
        _memory_info,
        "what is in a prototype memory",
        "cmkd memory-info runs/debug/memory/memory.safetensors",
    )
    parser.add_argument("file", type=Path)
    parser = _verb(
        verbs,
        "report",
        _report,
        "one HTML file and its plots from one or several runs",
        "cmkd report runs/debug/student --out report.html",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: report.html in the first run"
    )


def _quickstart(options: argparse.Namespace) -> None:
    from cmkd_scale.stages.quickstart import quickstart, summary_table

    results = quickstart(options.out, seed=options.seed, fsdd=options.fsdd)
    _print(options, results, lambda: summary_table(results))


def _stage(options: argparse.Namespace, run: Callable[..., dict[str, Any]]) -> None:
    from cmkd_scale import distributed
    from cmkd_scale.config import load_config

    results = run(load_config(options.config, options.pairs))
    if distributed.is_main():
        _print(options, results, lambda: _stage_lines(results))


def _teacher(options: argparse.Namespace) -> None:
    from cmkd_scale.stages.teacher import teacher

    _stage(options, teacher)


def _memory(options: argparse.Namespace) -> None:
    from cmkd_scale.stages.build_memory import memory

    _stage(options, memory)


def _student(options: argparse.Namespace) -> None:
    from cmkd_scale.stages.student import student

    _stage(options, student)


def _evaluate(options: argparse.Namespace) -> None:
    from cmkd_scale.stages.evaluate import evaluate

    _stage(options, evaluate)


def _shards_build(options: argparse.Namespace) -> None:
    from cmkd_scale.operations.shards import build_shards

    rows = build_shards(
        options.dataset,
        options.out,
        source=options.source,
        modality=options.modality,
        split=options.split,
        samples_per_shard=options.samples_per_shard,
        options=options.pairs,
    )
    _print(options, {"splits": rows}, lambda: _split_lines(rows))


def _shards_verify(options: argparse.Namespace) -> None:
    from cmkd_scale.operations.shards import verify

    count = verify(options.directory)
    result = {"directory": str(options.directory), "splits": count, "problems": []}
    _print(options, result, lambda: f"{options.directory}: {count} splits, every digest right")


def _shards_info(options: argparse.Namespace) -> None:
    from cmkd_scale.operations.shards import info

    rows = info(options.directory)
    _print(options, {"splits": rows}, lambda: _split_lines(rows))


def _shards_stream(options: argparse.Namespace) -> None:
    # A closed pipe (`| head`) ends this verb quietly. Not so training, which would die with
    # a scraper of its metrics that hangs up.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    from cmkd_scale.operations.shards import stream_keys

    keys = stream_keys(
        options.directory,
        split=options.split,
        modality=options.modality,
        rank=options.rank,
        world_size=options.world_size,
        seed=options.seed,
        stop_after=options.stop_after,
        state=options.state,
        save_state=options.save_state,
    )
    if options.json:
        _print(options, {"keys": list(keys)}, str)
        return
    count = 0
    for key in keys:
        count += 1
        if options.print_keys:
            print(key)
    if not options.print_keys:
        print(f"{count} samples")


def _methods(options: argparse.Namespace) -> None:
    from cmkd_scale.operations.inspect import methods

    rows = methods()

    def table() -> str:
        lines = []
        for row in rows:
            needs = "memory" if row["needs_memory"] else "nothing beside labels"
            parts = ", ".join(f"{name} {weight:g}" for name, weight in row["weights"].items())
            lines.append(f"{row['name']}: {row['summary']}")
            lines.append(textwrap.indent(f"needs {needs}; {parts}", "    "))
        return "\n".join(lines)

    _print(options, {"methods": rows}, table)


def _memory_info(options: argparse.Namespace) -> None:
    from cmkd_scale.operations.inspect import memory_info

    result = memory_info(options.file)
    _print(options, result, lambda: "\n".join(f"{k}: {v}" for k, v in result.items()))


def _report(options: argparse.Namespace) -> None:
    from cmkd_scale.monitoring.report import write_report

    out = options.out or options.runs[0] / "report.html"
    files = write_report(options.runs, out)
    result = {"report": str(out), "files": [str(file) for file in files]}
    _print(options, result, lambda: f"wrote {out}")


def _print(options: argparse.Namespace, value: dict[str, Any], text: Callable[[], str]) -> None:
    print(json.dumps(value) if options.json else text())


def _stage_lines(results: dict[str, Any]) -> str:
    lines = [
        f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}"
        for name, value in results["metrics"].items()
        if not isinstance(value, dict)
    ]
    if results.get("memory_digest"):
        lines.append(f"memory digest: {results['memory_digest']}")
    return "\n".join([*lines, f"seconds: {results['wall_seconds']:.1f}"])


def _split_lines(rows: list[dict[str, Any]]) -> str:
    return "\n".join(
        f"{row['name']}: {row['samples']} samples in {row['shards']} shards, "
        f"{row['bytes'] / 1e6:.1f} MB, {row['classes']} classes of "
        f"{row['smallest_class']} to {row['largest_class']}"
        for row in rows
    )
