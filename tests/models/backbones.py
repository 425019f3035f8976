"""Small random backbones in the hub's layout, of many families, each with its processor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

t: Any = transformers  # which has annotations for a part of this

_SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
_PLAIN = {name: value for name, value in _SMALL.items() if name != "intermediate_size"}
_WAVES: dict[str, Any] = {
    **_SMALL,
    "conv_dim": (16, 16),
    "conv_stride": (10, 8),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
_STAGES: dict[str, Any] = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
_SIDE = {"height": 32, "width": 32}
_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "green", "blue", "one", "two"]


@dataclass(frozen=True)
class Family:
    """How a family is written in small."""

    modality: str
    config: Callable[[], Any]
    processor: Callable[[], Any]


def _vit_processor() -> Any:
    return t.ViTImageProcessor(size=_SIDE)


def _word_pieces() -> Any:
    letters = [chr(code) for code in range(97, 123)]
    words = [*_WORDS, *letters, *(f"##{letter}" for letter in letters)]
    return t.BertTokenizer(vocab={word: number for number, word in enumerate(words)})


def _fbank() -> Any:
    return t.ASTFeatureExtractor(num_mel_bins=16, max_length=32)


def _wave(mask: bool = False) -> Any:
    return t.Wav2Vec2FeatureExtractor(return_attention_mask=mask)


def _siglip() -> Any:
    vision = {**_SMALL, "image_size": 32, "patch_size": 8}
    return t.SiglipConfig(vision_config=vision, text_config={**_SMALL, "vocab_size": 64})


FAMILIES: dict[str, Family] = {
    "vit": Family(
        "image", lambda: t.ViTConfig(**_SMALL, image_size=32, patch_size=8), _vit_processor
    ),
    "dinov2": Family(
        "image",
        lambda: t.Dinov2Config(**_PLAIN, mlp_ratio=2, image_size=32, patch_size=8),
        lambda: t.BitImageProcessor(size={"shortest_edge": 36}, crop_size=_SIDE),
    ),
    "dinov3": Family(
        "image",
        lambda: t.DINOv3ViTConfig(**_SMALL, image_size=32, patch_size=8),
        _vit_processor,
    ),
    "siglip": Family("image", _siglip, lambda: t.SiglipImageProcessor(size=_SIDE)),
    "convnext": Family(
        "image",
        lambda: t.ConvNextConfig(**_STAGES, image_size=32),
        lambda: t.ConvNextImageProcessor(size={"shortest_edge": 32}),
    ),
    "resnet": Family("image", lambda: t.ResNetConfig(embedding_size=8, **_STAGES), _vit_processor),
    "ast": Family(
        "audio",
        lambda: t.ASTConfig(
            **_SMALL,
            max_length=32,
            num_mel_bins=16,
            patch_size=8,
            frequency_stride=8,
            time_stride=8,
        ),
        _fbank,
    ),
    "wav2vec2": Family("audio", lambda: t.Wav2Vec2Config(**_WAVES), _wave),
    "hubert": Family(
        "audio",
        lambda: t.HubertConfig(**_WAVES, feat_extract_norm="layer", do_stable_layer_norm=True),
        lambda: _wave(mask=True),
    ),
    "whisper": Family(
        "audio",
        lambda: t.WhisperConfig(
            d_model=16,
            encoder_layers=2,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            num_mel_bins=16,
            max_source_positions=50,
            max_target_positions=4,
            vocab_size=8,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        lambda: t.WhisperFeatureExtractor(feature_size=16, chunk_length=1),
    ),
    "bert": Family("text", lambda: t.BertConfig(**_SMALL, vocab_size=64), _word_pieces),
    "modernbert": Family(
        "text",
        lambda: t.ModernBertConfig(
            **_SMALL,
            vocab_size=64,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
            cls_token_id=2,
            sep_token_id=3,
        ),
        _word_pieces,
    ),
    "byt5": Family(
        "text",
        lambda: t.T5Config(d_model=16, d_kv=8, num_layers=2, num_heads=2, d_ff=32, vocab_size=384),
        t.ByT5Tokenizer,
    ),
}


def save_backbone(name: str, directory: Path, seed: int = 0) -> Path:
    """Write a random model of a family, and its processor; returns ``directory``."""
    family = FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = t.AutoModel.from_config(family.config())
    for module in model.modules():  # as if it had seen data
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.constant_(module.running_var, 2.0)  # type: ignore[arg-type]
            torch.nn.init.constant_(module.running_mean, -0.3)  # type: ignore[arg-type]
    model.save_pretrained(directory)
    family.processor().save_pretrained(directory)
    return directory
