"""What each verb does with its parsed options: call a stage or an operation, print the result.

Every import of a stage is inside its verb, so that help and wrong usage cost nothing.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable
from typing import Any

from cmkd_scale import arguments, wording


def quickstart_verb(options: argparse.Namespace) -> None:
    """Run the whole story."""
    from cmkd_scale.stages.quickstart import quickstart, summary_table

    results = quickstart(options.out, seed=options.seed, fsdd=options.fsdd)
    _print(options, results, lambda: summary_table(results))


def _stage(options: argparse.Namespace, run: Callable[..., dict[str, Any]]) -> None:
    from cmkd_scale import distributed
    from cmkd_scale.config import load_config

    results = run(load_config(options.config, options.pairs))
    if distributed.is_main():
        _print(options, results, lambda: wording.stage_lines(results))


def teacher_verb(options: argparse.Namespace) -> None:
    """Train a teacher."""
    from cmkd_scale.stages.teacher import teacher

    _stage(options, teacher)


def memory_verb(options: argparse.Namespace) -> None:
    """Build a memory."""
    from cmkd_scale.stages.build_memory import memory

    _stage(options, memory)


def student_verb(options: argparse.Namespace) -> None:
    """Train a student."""
    from cmkd_scale.stages.student import student

    _stage(options, student)


def evaluate_verb(options: argparse.Namespace) -> None:
    """Evaluate a run."""
    from cmkd_scale.stages.evaluate import evaluate

    _stage(options, evaluate)


def shards_build_verb(options: argparse.Namespace) -> None:
    """Write shards."""
    from cmkd_scale.operations.shards import build_shards

    rows = build_shards(
        options.dataset,
        options.out,
        source=options.source,
        modality=options.modality,
        split=options.split,
        samples_per_shard=options.samples_per_shard,
        workers=options.workers,
        options=options.pairs,
    )
    _print(options, {"splits": rows}, lambda: wording.split_lines(rows))


def shards_index_verb(options: argparse.Namespace) -> None:
    """Index tars of another origin."""
    from cmkd_scale.operations.shards import index_shards

    row = index_shards(
        options.directory,
        name=options.name,
        modality=options.modality,
        split=options.split,
        labels=options.labels,
        workers=options.workers,
    )
    _print(options, {"splits": [row]}, lambda: wording.split_lines([row]))


def shards_labels_verb(options: argparse.Namespace) -> None:
    """Compare the labels of two streams."""
    from cmkd_scale.operations.shards import label_report

    report = label_report(options.learns, options.teaches, split=options.split)
    _print(options, report.to_json(), lambda: "\n".join(report.lines()))


def shards_verify_verb(options: argparse.Namespace) -> None:
    """Check every digest."""
    from cmkd_scale.operations.shards import verify

    count = verify(options.directory)
    result = {"directory": str(options.directory), "splits": count, "problems": []}
    _print(options, result, lambda: f"{options.directory}: {count} splits, every digest right")


def shards_info_verb(options: argparse.Namespace) -> None:
    """Print what a directory of shards holds."""
    from cmkd_scale.operations.shards import info

    rows = info(options.directory)
    _print(options, {"splits": rows}, lambda: wording.split_lines(rows))


def shards_stream_verb(options: argparse.Namespace) -> None:
    """Print keys in the order of training."""
    # A closed pipe (`| head`) ends this verb quietly. Not so training, which would die with
    # a scraper of its metrics that hangs up.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    from cmkd_scale.operations.stream import StreamOptions, stream_keys

    keys = stream_keys(
        options.directory,
        StreamOptions(
            split=options.split,
            modality=options.modality,
            rank=options.rank,
            world_size=options.world_size,
            seed=options.seed,
            sampling=options.sampling,
            samples=options.samples,
            n_per_class=options.n_per_class,
        ),
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


def methods_verb(options: argparse.Namespace) -> None:
    """Print the method table."""
    from cmkd_scale.operations.inspect import methods

    rows = methods()

    _print(options, {"methods": rows}, lambda: wording.method_lines(rows))


def predict_transfer_verb(options: argparse.Namespace) -> None:
    """Say which memories will help a student."""
    from cmkd_scale import distributed
    from cmkd_scale.config import load_config
    from cmkd_scale.stages.predict_transfer import predict_transfer

    results = predict_transfer(
        load_config(options.config, options.pairs),
        options.memory,
        steps=options.steps,
        console=not options.json,
    )
    if distributed.is_main():
        _print(options, results, lambda: wording.forecast_lines(results))


def memory_info_verb(options: argparse.Namespace) -> None:
    """Print what a memory holds."""
    from cmkd_scale.operations.inspect import memory_info

    result = memory_info(options.file)
    _print(options, result, lambda: "\n".join(f"{k}: {v}" for k, v in result.items()))


def checkpoint_verify_verb(options: argparse.Namespace) -> None:
    """Check every checkpoint of a run."""
    from cmkd_scale.operations.checkpoints import verify

    result = verify(options.directory)
    count = len(result["checkpoints"])
    _print(options, result, lambda: f"{options.directory}: {count} checkpoints, every digest right")


def checkpoint_info_verb(options: argparse.Namespace) -> None:
    """Print what checkpoints hold."""
    from cmkd_scale.operations.checkpoints import info

    result = info(options.directory)

    _print(options, result, lambda: wording.checkpoint_lines(result))


def doctor_verb(options: argparse.Namespace) -> None:
    """Look at a run before it is started."""
    from cmkd_scale import distributed
    from cmkd_scale.errors import CmkdError
    from cmkd_scale.operations.doctor import doctor

    report = doctor(
        options.config, options.pairs, stage=options.stage, price_per_hour=options.price_per_hour
    )
    # A rank that has not met the others speaks for itself.
    if distributed.is_main():
        if options.json or not sys.stdout.isatty():
            _print(options, report.to_json(), lambda: wording.doctor_lines(report.to_json()))
        else:
            wording.print_doctor(report.to_json())
    if report.exit_code:
        blockers = sum(finding.severity == "blocker" for finding in report.findings)
        error = CmkdError(f"this run would not go well: {blockers} blocking, see above.")
        error.exit_code = report.exit_code
        raise error


def plan_verb(options: argparse.Namespace) -> None:
    """Estimate a run on a cluster."""
    from cmkd_scale.config import load_config
    from cmkd_scale.operations.plan import make_plan
    from cmkd_scale.operations.plan_cluster import Cluster

    cluster = Cluster(options.nodes, options.devices_per_node, **arguments.assumptions(options))
    plan = make_plan(
        load_config(options.config, options.pairs),
        cluster,
        stage=options.stage,
        backend=options.backend,
        device_bytes=None if options.device_gib is None else options.device_gib * 2**30,
        price_per_hour=options.price_per_hour,
    )
    _print(options, plan.to_json(), lambda: wording.plan_lines(plan.to_json()))


def predict_verb(options: argparse.Namespace) -> None:
    """Predict the classes of files."""
    from cmkd_scale.operations.predict_output import run

    run(
        options.directory,
        options.files,
        options.text,
        form="jsonl" if options.jsonl else "json" if options.json else "text",
        top_k=options.top_k,
        batch_size=options.batch_size,
        workers=options.workers,
        device=options.device,
        backend=options.backend,
    )


def report_verb(options: argparse.Namespace) -> None:
    """Write a report."""
    from cmkd_scale.monitoring.report import write_report

    out = options.out or options.runs[0] / "report.html"
    files = write_report(options.runs, out)
    result = {"report": str(out), "files": [str(file) for file in files]}
    _print(options, result, lambda: f"wrote {out}")


def export_verb(options: argparse.Namespace) -> None:
    """Export a model."""
    from cmkd_scale.operations.export import export

    result = export(
        options.export_run,
        format=options.format,
        out=options.out,
        license_id=options.license,
        controls=options.control,
        push_to=options.push,
    )
    _print(options, result, lambda: wording.export_lines(result))


def kubernetes_render_verb(options: argparse.Namespace) -> None:
    """Write manifests."""
    from cmkd_scale.operations.kubernetes import render

    # What is left is the cluster's.
    own = {"config", "kind", "out", "json", "debug", "run"}
    cluster = {name: value for name, value in vars(options).items() if name not in own}
    result = render(options.config, options.kind, options.out, **cluster)
    _print(options, result, lambda: wording.manifest_lines(result))


def _print(options: argparse.Namespace, value: dict[str, Any], text: Callable[[], str]) -> None:
    print(json.dumps(value) if options.json else text())
