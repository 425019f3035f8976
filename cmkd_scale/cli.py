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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cmkd_scale import __version__, arguments, verbs
from cmkd_scale.errors import EXIT_DONE, EXIT_FAULT, CmkdError

Run = Callable[[argparse.Namespace], None]

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
    parsers = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    _add_quickstart(parsers)
    _add_shards(parsers)
    _add_stage(parsers, "teacher", verbs.teacher_verb, "train a teacher on its modality's labels")
    _add_stage(
        parsers, "memory", verbs.memory_verb, "build the prototype memory of a trained teacher"
    )
    _add_stage(parsers, "student", verbs.student_verb, "train a student, aligned to a memory")
    _add_stage(parsers, "evaluate", verbs.evaluate_verb, "evaluate a trained run on its test split")
    _add_before(parsers)
    _add_inspection(parsers)
    _add_export(parsers)
    _add_predict(parsers)
    _add_kubernetes(parsers)
    return parser


def _verb(parsers: Any, name: str, run: Run, summary: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = parsers.add_parser(
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


def _add_quickstart(parsers: Any) -> None:
    parser = _verb(
        parsers,
        "quickstart",
        verbs.quickstart_verb,
        "the whole story on bundled real data, on a CPU, in minutes",
        "cmkd quickstart --out runs/quickstart --fsdd /data/free-spoken-digit-dataset",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), metavar="DIR")
    parser.add_argument("--seed", type=int, default=0, help="first of the three seeds")
    parser.add_argument(
        "--fsdd", type=Path, metavar="DIR", help="Free Spoken Digit Dataset: real speech"
    )


def _add_shards(parsers: Any) -> None:
    parser = parsers.add_parser("shards", help="build, check and read WebDataset shards")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    build = _verb(
        actions,
        "build",
        verbs.shards_build_verb,
        "write shards and their manifest",
        "cmkd shards build numbers --out data/numbers --modality image train_per_class=40",
    )
    build.add_argument("dataset")
    build.add_argument("--out", type=Path, required=True, metavar="DIR")
    build.add_argument("--source", type=Path, metavar="DIR", help="raw data")
    build.add_argument("--modality")
    build.add_argument("--split")
    build.add_argument("--samples-per-shard", type=int, default=1000, metavar="N")
    build.add_argument("--workers", type=int, metavar="N", help="processes; default: all cores")
    build.add_argument("pairs", nargs="*", metavar="key=value")
    for name, run, summary in (
        ("verify", verbs.shards_verify_verb, "check every digest"),
        ("info", verbs.shards_info_verb, "print counts, sizes and classes"),
    ):
        action = _verb(actions, name, run, summary, f"cmkd shards {name} data/numbers")
        action.add_argument("directory", type=_local)
    index = _verb(
        actions,
        "index",
        verbs.shards_index_verb,
        "index WebDataset tars of another origin, so that they can be read here",
        "cmkd shards index data/tars --modality image --split train --labels names.txt",
    )
    index.add_argument("directory", type=Path)
    index.add_argument("--modality", required=True)
    index.add_argument("--split", default="train")
    index.add_argument("--name", help="of the data set; default: the directory's")
    index.add_argument(
        "--labels", type=Path, metavar="FILE", help="a class name a line, in the order of cls"
    )
    index.add_argument("--workers", type=int, metavar="N", help="processes; default: all cores")
    labels = _verb(
        actions,
        "labels",
        verbs.shards_labels_verb,
        "compare the labels of two unpaired streams: overlap, missing classes, shift",
        "cmkd shards labels data/numbers/audio data/numbers/image",
    )
    labels.add_argument("learns", metavar="DIR_OR_URL")
    labels.add_argument("teaches", metavar="DIR_OR_URL")
    labels.add_argument("--split", default="train")
    stream = _verb(
        actions,
        "stream",
        verbs.shards_stream_verb,
        "print the order in which training reads",
        "cmkd shards stream data/numbers/audio --rank 0 --world-size 2 --print-keys",
    )
    stream.add_argument("directory", metavar="DIR_OR_URL")
    stream.add_argument("--rank", type=int, required=True)
    stream.add_argument("--world-size", type=int, required=True)
    stream.add_argument("--seed", type=int, default=0)
    stream.add_argument("--split", default="train")
    stream.add_argument("--modality")
    stream.add_argument(
        "--sampling", choices=("natural", "square_root", "balanced"), default="natural"
    )
    stream.add_argument("--samples", choices=("labelled", "unlabelled", "all"), default="labelled")
    stream.add_argument("--n-per-class", type=int, metavar="N", help="as data.n_per_class")
    stream.add_argument("--stop-after", type=int, metavar="N", help="counted for this rank")
    stream.add_argument("--state", type=Path, metavar="FILE", help="continue from here")
    stream.add_argument("--save-state", type=Path, metavar="FILE")
    stream.add_argument("--print-keys", action="store_true")


def _local(text: str) -> Path:
    """A directory of this machine: of a URL, ``Path`` would make one without a word."""
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text} is remote: check it where it was built; what is fetched from it is checked "
            "on the way"
        )
    return Path(text)


def _add_stage(parsers: Any, name: str, run: Run, summary: str) -> None:
    parser = _verb(
        parsers,
        name,
        run,
        summary,
        f"cmkd {name} --config configs/debug/{'student' if name == 'evaluate' else name}.yaml "
        f"run.dir=runs/debug/{'student' if name == 'evaluate' else name}",
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE")
    parser.add_argument("pairs", nargs="*", metavar="section.key=value")


def _add_before(parsers: Any) -> None:
    """Verbs that look at a run before it is started."""
    config = "configs/debug/student.yaml"
    doctor = _verb(
        parsers,
        "doctor",
        verbs.doctor_verb,
        "what would end a run in hour three, found in its first minute",
        f"cmkd doctor --config {config}",
    )
    plan = _verb(
        parsers,
        "plan",
        verbs.plan_verb,
        "memory and time of a run on another cluster, from a few steps measured here",
        f"cmkd plan --config {config} --nodes 64 --devices-per-node 8 "
        "train.global_batch_size=30720",
    )
    for parser in (doctor, plan):
        parser.add_argument("--config", type=Path, required=True, metavar="FILE")
        parser.add_argument("--stage", metavar="VERB", help="default: what the config is for")
        parser.add_argument(
            "--price-per-hour",
            type=arguments.positive,
            metavar="X",
            help="of all machines together",
        )
        parser.add_argument("pairs", nargs="*", metavar="section.key=value")
    arguments.add_cluster(plan)


def _add_inspection(parsers: Any) -> None:
    _verb(
        parsers,
        "methods",
        verbs.methods_verb,
        "the method table and what each row needs",
        "cmkd methods",
    )
    parser = _verb(
        parsers,
        "predict-transfer",
        verbs.predict_transfer_verb,
        "will this teacher help? rank memories by the gain they promise, before training",
        "cmkd predict-transfer --memory runs/debug/memory --config configs/debug/student.yaml",
    )
    parser.add_argument(
        "--memory",
        type=Path,
        action="append",
        required=True,
        metavar="FILE",
        help="may be repeated",
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="the student's")
    parser.add_argument(
        "--steps", type=int, metavar="N", help="of training without a teacher; default: train.steps"
    )
    parser.add_argument("pairs", nargs="*", metavar="section.key=value")
    parser = _verb(
        parsers,
        "memory-info",
        verbs.memory_info_verb,
        "what is in a prototype memory",
        "cmkd memory-info runs/debug/memory/memory.safetensors",
    )
    parser.add_argument("file", type=Path)
    parser = parsers.add_parser("checkpoint", help="check and list the checkpoints of a run")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, run, summary in (
        ("verify", verbs.checkpoint_verify_verb, "compare every file with its digest"),
        ("info", verbs.checkpoint_info_verb, "print what each checkpoint holds"),
    ):
        action = _verb(actions, name, run, summary, f"cmkd checkpoint {name} runs/debug/student")
        action.add_argument("directory", type=Path)
    parser = _verb(
        parsers,
        "report",
        verbs.report_verb,
        "one HTML file and its plots from one or several runs",
        "cmkd report runs/debug/student --out report.html",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: report.html in the first run"
    )


def _add_export(parsers: Any) -> None:
    parser = _verb(
        parsers,
        "export",
        verbs.export_verb,
        "a trained model as a directory that others can load, with a model card",
        "cmkd export runs/debug/student --format onnx --out exported",
    )
    parser.add_argument("export_run", type=Path, metavar="RUN")
    parser.add_argument(
        "--format",
        choices=("safetensors", "onnx"),
        default="safetensors",
        help="onnx: the same, and model.onnx beside it; default: safetensors",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: export in the run")
    parser.add_argument("--license", metavar="ID", help="of the weights, for the card, e.g. mit")
    parser.add_argument(
        "--control",
        type=Path,
        action="append",
        default=[],
        metavar="RUN",
        help="a run to name beside it in the card; may be repeated",
    )
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="upload it to the Hub; a new repository is private"
    )


def _add_predict(parsers: Any) -> None:
    parser = _verb(
        parsers,
        "predict",
        verbs.predict_verb,
        "classes of files, by an exported model",
        "cmkd predict runs/debug/student/export pictures/ sounds/one.wav --top-k 3\n"
        "         find pictures -name '*.png' | cmkd predict DIR - --jsonl\n\n"
        "A file that cannot be predicted is named on standard error, and the others are "
        "predicted.\nExit code: 0 if all were; 42 if one was read and is damaged or of another "
        "kind; else 2: one\ncould not be read (missing, not a regular file, too large, named as "
        "of another modality).",
    )
    arguments.add_prediction(parser)


def _add_kubernetes(parsers: Any) -> None:
    parser = parsers.add_parser("kubernetes", help="run a chain of stages on a cluster")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    render = _verb(
        actions,
        "render",
        verbs.kubernetes_render_verb,
        "write the manifests of a stage and of those that it builds on",
        "cmkd kubernetes render --config configs/numbers/student.yaml --kind jobset "
        "--out deploy --nodes 2 --gpus-per-node 8",
    )
    render.add_argument("--config", type=Path, required=True, metavar="FILE", help="the last one's")
    render.add_argument("--kind", choices=("jobset", "trainjob", "job"), required=True)
    render.add_argument("--out", type=Path, required=True, metavar="DIR")
    arguments.add_pods(render)
