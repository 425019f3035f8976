from __future__ import annotations

import io
import json
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cmkd_scale.data.audio import wav_bytes
from cmkd_scale.data.modality_base import DecodeError, Modality
from cmkd_scale.data.processed import (
    PAD_TOKEN,
    ProcessedText,
    SpectrogramModality,
    WaveformModality,
    kind_of,
    processed,
)
from cmkd_scale.data.processors import Processor
from cmkd_scale.errors import UsageError
from tests.data.senses import MEMBERS, RATE, picture, sound, text
from tests.models.backbones import FAMILIES

t: Any = transformers


@pytest.fixture(scope="module")
def processors(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Processor]:
    root = tmp_path_factory.mktemp("processors")

    def find(name: str) -> Processor:
        family = FAMILIES[name]
        if not (root / name).exists():
            family.processor().save_pretrained(root / name)
        return Processor(str(root / name), family.modality)

    return find


def decoded(processor: Processor, number: int = 0, **options: Any) -> torch.Tensor:
    extension, make = MEMBERS[processor.modality]
    return processed(processor, options).decode({extension: make(number % 3, number)})


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sample_is_what_the_processor_makes_of_it(
    name: str, processors: Callable[[str], Processor]
) -> None:
    processor = processors(name)
    found, modality = decoded(processor), processed(processor, {})
    assert tuple(found.shape) == modality.shape
    assert found.dtype == (torch.int64 if processor.modality == "text" else torch.float32)
    if processor.modality == "image":
        original = t.AutoImageProcessor.from_pretrained(processor.directory)
        opened = Image.open(io.BytesIO(picture(0, 0))).convert("RGB")
        expected = original(opened, return_tensors="pt")["pixel_values"][0]
    elif processor.modality == "text":
        original = t.AutoTokenizer.from_pretrained(processor.directory)
        numbers = original(text(0, 0).decode())["input_ids"]
        expected = torch.full((64,), PAD_TOKEN)
        expected[: len(numbers)] = torch.tensor(numbers)
    else:
        import soundfile

        original = t.AutoFeatureExtractor.from_pretrained(processor.directory)
        samples, _ = soundfile.read(io.BytesIO(sound(0, 0)), dtype="float32")
        made = original(samples, sampling_rate=RATE, return_tensors="pt")
        given = made[original.model_input_names[0]][0]
        expected = torch.zeros(modality.shape)
        expected[tuple(slice(0, size) for size in given.shape)] = given
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["vit", "ast", "wav2vec2", "whisper", "bert", "byt5"])
def test_augmentation_keeps_shape_and_follows_its_generator(
    name: str, processors: Callable[[str], Processor]
) -> None:
    processor = processors(name)
    options = {"drop": 0.3} if processor.modality == "text" else {}
    modality, sample = processed(processor, options), decoded(processor)
    before = sample.clone()
    variants = [modality.augment(sample, np.random.default_rng(n)) for n in (1, 1, 2, 3, 4, 5)]
    assert torch.equal(variants[0], variants[1])
    assert any(not torch.equal(variants[0], other) for other in variants[2:])
    assert torch.equal(sample, before)
    for variant in variants:
        assert variant.shape == sample.shape
        assert variant.dtype == sample.dtype
        assert variant.is_contiguous()
        if variant.is_floating_point():
            assert variant.isfinite().all()


@given(seed=st.integers(0, 2**32 - 1), length=st.integers(1, 4000))
@settings(max_examples=50)
def test_what_is_behind_a_waveform_stays_silent(seed: int, length: int) -> None:
    class Rate(WaveformModality):
        @property
        def shape(self) -> tuple[int, ...]:
            return (4000,)

    class Fixed(Processor):
        def load(self) -> Any:
            return type("Extractor", (), {"sampling_rate": 1000})

    modality = Rate(processor=Fixed("", "audio"), shift_time=0.2, stretch_time=0.3)
    clip = torch.zeros(4000)
    clip[:length] = 1.0
    heard = modality.augment(clip, np.random.default_rng(seed)).nonzero().flatten()
    if len(heard):
        # At most as long as stretched and shifted.
        assert int(heard[-1]) < min(4000, length * np.exp(0.3) + 0.2 * 4000 + 2)


def test_silence_inside_a_clip_is_no_end_of_it(tmp_path: Path) -> None:
    """Where nothing is normalised, as by WavLM's, it is exactly 0."""
    t.Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(tmp_path)
    still = dict.fromkeys(("shift_time", "stretch_time", "noise", "mask_seconds"), 0.0)
    modality = processed(Processor(str(tmp_path), "audio"), still)
    samples = np.zeros(3000, np.float32)
    samples[:500] = samples[2000:2600] = 0.25
    sample = modality.decode({"wav": wav_bytes(samples, RATE)})
    assert torch.equal(modality.augment(sample, np.random.default_rng(0)), sample)


def test_special_tokens_outlive_augmentation(processors: Callable[[str], Processor]) -> None:
    processor = processors("bert")
    modality = processed(processor, {"drop": 0.9, "substitute": 0.5})
    assert isinstance(modality, ProcessedText)
    sample = decoded(processor)
    tokenizer = processor.load()
    for seed in range(50):
        found = modality.augment(sample, np.random.default_rng(seed))
        kept = found[found != PAD_TOKEN]
        assert kept[0] == tokenizer.cls_token_id
        assert kept[-1] == tokenizer.sep_token_id
        assert len(kept) >= 3
        assert set(kept.tolist()) <= set(sample.tolist())


def test_long_texts_and_sounds_are_cut(processors: Callable[[str], Processor]) -> None:
    tokens = processed(processors("bert"), {"max_tokens": 6}).decode({"txt": b"red green " * 40})
    assert tokens.shape == (6,)
    assert tokens[-1] == processors("bert").load().sep_token_id
    noise = (np.random.default_rng(0).standard_normal(3 * RATE) / 10).astype(np.float32)
    waves = processed(processors("wav2vec2"), {"seconds": 0.5})
    found = waves.decode({"wav": wav_bytes(noise, RATE)})
    assert found.shape == (RATE // 2,)
    assert found.count_nonzero() > 7900
    whole = processed(processors("wav2vec2"), {"seconds": 3.0}).decode(
        {"wav": wav_bytes(noise, RATE)}
    )
    middle = whole[RATE + RATE // 4 : 2 * RATE - RATE // 4]
    assert np.corrcoef(found.numpy(), middle.numpy())[0, 1] > 0.999


def test_sounds_of_other_rates_are_resampled(processors: Callable[[str], Processor]) -> None:
    time = np.arange(8000) / 8000
    slow = wav_bytes(np.sin(2 * np.pi * 440 * time).astype(np.float32), 8000)
    found = processed(processors("wav2vec2"), {}).decode({"wav": slow})[:RATE].numpy()
    assert np.argmax(np.abs(np.fft.rfft(found))) == 440  # one second: a bin is 1 Hz


def test_a_modality_travels_between_processes(processors: Callable[[str], Processor]) -> None:
    for name in ("vit", "ast", "bert"):
        modality: Modality = processed(processors(name), {})
        again = ForkingPickler.loads(ForkingPickler.dumps(modality))
        assert again == modality
        extension, make = MEMBERS[processors(name).modality]
        content = {extension: make(0, 0)}
        assert torch.equal(again.decode(content), modality.decode(content))


def test_damage_is_damage(processors: Callable[[str], Processor]) -> None:
    for name, extension in (("vit", "png"), ("ast", "wav"), ("wav2vec2", "wav"), ("bert", "txt")):
        modality = processed(processors(name), {})
        for content in (b"", b"\xff\xfe\x00", b"   "):
            with pytest.raises(DecodeError):
                modality.decode({extension: content})


def test_kinds_of_sound(processors: Callable[[str], Processor]) -> None:
    assert kind_of(processors("wav2vec2")) is WaveformModality
    assert kind_of(processors("ast")) is SpectrogramModality
    assert processed(processors("ast"), {}).shape == (32, 16)
    assert processed(processors("whisper"), {}).shape == (16, 100)
    assert processors("hubert").marks_padding()
    assert not processors("wav2vec2").marks_padding()


def test_spectrograms_without_a_length_of_their_own_end_in_zeros(tmp_path: Path) -> None:
    t.SeamlessM4TFeatureExtractor(num_mel_bins=8, feature_size=8).save_pretrained(tmp_path)
    modality = processed(Processor(str(tmp_path), "audio"), {"seconds": 2.0})
    found = modality.decode({"wav": sound(0, 0)})
    assert found.shape == modality.shape == (99, 16)
    frames = (found != 0).any(1).nonzero().flatten()
    assert 5 < int(frames[-1]) < 15  # a fifth of a second in windows of 20 ms


def test_an_identity_follows_the_files(tmp_path: Path) -> None:
    for name, mean in (("a", 0.5), ("b", 0.5), ("c", 0.4)):
        t.ViTImageProcessor(image_mean=[mean] * 3).save_pretrained(tmp_path / name)
    a, b, c = (processed(Processor(str(tmp_path / name), "image"), {}).identity() for name in "abc")
    assert a == b != c
    assert json.loads(json.dumps(a)) == a
    assert processed(Processor(str(tmp_path / "a"), "image"), {"frames": 2}).identity() != a


def test_processors_that_do_not_serve_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no processor of image \(preprocessor_config"):
        Processor(str(tmp_path), "image").load()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "preprocessor_config.json").write_text("{no json")
    with pytest.raises(UsageError, match="cannot be loaded"):
        Processor(str(tmp_path / "broken"), "audio").load()
    ragged = t.CLIPImageProcessor(do_center_crop=False, size={"shortest_edge": 32})
    ragged.save_pretrained(tmp_path / "ragged")
    with pytest.raises(UsageError, match="batches need one shape"):
        _ = processed(Processor(str(tmp_path / "ragged"), "image"), {}).shape


def test_processors_that_are_no_such_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code beside them is not run, even if somebody says yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w')")
    own = {"image_processor_type": "Own", "auto_map": {"AutoImageProcessor": "code.Own"}}
    for content in ([1], own):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
        with pytest.raises(UsageError, match="cannot be loaded"):
            Processor(str(tmp_path), "image").load()
    assert not (tmp_path / "was run").exists()


def test_a_text_needs_room_beside_the_special_tokens(
    processors: Callable[[str], Processor],
) -> None:
    assert len(decoded(processors("bert"), max_tokens=3)) == 3
    with pytest.raises(UsageError, match=r"max_tokens is 2, and the tokenizer adds 2"):
        processed(processors("bert"), {"max_tokens": 2})
    with pytest.raises(UsageError, match="max_tokens is 0"):
        processed(processors("bert"), {"max_tokens": 0})


def test_processors_of_old_releases_are_read(tmp_path: Path) -> None:
    """A side instead of a size, no type of its own, or that of a feature extractor."""
    common = {"do_normalize": True, "do_resize": True, "resample": 2, "size": 16}
    mean = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    for name, more in (("plain", {}), ("old", {"feature_extractor_type": "ViTFeatureExtractor"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "vit"}))
        content = json.dumps({**common, **mean, **more})
        (tmp_path / name / "preprocessor_config.json").write_text(content)
        modality = processed(Processor(str(tmp_path / name), "image"), {})
        assert modality.shape == (3, 16, 16)
        assert modality.decode({"png": picture(0, 0)}).abs().max() <= 1


def test_what_needs_torchvision_is_made_by_pillow(tmp_path: Path) -> None:
    config = {
        "image_processor_type": "DINOv3ViTImageProcessorFast",
        "do_resize": True,
        "size": {"height": 16, "width": 16},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "do_center_crop": None,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    found = processed(Processor(str(tmp_path), "image"), {}).decode({"png": picture(1, 0)})
    opened = Image.open(io.BytesIO(picture(1, 0))).resize((16, 16), Image.Resampling.BILINEAR)
    scaled = np.asarray(opened, dtype=np.float64).transpose(2, 0, 1) / 255
    mean, std = (np.array(config[key])[:, None, None] for key in ("image_mean", "image_std"))
    np.testing.assert_allclose(found.numpy(), (scaled - mean) / std, atol=1e-5)
