"""Options of the verbs that prepare and make runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cmkd_scale import arguments, verbs

Run = Callable[[argparse.Namespace], None]


def verb(parsers: Any, name: str, run: Run, summary: str, example: str) -> argparse.ArgumentParser:
    """A verb with the options and the help that all have."""
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


def add_quickstart(parsers: Any) -> None:
    """The whole story."""
    parser = verb(
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


def add_shards(parsers: Any) -> None:
    """Data before any run."""
    parser = parsers.add_parser("shards", help="build, check and read WebDataset shards")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    build = verb(
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
        action = verb(actions, name, run, summary, f"cmkd shards {name} data/numbers")
        action.add_argument("directory", type=_local)
    index = verb(
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
    labels = verb(
        actions,
        "labels",
        verbs.shards_labels_verb,
        "compare the labels of two unpaired streams: overlap, missing classes, shift",
        "cmkd shards labels data/numbers/audio data/numbers/image",
    )
    labels.add_argument("learns", metavar="DIR_OR_URL")
    labels.add_argument("teaches", metavar="DIR_OR_URL")
    labels.add_argument("--split", default="train")
    stream = verb(
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


def add_stage(parsers: Any, name: str, run: Run, summary: str) -> None:
    """A stage: all its options are in its config."""
    parser = verb(
        parsers,
        name,
        run,
        summary,
        f"cmkd {name} --config configs/debug/{'student' if name == 'evaluate' else name}.yaml "
        f"run.dir=runs/debug/{'student' if name == 'evaluate' else name}",
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE")
    parser.add_argument("pairs", nargs="*", metavar="section.key=value")


def add_before(parsers: Any) -> None:
    """Verbs that look at a run before it is started."""
    config = "configs/debug/student.yaml"
    doctor = verb(
        parsers,
        "doctor",
        verbs.doctor_verb,
        "what would end a run in hour three, found in its first minute",
        f"cmkd doctor --config {config}",
    )
    plan = verb(
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


def add_kubernetes(parsers: Any) -> None:
    """Manifests."""
    parser = parsers.add_parser("kubernetes", help="run a chain of stages on a cluster")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    render = verb(
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
