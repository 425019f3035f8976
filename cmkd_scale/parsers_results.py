"""Options of the verbs that look at runs, and hand on what they have made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cmkd_scale import arguments, verbs
from cmkd_scale.parsers import verb


def add_inspection(parsers: Any) -> None:
    """Verbs that look at methods, memories, checkpoints and runs."""
    verb(
        parsers,
        "methods",
        verbs.methods_verb,
        "the method table and what each row needs",
        "cmkd methods",
    )
    parser = verb(
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
    parser = verb(
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
        action = verb(actions, name, run, summary, f"cmkd checkpoint {name} runs/debug/student")
        action.add_argument("directory", type=Path)
    parser = verb(
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


def add_export(parsers: Any) -> None:
    """A run's model, for others."""
    parser = verb(
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


def add_predict(parsers: Any) -> None:
    """An exported model at work."""
    parser = verb(
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
