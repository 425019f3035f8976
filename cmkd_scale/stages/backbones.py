"""The backbone that a configuration asks for: its files, its processor, and what rebuilds it.

A run keeps what it needs of the files in ``backbone/``: configuration and processor, no weights,
which are in its checkpoints.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cmkd_scale import distributed
from cmkd_scale.config import Config
from cmkd_scale.config_sections import ModelConfig
from cmkd_scale.data.modalities import Modality
from cmkd_scale.data.processed import PAD_TOKEN, WaveformModality
from cmkd_scale.data.processors import Processor
from cmkd_scale.errors import IntegrityError, UsageError
from cmkd_scale.files import read_json, to_json, write_atomically
from cmkd_scale.models.backbone_spec import BackboneSpec, make_spec
from cmkd_scale.models.hub import HubFiles, find_files
from cmkd_scale.models.pretrained import pretrained_config, random_config

DIRECTORY = "backbone"
"""Of a run."""

_ENCODER_OPTIONS = ("encoder", "width", "depth")


def processor_for(model: ModelConfig, modality: str) -> Processor | None:
    """What makes the inputs of the config's model; None: the built-in modality.

    Raises:
        UsageError: the backbone is not to be had, reads another modality, or has no processor.
    """
    files = _files(model)
    if files is None:
        return None
    pretrained_config(files.directory, modality, {})  # which refuses another modality
    processor = Processor(str(files.directory), modality)
    processor.load()
    return processor


def backbone_spec(config: Config, modality: str, reads: Modality) -> BackboneSpec | None:
    """What rebuilds the config's backbone; None: it has a small encoder.

    Args:
        config: of the run.
        modality: of its shards.
        reads: what decodes them.

    Raises:
        UsageError: options that do not go together, and as ``processor_for``.
    """
    model = config.model
    files = _files(model)
    if files is None and not model.backbone_config:
        return None
    _refuse_encoder_options(model)
    options: dict[str, Any] = {
        "tuning": model.tuning,
        "lora_rank": model.lora_rank,
        "lora_alpha": model.lora_alpha,
        "lora_targets": tuple(model.lora_targets),
        "attention": model.attention,
        "pooling": model.pooling,
    }
    if files is None:
        found = random_config(model.backbone_config, modality, reads.shape)
        if model.tuning != "full":
            raise UsageError(
                f"model.tuning={model.tuning} keeps a backbone's weights, and those of "
                "model.backbone_config alone are random: set model.backbone, or model.tuning=full."
            )
        return make_spec(
            found, pretrained=False, padding=0 if modality == "text" else None, **options
        )
    found = pretrained_config(files.directory, modality, model.backbone_config)
    processor = Processor(str(files.directory), modality)
    _refuse_other_tokens(found, processor)
    return make_spec(
        found,
        pretrained=True,
        padding=PAD_TOKEN if modality == "text" else None,
        ragged=isinstance(reads, WaveformModality) or processor.marks_padding(),
        masked=processor.marks_padding(),
        source=model.backbone,
        revision=files.revision,
        weights_digest=files.weights_digest(),
        processor_digest=processor.digest(),
        **options,
    )


def weights_directory(model: ModelConfig) -> Path | None:
    """Where the weights lie that a backbone begins from."""
    files = _files(model)
    return None if files is None else files.directory


def keep_files(
    config: Config, spec: BackboneSpec | None, modality: str, run: Path
) -> BackboneSpec | None:
    """Write ``backbone/`` of a run on rank 0, if it is not there; a collective call.

    Returns:
        The spec with the configuration that the run was begun with: another version of
        ``transformers`` may resolve it otherwise.

    Raises:
        UsageError: it cannot be written, or processes have found different files.
        IntegrityError: what is there is damaged.
    """
    if spec is None:
        return None
    about = f"{spec.weights_digest} {spec.processor_digest}"
    if not distributed.same_digest(hashlib.sha256(about.encode()).hexdigest()):
        raise UsageError(
            "The processes find different files of the backbone; give all machines the same "
            "revision (model.revision) or directory."
        )
    files, directory = _files(config.model), run / DIRECTORY
    kept = directory / "config.json"

    def write() -> None:
        if kept.is_file():  # written last; what a run was begun with is not replaced
            return
        try:
            directory.mkdir(exist_ok=True)
            if files is not None:
                copy_processor(Processor(str(files.directory), modality), directory)
            write_atomically(kept, to_json(spec.config))
        except OSError as error:
            raise UsageError(f"{directory} cannot be written: {error}. Free space.") from None

    distributed.run_on_main(write)
    return replace(spec, config=read_json(kept))


def copy_processor(processor: Processor, directory: Path) -> None:
    """The processor's files, into a directory.

    Raises:
        OSError: they cannot be written.
    """
    for name in processor.files():
        write_atomically(directory / name, (Path(processor.directory) / name).read_bytes())


def kept_processor(spec: BackboneSpec | None, modality: str, directory: Path) -> Processor | None:
    """The processor whose files a run or an export keeps.

    Raises:
        IntegrityError: they are not those that the model was trained with.
    """
    if spec is None or spec.processor_digest is None:
        return None
    processor = Processor(str(directory), modality)
    if processor.digest() != spec.processor_digest:
        raise IntegrityError(
            f"The processor's files in {directory} are not those that the model was trained with; "
            "restore them from a copy."
        )
    return processor


def _files(model: ModelConfig) -> HubFiles | None:
    return None if model.backbone is None else _found(model.backbone, model.revision)


@functools.lru_cache(maxsize=16)
def _found(backbone: str, revision: str | None) -> HubFiles:
    return find_files(backbone, revision)


def _refuse_other_tokens(found: Mapping[str, Any], processor: Processor) -> None:
    known = found.get("vocab_size")
    if processor.modality == "text" and known is not None and len(processor.load()) > known:
        raise UsageError(
            f"The tokenizer in {processor.directory} has {len(processor.load())} tokens, and the "
            f"backbone's vocab_size is {known}: the two do not belong together."
        )


def _refuse_encoder_options(model: ModelConfig) -> None:
    usual: Mapping[str, Any] = {
        name: ModelConfig.model_fields[name].default for name in _ENCODER_OPTIONS
    }
    given = [f"model.{name}" for name in _ENCODER_OPTIONS if getattr(model, name) != usual[name]]
    if given:
        raise UsageError(
            f"The config has a backbone, and options of the small encoders: leave out "
            f"{' and '.join(given)}, or use model.backbone_config."
        )
