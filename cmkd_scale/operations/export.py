"""``cmkd export``: the model of a finished run as a directory that others can load.

The directory (``exported``) appears whole or not at all. What has been written is read back and
held against the trained model before it appears.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cmkd_scale.errors import UsageError, did_you_mean
from cmkd_scale.files import file_digest, sync, to_json
from cmkd_scale.models.backbone import BackboneEncoder
from cmkd_scale.models.model import Model
from cmkd_scale.models.stock import Stock
from cmkd_scale.monitoring.report_runs import read_object
from cmkd_scale.operations.export_card import write_card
from cmkd_scale.operations.export_directory import check_out, written_whole
from cmkd_scale.operations.export_facts import provenance
from cmkd_scale.operations.export_inputs import named_inputs, probe
from cmkd_scale.operations.export_onnx import Graph, require_onnx, write_graph
from cmkd_scale.operations.export_push import check_push, push
from cmkd_scale.operations.export_snippets import graph_snippet, torch_snippet
from cmkd_scale.operations.exported import (
    CARD,
    DESCRIPTION,
    GRAPH,
    HEAD,
    WEIGHTS,
    Description,
    is_run,
    load_exported,
)
from cmkd_scale.records import ModelOutput
from cmkd_scale.stages.backbones import copy_processor
from cmkd_scale.stages.common import ModelSpec, Trained, load_trained

FORMATS = ("safetensors", "onnx")
"""``onnx`` has all that ``safetensors`` has, and the graph."""
TOLERANCE = 1e-4
"""Largest difference of what is read back, over the largest number or 1."""
_BATCHES = (1, 3)


def export(
    run: Path,
    *,
    format: str,
    out: Path | None = None,
    license_id: str | None = None,
    controls: Sequence[Path] = (),
    push_to: str | None = None,
) -> dict[str, Any]:
    """Write the model of a run's newest valid checkpoint as a directory.

    Args:
        run: a finished run of ``cmkd teacher`` or ``cmkd student``.
        format: one of ``FORMATS``.
        out: the directory; an earlier export there is replaced. Default: ``export`` in the run.
        license_id: of the weights, for the card.
        controls: finished runs to be named in the card beside this one.
        push_to: repository of the Hub, ``owner/name``, that the directory is uploaded to.

    Returns:
        ``directory``, ``format``, ``automodel`` (whether transformers opens the encoder by
        itself), ``method``, ``steps``, ``parameters``, ``files`` with their bytes,
        ``difference`` from the trained model, and ``pushed``, the address or None.

    Raises:
        UsageError: there is nothing that can be exported, or nowhere to write it.
        IntegrityError: the run is damaged.
    """
    if format not in FORMATS:
        raise UsageError(f"--format {format} is unknown; {did_you_mean(format, FORMATS)}")
    if format == "onnx":
        require_onnx()
    if push_to is not None:
        check_push(push_to)
    out = (run / "export" if out is None else out).resolve()
    _check_run(run)
    check_out(out, run)
    trained = load_trained(run, str(read_object(run / "env.json").get("stage")))
    _check_trained(run, trained)
    facts = provenance(run, trained, controls)
    try:
        with written_whole(out) as temporary:
            result = _write(temporary, trained, facts, format, license_id)
    except OSError as error:
        raise UsageError(
            f"{out} cannot be written: {error}. Free space, or choose another directory with --out."
        ) from None
    return {
        "directory": str(out),
        "format": format,
        "method": facts["method"],
        "steps": facts["steps"],
        **result,
        "pushed": None if push_to is None else push(out, push_to),
    }


def _check_run(run: Path) -> None:
    if not run.is_dir():
        raise UsageError(f"There is no run directory {run}.")
    if (run / DESCRIPTION).is_file() and not is_run(run):
        raise UsageError(f"{run} is an export already; name the run that it was made of.")
    if not is_run(run):
        raise UsageError(f"{run} is no run: name a directory that a stage has written.")
    stage = read_object(run / "env.json").get("stage")
    if stage == "memory":
        raise UsageError(
            f"{run} is a run of `cmkd memory`, which holds prototypes and no model. Export the "
            "teacher that it was built from, or a student that was taught by it."
        )


def _check_trained(run: Path, trained: Trained) -> None:
    step, steps = trained.state["step"], trained.config.train.steps
    if step < steps:
        raise UsageError(
            f"{run} is not finished: its newest valid checkpoint is of step {step} of {steps}. "
            "Start the same command again to finish it, then export."
        )
    bad = [k for k, value in trained.model.state_dict().items() if not value.isfinite().all()]
    if bad:
        raise UsageError(
            f"The model of {run} has weights that are not finite ({', '.join(bad[:3])}), so it is "
            "of no use to anyone. Train it again with a lower train.learning_rate."
        )


def _write(
    target: Path, trained: Trained, facts: Mapping[str, Any], format: str, license_id: str | None
) -> dict[str, Any]:
    """Fill a directory, and hold it against the trained model."""
    model, spec = trained.model.eval(), _as_exported(trained.spec)
    stock = _write_weights(target, model)
    if trained.processor is not None:
        copy_processor(trained.processor, target)
    described = Description(target, spec, {}, _loads_with(spec, stock), facts, {})
    described = _describe(replace(described, preprocessing=described.modality.identity()))
    again = load_exported(target).model
    differences = {"safetensors": _difference(model, again, spec, "the exported directory")}
    snippets = [torch_snippet(described, again)]
    if format == "onnx":
        graph = _write_graph(described, again)
        differences["onnx"] = _difference(
            model, lambda inputs: _through(graph, spec, inputs), spec, "onnxruntime"
        )
        snippets.append(graph_snippet(described, graph.inputs))
    described = _describe(described)
    card = write_card(described, license_id=license_id, snippets=snippets)
    (target / CARD).write_text(card, encoding="utf-8")
    _describe(described)
    for path in (*target.iterdir(), target):
        sync(path)
    return {
        "automodel": stock is not None,
        "parameters": sum(value.numel() for value in again.parameters()),
        "files": {path.name: path.stat().st_size for path in sorted(target.iterdir())},
        "difference": differences,
    }


def _describe(described: Description) -> Description:
    """Write ``cmkd.json`` with the digests of the files that are there."""
    files = {
        path.name: file_digest(path)
        for path in sorted(described.directory.iterdir())
        if path.name != DESCRIPTION
    }
    described = replace(described, files=files)
    (described.directory / DESCRIPTION).write_bytes(to_json(described.to_json()))
    return described


def _write_graph(described: Description, model: Model) -> Graph:
    encoder: Any = model.encoder
    if isinstance(encoder, BackboneEncoder):
        # As plain operations, which can be traced of every family.
        encoder.model.set_attn_implementation("eager")
    about = {
        "modality": described.spec.modality,
        "preprocessing": described.preprocessing,
        "label_names": described.spec.label_names,
    }
    path = described.directory / GRAPH
    write_graph(model, described.spec, path, about)
    return Graph(path)


def _as_exported(spec: ModelSpec) -> ModelSpec:
    """With adapters merged, and without the place where its files lay on this machine."""
    backbone = spec.backbone
    if backbone is None:
        return spec
    merged = replace(
        backbone,
        tuning="full" if backbone.tuning == "lora" else backbone.tuning,
        source=backbone.source if backbone.revision is not None else None,  # else a directory
    )
    return replace(spec, backbone=merged)


def _loads_with(spec: ModelSpec, stock: Stock | None) -> dict[str, Any]:
    if stock is None:
        return {}
    pooling = "mean" if spec.backbone is None else spec.backbone.pooling
    return {"class": stock.loader, "attribute": stock.attribute, "pooling": pooling}


def _write_weights(target: Path, model: Model) -> Stock | None:
    """The encoder as transformers opens it where it can, and the rest."""
    encoder: Any = model.encoder
    stock: Stock | None = encoder.stock()
    own: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        (own if name.startswith("encoder.") else rest)[name] = value.contiguous()
    if stock is not None:
        stock.config.save_pretrained(target)
        own = stock.state
    for path, tensors in ((target / WEIGHTS, own), (target / HEAD, rest)):
        path.touch()
        mode = path.stat().st_mode
        save_file(tensors, path, metadata={"format": "pt"})  # which older versions look for
        path.chmod(mode)  # it makes files that nobody else can read
    return stock


@torch.no_grad()
def _difference(
    model: Model, other: Callable[[Tensor], ModelOutput], spec: ModelSpec, what: str
) -> float:
    """Largest difference of features and logits over batches, relative as ``TOLERANCE`` is.

    Raises:
        UsageError: it is larger than that.
    """
    largest = 0.0
    for batch in _BATCHES:
        inputs = probe(spec, batch)
        for ours, theirs in zip(model(inputs)[:2], other(inputs)[:2], strict=True):
            gap = float((ours - theirs).abs().max()) / max(1.0, float(ours.abs().max()))
            largest = max(largest, gap) if gap == gap else float("inf")
    if largest > TOLERANCE:
        raise UsageError(
            f"The model does not come back as it was: {what} differs from it by {largest:.2g}, and "
            f"{TOLERANCE:g} is allowed. Nothing was exported."
        )
    return largest


def _through(graph: Graph, spec: ModelSpec, inputs: Tensor) -> ModelOutput:
    named = named_inputs(graph.inputs, spec, inputs)
    try:
        features, logits = graph({name: value.numpy() for name, value in named.items()})
    except Exception as error:  # onnxruntime's have no common base but this
        raise UsageError(
            f"The ONNX graph cannot be run with a batch of {len(inputs)} "
            f"({' '.join(str(error).split())[:300]}). Export it with --format safetensors."
        ) from None
    return ModelOutput(torch.from_numpy(features), torch.from_numpy(logits), ())
