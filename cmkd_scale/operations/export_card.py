"""The model card of an export, ``README.md``: made of what ``cmkd.json`` says, and of nothing else.

What is not known is called unknown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cmkd_scale.data.datasets import DATASETS
from cmkd_scale.operations.export_front_matter import base_model, front_matter, model_name
from cmkd_scale.operations.exported import DESCRIPTION, HEAD, WEIGHTS, Description

_NAMES_SHOWN = 20
_METRICS = {
    "test/accuracy": "accuracy",
    "test/cross_entropy": "cross-entropy (nats)",
    "test/nearest_prototype_accuracy": "accuracy of the nearest prototype",
    "test/knn_accuracy": "accuracy of nearby prototypes",
    "test/teacher_head_accuracy": "accuracy of the teacher's head on these features",
    "test/samples": "test samples",
}
_TERMS = {
    "risk": "cross-entropy of this model",
    "teacher_term": "what the teacher gets wrong",
    "label_gap": "this head against the teacher's head",
    "transfer_gap": "lost in transfer",
}


def write_card(described: Description, *, license_id: str | None, snippets: Sequence[str]) -> str:
    """The card as Markdown with front matter.

    Args:
        described: what ``cmkd.json`` says.
        license_id: of the weights, or None where nobody has said.
        snippets: programs that load the model.
    """
    sections = [
        f"---\n{front_matter(described, license_id)}---\n",
        _title(described),
        _use(described, snippets),
        _data(described),
        _training(described.provenance),
        _results(described.provenance),
        _bound(described.provenance),
        _licences(described, license_id),
        _limits(),
    ]
    return "\n".join(section for section in sections if section)


def _title(described: Description) -> str:
    facts, spec = described.provenance, described.spec
    names = [_code(name) for name in spec.label_names[:_NAMES_SHOWN]]
    rest = len(spec.label_names) - len(names)
    listed = ", ".join(names) + (f" and {rest} more (`{DESCRIPTION}`)" if rest else "")
    return (
        f"# {_code(model_name(described))}\n\n"
        f"A classifier of {spec.modality}, trained by `{facts['method']}` and exported by "
        f"cmkd_scale {facts['exported_by']}. {_taught(facts)}\n\n"
        f"{len(spec.label_names)} classes: {listed}.\n"
    )


def _taught(facts: Mapping[str, Any]) -> str:
    """By whom, in a sentence or two."""
    if facts["live_teacher"] is not None:
        beside = {"paired": "paired with", "class_matched": "of the same class as"}
        which = beside.get(facts["pairs"], "not paired with")
        return f"A teacher ran beside it, on samples {which} its own."
    if not facts["teachers"]:
        return "It had no teacher."
    of = _code(", ".join(sorted({str(teacher["modality"]) for teacher in facts["teachers"]})))
    left_out = facts["guard"] and all(verdict["trust"] == 0 for verdict in facts["guard"])
    return (
        f"What it was aligned to is a prototype memory, left by a teacher of {of}; it has seen no "
        "pairs of the two."
        + (
            " The guard found no sign that this teacher helps and left it out: the weights are "
            "those of a training on labels alone."
            if left_out
            else ""
        )
    )


def _use(described: Description, snippets: Sequence[str]) -> str:
    opens = (
        f"`{described.loads_with['class']}.from_pretrained` opens the encoder (`{WEIGHTS}`); "
        f"`{HEAD}` holds what follows it."
        if described.loads_with
        else f"The encoder (`{WEIGHTS}`) is not one that `AutoModel` knows; the program below, or "
        "cmkd_scale, loads it."
    )
    programs = "\n".join(f"```python\n{snippet.rstrip()}\n```\n" for snippet in snippets)
    backbone = described.spec.backbone
    made = (
        ""
        if backbone is None or backbone.processor_digest is None
        else " The processor whose files lie here makes them (`AutoImageProcessor`, "
        "`AutoFeatureExtractor` or `AutoTokenizer`, `.from_pretrained(directory)`); what is "
        "shorter is padded at its end, a sound with zeros."
    )
    return (
        f"## Use\n\n{opens} With cmkd_scale: `cmkd predict DIRECTORY FILE...`.\n\n{programs}\n"
        f"Files become inputs as `preprocessing` in `{DESCRIPTION}` says (shifts, noise and "
        f"masks are of training alone).{made}\n\n"
        f"```json\n{_json(described.preprocessing)}\n```\n"
    )


def _data(described: Description) -> str:
    data = described.provenance["data"]
    rows = [
        ("data set", _known(data["dataset"])),
        ("manifest", _known(data["name"])),
        ("digest of the manifest", _known(data["manifest"])),
        ("samples of the training split", _known(data["samples"])),
        ("samples of each class", _range(data.get("samples_per_class"))),
        ("classes", _known(len(described.spec.label_names))),
    ]
    if data.get("n_per_class") is not None:
        rows.insert(5, ("trained on, of a class at most", _known(data["n_per_class"])))
    return "## Data\n\n" + _table(("", "training data"), rows)


def _training(facts: Mapping[str, Any]) -> str:
    rows = [
        ("method", _known(facts["method"])),
        ("seed", _known(facts["seed"])),
        ("steps", _known(facts["steps"])),
        ("samples seen", _known(facts["samples_seen"])),
        ("weights", "their moving average" if facts["averaged_weights"] else "of the last step"),
        ("digest of the configuration", _known(facts["config_digest"])),
    ]
    if facts["memory_digest"] is not None:
        rows.append(("digest of the memory", _known(facts["memory_digest"])))
    for number, teacher in enumerate(facts["teachers"], start=1):
        which = "teacher" if len(facts["teachers"]) == 1 else f"teacher {number}"
        rows += [
            (f"modality of the {which}", _known(teacher["modality"])),
            ("its shards", _known(teacher["shards"])),
            ("digest of their manifest", _known(teacher["manifest"])),
        ]
    rows += [
        (f"the guard's trust in teacher {number}", f"{verdict['trust']:.3f} of 1")
        for number, verdict in enumerate(facts["guard"], start=1)
    ]
    if facts["live_teacher"] is not None:
        rows.append(("digest of the live teacher", _known(facts["live_teacher"])))
    rows.append(
        (
            "versions",
            ", ".join(f"{k} {v}" for k, v in sorted(facts["versions"].items())) or "unknown",
        )
    )
    return "## Training\n\n" + _table(("", ""), rows)


def _results(facts: Mapping[str, Any]) -> str:
    if facts["measured"] is None:
        return "## Results\n\nNone are on record: this model has not been evaluated.\n"
    metrics = facts["metrics"]
    columns = [("this model", facts["seed"], metrics)] + [
        (control["method"], control["seed"], control["metrics"]) for control in facts["controls"]
    ]
    heading = ("", *(f"{name}, seed {seed}" for name, seed, _ in columns))
    rows = [
        (title, *(_number(values.get(key), "-") for _, _, values in columns))
        for key, title in _METRICS.items()
        if key in metrics
    ]
    beside = "" if facts["controls"] else "No control is on record beside it. "
    return (
        f"## Results\n\nOn the split {_code(facts['measured']['split'])}. {beside}One run is one "
        f"draw: its numbers say nothing of another seed.\n\n{_table(heading, rows)}"
    )


def _bound(facts: Mapping[str, Any]) -> str:
    if not facts["bound"]:
        return ""
    heading = ("nats", *(f"memory {n}" for n in range(1, len(facts["bound"]) + 1)))
    rows = [
        (title, *(_interval(entry.get(key)) for entry in facts["bound"]))
        for key, title in _TERMS.items()
    ]
    rows.append(
        (
            "at most lost in transfer (U3)",
            *(_interval(entry.get("bounds", {}).get("U3")) for entry in facts["bound"]),
        )
    )
    return (
        "## Error bound\n\nWhere the error comes from, on the same split (95 % intervals); the "
        f"terms add up to the first line. All of it is in `{DESCRIPTION}`.\n\n"
        f"{_table(heading, rows)}"
    )


def _licences(described: Description, license_id: str | None) -> str:
    facts = described.provenance
    rows = [("weights", "unknown" if license_id is None else _code(license_id))]
    dataset = facts["data"]["dataset"]
    if dataset in DATASETS:
        module = getattr(DATASETS[dataset], "__module__", "")
        where = f"unknown here; the notes of `{module}` say whose it is"
    else:
        where = "unknown"
    rows.append(("training data", where))
    rows += [
        (f"data of teacher {number}", "unknown") for number in range(1, len(facts["teachers"]) + 1)
    ]
    if base_model(described) is not None:
        rows.append(("base model", f"that of {_code(base_model(described))}"))
    return (
        "## Licences\n\nA data set has a licence of its own, which may bind what is trained on "
        "it, and what is taught by a teacher that was.\n\n" + _table(("of", "licence"), rows)
    )


def _limits() -> str:
    lines = [
        "It knows the classes above and no others: every input gets one of them.",
        "Its probabilities are those of a softmax, which nobody has calibrated.",
        "It has been tested on the split above alone, if at all; on other recordings, persons or "
        "languages it may do worse.",
    ]
    return "## Limits\n\n" + "".join(f"- {line}\n" for line in lines)


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines
    )


def _code(text: object) -> str:
    """Text out of a file as inline code: nothing in it is markup."""
    return f"`{_line(text).replace('`', chr(39))}`"


def _line(text: object) -> str:
    return "".join(character if character.isprintable() else " " for character in str(text))


def _known(value: object) -> str:
    if value is None:
        return "unknown"
    return str(value) if isinstance(value, int) else _code(value)


def _range(ends: Sequence[int] | None) -> str:
    if ends is None:
        return "unknown"
    low, high = ends
    return f"{low}" if low == high else f"{low} to {high}"


def _number(value: object, missing: str = "unknown") -> str:
    if value is None:
        return missing
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _interval(term: object) -> str:
    if not isinstance(term, Mapping):
        return "unknown"
    if "low" not in term:
        return _number(term.get("value"))
    return f"{_number(term.get('value'))} ({_number(term['low'])} to {_number(term['high'])})"


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, sort_keys=True)
