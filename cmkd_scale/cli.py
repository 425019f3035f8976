"""``cmkd``: the verbs. A stage is imported only when it is asked for.

Results go to stdout (with ``--json`` one JSON object and nothing else), logs and progress to
stderr. Exit codes: 0 done, 1 a fault of the program, 2 wrong config or usage, 42 data or
checkpoint integrity, 138 preempted with the state saved.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence

from cmkd_scale import __version__, parsers, parsers_results, verbs
from cmkd_scale.errors import EXIT_DONE, EXIT_FAULT, CmkdError
from cmkd_scale.parsers import Run

_EXIT_INTERRUPTED = 130
_GONE = (
    "Another process of this run is gone, or has not answered for run.collective_timeout_seconds: "
    "its own message, or its machine, says why. What was saved is untouched: the same command "
    "continues from the newest checkpoint."
)


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
        print(f"cmkd{_rank()}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("cmkd: interrupted", file=sys.stderr)
        return _EXIT_INTERRUPTED
    except RuntimeError as error:
        if not _lost_peer(error):
            raise
        if options.debug:
            traceback.print_exc()
        print(f"cmkd{_rank()}: {_GONE} ({_first_line(error)})", file=sys.stderr, flush=True)
        # What is left of the group cannot be taken down in order, only left behind.
        sys.modules["cmkd_scale.distributed"].end(EXIT_FAULT)
    finally:
        # Only if a verb has loaded it: torch is too heavy for `cmkd --help`.
        if "cmkd_scale.distributed" in sys.modules:
            sys.modules["cmkd_scale.distributed"].leave()
    return EXIT_DONE


def program(arguments: Sequence[str] | None = None) -> None:
    """Run one verb and end with its exit code: what the command ``cmkd`` is."""
    code = main(arguments)
    if "cmkd_scale.distributed" in sys.modules and "LOCAL_RANK" in os.environ:
        sys.modules["cmkd_scale.distributed"].end(code)
    sys.exit(code)


def _rank() -> str:
    """Which process speaks, unless it is the first."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f" [rank {rank}]"


def _lost_peer(error: RuntimeError) -> bool:
    module = sys.modules.get("cmkd_scale.distributed")
    return module is not None and bool(module.lost_peer(error))


def _first_line(error: RuntimeError) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse; ``key=value`` and names of files may stand anywhere, which argparse cannot do."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and hasattr(options, "files"):
        behind_options = argparse.ArgumentParser(add_help=False)
        behind_options.add_argument("files", nargs="*")
        more, rest = behind_options.parse_known_args(rest)
        options.files = [*options.files, *more.files]
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
    added = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    parsers.add_quickstart(added)
    parsers.add_shards(added)
    for name, run, summary in (
        ("teacher", verbs.teacher_verb, "train a teacher on its modality's labels"),
        ("memory", verbs.memory_verb, "build the prototype memory of a trained teacher"),
        ("student", verbs.student_verb, "train a student, aligned to a memory"),
        ("evaluate", verbs.evaluate_verb, "evaluate a trained run on its test split"),
    ):
        parsers.add_stage(added, name, run, summary)
    parsers.add_before(added)
    parsers_results.add_inspection(added)
    parsers_results.add_export(added)
    parsers_results.add_predict(added)
    parsers.add_kubernetes(added)
    return parser
