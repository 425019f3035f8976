"""The front matter of a model card, as the Hub reads it (huggingface.co/docs/hub/model-cards)."""

from __future__ import annotations

from typing import Any

import yaml

from cmkd_scale.operations.exported import GRAPH, Description

_TASKS = {
    "image": "image-classification",
    "audio": "audio-classification",
    "text": "text-classification",
}


def front_matter(described: Description, license_id: str | None) -> str:
    """YAML; what is not known is left out.

    Args:
        described: what ``cmkd.json`` says.
        license_id: of the weights.
    """
    task = _TASKS.get(described.spec.modality)
    graph = GRAPH in described.files
    tags = ["cross-modal-knowledge-distillation", *(["onnx"] if graph else [])]
    values: dict[str, Any] = {
        "license": license_id,
        "library_name": "transformers" if described.loads_with else "cmkd_scale",
        "pipeline_tag": task,
        "tags": tags,
        "base_model": base_model(described),
        "model-index": _model_index(described, task),
    }
    known = {key: value for key, value in values.items() if value is not None}
    return yaml.safe_dump(known, sort_keys=False, allow_unicode=True)


def _model_index(described: Description, task: str | None) -> list[dict[str, Any]] | None:
    """Results as the Hub lists them, where there are any and the data has a name."""
    facts = described.provenance
    dataset, accuracy = facts["data"]["dataset"], facts["metrics"].get("test/accuracy")
    if dataset is None or accuracy is None or task is None:
        return None
    result = {
        "task": {"type": task},
        "dataset": {"type": dataset, "name": dataset, "split": facts["measured"]["split"]},
        "metrics": [{"type": "accuracy", "value": accuracy}],
    }
    return [{"name": model_name(described), "results": [result]}]


def model_name(described: Description) -> str:
    """For people."""
    facts = described.provenance
    dataset = facts["data"]["dataset"]
    words = [dataset, described.spec.modality, facts["method"]]
    return " ".join(str(word) for word in words if word is not None)


def base_model(described: Description) -> str | None:
    """The published model that training started from."""
    return None if described.spec.backbone is None else described.spec.backbone.source
