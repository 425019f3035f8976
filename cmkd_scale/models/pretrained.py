"""Models of ``transformers`` by configuration, with random weights or those in a directory.

With ``encoders.py`` and ``backbone.py`` the door of ``transformers``' models.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from cmkd_scale.errors import UsageError, did_you_mean
from cmkd_scale.models.families import MODALITY_OF_INPUT

_TOWERS = {"image": "vision_config", "audio": "audio_config", "text": "text_config"}
_SPECIAL_TOKENS = tuple(f"{name}_token_id" for name in ("pad", "bos", "eos", "cls", "sep"))


def pretrained_config(directory: Path, modality: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a backbone in hub layout, of the tower that reads a modality.

    Args:
        directory: with ``config.json``.
        modality: that it is to read.
        options: over it.

    Raises:
        UsageError: it is of no family that is known, reads another modality, or has no such option.
    """
    from transformers import AutoConfig

    with _explained(f"the configuration in {directory}"):
        # Unless it is told not to, it asks on the terminal whether code there is to be run.
        config = AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        config = getattr(config, _TOWERS.get(modality, ""), config)
    _refuse_unknown(config, options)
    for name, value in options.items():
        setattr(config, name, value)
    with _explained(f"the configuration in {directory}"):
        return _settled(config, modality, str(directory))


def random_config(
    options: Mapping[str, Any], modality: str, shape: tuple[int, ...]
) -> dict[str, Any]:
    """A configuration of the family ``options["model_type"]``, sizes of inputs from the samples.

    Args:
        options: ``model_type`` and what departs from the family's defaults.
        modality: that it is to read.
        shape: of one decoded sample.

    Raises:
        UsageError: as ``pretrained_config``.
    """
    from transformers import CONFIG_MAPPING

    if "model_type" not in options:
        raise UsageError(
            "model.backbone_config has no model_type, and there is no model.backbone: give either, "
            "as in model.backbone_config.model_type=vit."
        )
    family = str(options["model_type"])
    if family not in CONFIG_MAPPING:
        near = difflib.get_close_matches(family, CONFIG_MAPPING.keys(), n=3)
        raise UsageError(
            f"model.backbone_config.model_type '{family}' is no family of transformers"
            f"{'; near it: ' + ', '.join(near) if near else ''}."
        )
    kind = CONFIG_MAPPING[family]
    usual = kind()
    given = {name: value for name, value in options.items() if name != "model_type"}
    _refuse_unknown(usual, given)
    sizes = {name: value for name, value in _input_sizes(shape).items() if hasattr(usual, name)}
    with _explained(f"model_type '{family}'"):
        return _settled(kind(**{**sizes, **given}), modality, f"model_type '{family}'")


def _input_sizes(shape: tuple[int, ...]) -> dict[str, Any]:
    """Options that follow from a sample's shape, whatever the family calls them."""
    if len(shape) == 1:  # bytes of a text
        return {
            "vocab_size": 257,
            # One more than places: some families count from behind the padding's.
            "max_position_embeddings": max(shape[0] + 1, 64),
            **dict.fromkeys(_SPECIAL_TOKENS, 0),
        }
    if len(shape) < 3:
        return {}
    channels, rows, columns = shape[-3:]
    return {
        "num_channels": channels,
        "image_size": [rows, columns] if rows != columns else rows,
        "num_mel_bins": rows,
        "max_length": columns,
        "max_source_positions": columns // 2,
    }


def _refuse_unknown(config: Any, options: Mapping[str, Any]) -> None:
    known = config.to_dict()
    for name in options:
        if name not in known and not hasattr(config, name):
            raise UsageError(
                f"model.backbone_config.{name} is no option of {type(config).__name__}; "
                f"{did_you_mean(name, known)}"
            )


@contextmanager
def _explained(where: str) -> Iterator[None]:
    """What ``transformers`` says of a configuration, as a message to the user."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise UsageError(f"transformers refuses {where}: {line_of(error)}") from None


def _settled(config: Any, modality: str, where: str) -> dict[str, Any]:
    """The configuration as JSON, with nothing random in it; refuses another modality."""
    found: dict[str, Any] = config.to_dict()
    for name, value in found.items():
        if "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool):
            found[name] = 0.0
    # A cache of keys and values serves generation, and grows when blocks are recomputed.
    for name in ("apply_spec_augment", "use_cache"):
        if name in found:
            found[name] = False
    for name in ("transformers_version", "_name_or_path"):  # of another time, another machine
        found.pop(name, None)
    reads = _reads(found, where)
    pictures = modality == "audio" and reads == "image"  # a spectrogram is one
    if reads != modality and not pictures:
        raise UsageError(
            f"The backbone {where} ({config.model_type}) reads {reads}, and the shards hold "
            f"{modality}. Choose a backbone of {modality} with model.backbone, or other shards "
            "with data.shards or data.modality."
        )
    return cast(dict[str, Any], json.loads(json.dumps(found, default=list)))


def _reads(config: Mapping[str, Any], where: str) -> str:
    """The modality of a family's main input."""
    try:
        with torch.device("meta"):
            name = make_model(config, "auto").main_input_name
    except ValueError as error:
        raise UsageError(
            f"The backbone {where} is no model for features: {line_of(error)}"
        ) from None
    if name not in MODALITY_OF_INPUT:
        raise UsageError(
            f"The backbone {where} reads '{name}', which is none of "
            f"{', '.join(MODALITY_OF_INPUT)}: it cannot be an encoder here."
        )
    return MODALITY_OF_INPUT[name]


def make_model(config: Mapping[str, Any], attention: str, directory: Path | None = None) -> Any:
    """The model, or the encoder of one that has a decoder, with random weights or those there."""
    from transformers import AutoModel, AutoModelForTextEncoding

    _keep_whole()
    made = config_object(config)
    kind: Any = AutoModelForTextEncoding if has_text_encoder(made) else AutoModel
    options = {} if attention == "auto" else {"attn_implementation": attention}
    if directory is None:
        model = kind.from_config(made, **options)
    else:
        with _quiet():
            model, about = kind.from_pretrained(
                directory,
                config=made,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they count as missing
                **options,
            )
        misfits = [name for name, *_ in about["mismatched_keys"]]
        model.missing_weights = frozenset([*about["missing_keys"], *misfits])
    if made.is_encoder_decoder and kind is AutoModel:
        encoder = model.get_encoder()
        lacking = getattr(model, "missing_weights", ())
        encoder.missing_weights = frozenset(
            name.removeprefix("encoder.") for name in lacking if name.startswith("encoder.")
        )
        return encoder
    return model


def _keep_whole() -> None:
    """Keep ``transformers`` from cutting each weight up as it is made, under ZeRO-3: the engine
    does that, to whole ones."""
    # Importing it would import DeepSpeed, which then talks on stdout; where it matters, it is here.
    module = sys.modules.get("transformers.integrations.deepspeed")
    if module is not None:
        module.unset_hf_deepspeed_config()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's progress, which would run through ours, and its report of weights that
    are not taken: those of another tower, or of a head."""
    from transformers.utils import logging

    log: Any = logging
    before = log.get_verbosity()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(before)


def config_object(config: Mapping[str, Any]) -> Any:
    """The configuration as ``transformers`` has it."""
    from transformers import CONFIG_MAPPING

    family = CONFIG_MAPPING[config["model_type"]]
    return family.from_dict({k: v for k, v in config.items() if k != "model_type"})


def has_text_encoder(config: Any) -> bool:
    """Whether ``transformers`` has a class for the encoder of this text-to-text family."""
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING

    return bool(config.is_encoder_decoder) and type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING


def line_of(error: Exception) -> str:
    """What an error says, in one line of bearable length."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."
