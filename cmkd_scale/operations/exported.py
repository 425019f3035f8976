"""The directory that ``cmkd export`` writes: its layout, and the one line that reads it.

    exported = load_exported(directory)

``cmkd.json`` describes the model and holds the SHA-256 of every other file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from cmkd_scale.data.modalities import Modality
from cmkd_scale.errors import IntegrityError, UsageError
from cmkd_scale.files import file_digest, read_json
from cmkd_scale.models.model import Model
from cmkd_scale.stages.backbones import kept_processor
from cmkd_scale.stages.common import ModelSpec
from cmkd_scale.stages.streams import make_modality

FORMAT_VERSION = 1
DESCRIPTION = "cmkd.json"
WEIGHTS = "model.safetensors"
"""The encoder: under transformers' names where it is a model of theirs, else ``encoder.*``."""
HEAD = "head.safetensors"
"""``projection.*`` and ``head.*``."""
GRAPH = "model.onnx"
CARD = "README.md"
"""The model card, which may be edited: it is not compared with its digest."""

_WRONG = (
    *(KeyError, TypeError, ValueError, AttributeError, RuntimeError, OSError),
    *(SafetensorError, UsageError),
)
"""What building a model out of a wrong description raises."""
_REMEDY = "Export it again with `cmkd export RUN --out DIR`, or copy the whole directory again."


@dataclass(frozen=True, slots=True)
class Description:
    """What ``cmkd.json`` says."""

    directory: Path
    spec: ModelSpec
    preprocessing: Mapping[str, Any]
    """All that shapes the tensors that the model reads."""
    loads_with: Mapping[str, Any]
    """How transformers opens the encoder: its ``class``, the ``attribute`` of the opened model that
    the encoder is (empty: itself), ``pooling``. Empty where no class of theirs opens it."""
    provenance: Mapping[str, Any]
    """Method, seed, steps, digests, metrics, versions."""
    files: Mapping[str, str]
    """SHA-256 by name of every other file."""

    @property
    def modality(self) -> Modality:
        """What turns the bytes of a file into the tensor that the model reads.

        Raises:
            IntegrityError: the processor's files are not those that the model was trained with.
        """
        spec = self.spec
        processor = kept_processor(spec.backbone, spec.modality, self.directory)
        return make_modality(spec.modality, spec.transform, processor)

    def to_json(self) -> dict[str, Any]:
        """The content of ``cmkd.json``."""
        return {
            "format_version": FORMAT_VERSION,
            "model": self.spec.to_json(),
            "modality": self.spec.modality,
            "preprocessing": dict(self.preprocessing),
            "label_names": list(self.spec.label_names),
            "feature_dim": self.spec.feature_dim,
            "loads_with": dict(self.loads_with),
            "provenance": dict(self.provenance),
            "files": dict(self.files),
        }

    def check(self, *names: str) -> None:
        """Compare files with their digests.

        Raises:
            IntegrityError: one is missing or is not what was exported.
        """
        for name in names:
            file = self.directory / name
            if name not in self.files or not file.is_file():
                raise IntegrityError(f"{file} is missing. {_REMEDY}")
            if file_digest(file) != self.files[name]:
                raise IntegrityError(
                    f"{file} does not match its SHA-256 in {DESCRIPTION}: it was changed or "
                    f"damaged after it was exported. {_REMEDY}"
                )


@dataclass(frozen=True, slots=True)
class Exported:
    """A model out of an exported directory."""

    model: Model
    """In eval mode, on the CPU, float32."""
    spec: ModelSpec
    label_names: tuple[str, ...]
    modality: Modality
    provenance: Mapping[str, Any]


def load_exported(directory: Path) -> Exported:
    """Load the model of an exported directory.

    Raises:
        UsageError: ``directory`` is no export, but perhaps a run.
        IntegrityError: a file of it is missing, changed or damaged.
    """
    described = read_description(directory)
    described.check(*{WEIGHTS, HEAD, *described.files} - {CARD, GRAPH})
    try:
        model = described.spec.build()
        _load_weights(model, described)
        return Exported(
            model=model.eval(),
            spec=described.spec,
            label_names=described.spec.label_names,
            modality=described.modality,
            provenance=described.provenance,
        )
    except _WRONG as error:
        raise _not_as_described(directory, error) from None


def _load_weights(model: Model, described: Description) -> None:
    """The inverse of what ``export`` writes.

    Raises:
        RuntimeError: they are those of another model.
    """
    encoder = load_file(described.directory / WEIGHTS)
    if described.loads_with:
        attribute = described.loads_with["attribute"]
        theirs = f"{attribute}." if attribute else ""
        encoder = {
            f"encoder.backbone.{name.removeprefix(theirs)}": value
            for name, value in encoder.items()
        }
    model.load_state_dict({**encoder, **load_file(described.directory / HEAD)})


def read_description(directory: Path) -> Description:
    """Read ``cmkd.json``; no other file is opened.

    Raises:
        UsageError: ``directory`` is no export, but perhaps a run.
        IntegrityError: it is damaged or of another version.
    """
    file = directory / DESCRIPTION
    if not file.is_file():
        raise UsageError(_no_export(directory))
    value = read_json(file, _REMEDY)
    version = value.get("format_version")
    if version != FORMAT_VERSION:
        raise IntegrityError(
            f"{file} has format {version!r}, and this version of the program reads "
            f"{FORMAT_VERSION}. {_REMEDY}"
        )
    try:
        files = {str(name): str(digest) for name, digest in value["files"].items()}
        if any(Path(name).name != name for name in files):
            raise ValueError("a file outside the directory")
        return Description(
            directory=directory,
            spec=ModelSpec.from_json(value["model"]),
            preprocessing=dict(value["preprocessing"]),
            loads_with=dict(value["loads_with"]),
            provenance=dict(value["provenance"]),
            files=files,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _not_as_described(directory, error) from None


def is_run(directory: Path) -> bool:
    """Whether a stage has written into the directory."""
    return (directory / "config.yaml").is_file() and (directory / "env.json").is_file()


def _no_export(directory: Path) -> str:
    if is_run(directory):
        return (
            f"{directory} is a run, not an exported model. Export it first with `cmkd export "
            f"{directory} --out DIR`, and name DIR."
        )
    if not directory.is_dir():
        return f"There is no directory {directory}; name one that `cmkd export` has written."
    return (
        f"{directory} is no exported model: it has no {DESCRIPTION}. Name a directory that "
        "`cmkd export RUN --out DIR` has written."
    )


def _not_as_described(directory: Path, error: Exception) -> IntegrityError:
    said = " ".join(str(error).split())[:300]
    return IntegrityError(
        f"{directory} does not hold the model that its {DESCRIPTION} describes "
        f"({type(error).__name__}: {said}). {_REMEDY}"
    )
