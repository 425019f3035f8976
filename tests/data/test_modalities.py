"""Bytes to tensors: against independent references, on damaged input, and under augmentation."""

from __future__ import annotations

import dataclasses
import io
import struct
import wave
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from cmkd_scale.data.audio import wav_bytes
from cmkd_scale.data.modalities import (
    MODALITIES,
    AudioModality,
    DecodeError,
    ImageModality,
    Modality,
    TextModality,
)
from cmkd_scale.errors import EXIT_INTEGRITY, UsageError


def png(pixels: NDArray[np.uint8], kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(
        buffer, format=kind, **({"lossless": True} if kind == "WEBP" else {})
    )
    return buffer.getvalue()


def chirp(
    seconds: float = 0.8, rate: int = 8000, low: float = 300, high: float = 1500
) -> NDArray[np.float32]:
    time = np.arange(int(seconds * rate)) / rate
    phase = 2 * np.pi * (low * time + (high - low) * time**2 / (2 * seconds))
    return (0.5 * np.sin(phase)).astype(np.float32)


def example(name: str) -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    return {
        "image": {"png": png(rng.integers(0, 256, (28, 56), dtype=np.uint8))},
        "audio": {"wav": wav_bytes(chirp(), 8000)},
        "text": {"txt": "quarante-deux à peu près".encode()},
    }[name]


@pytest.mark.parametrize("name", MODALITIES)
def test_contract_of_every_modality(name: str) -> None:
    modality = MODALITIES[name]()
    members = example(name)
    decoded = modality.decode(members)
    assert tuple(decoded.shape) == modality.shape
    assert torch.equal(decoded, modality.decode({**members, "cls": b"1", "json": b"{}"}))
    before = decoded.clone()
    first = modality.augment(decoded, np.random.default_rng(1))
    again = modality.augment(decoded, np.random.default_rng(1))
    other = modality.augment(decoded, np.random.default_rng(2))
    assert torch.equal(decoded, before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, decoded)
    assert first.shape == decoded.shape
    assert first.dtype == decoded.dtype
    assert torch.isfinite(first.float()).all()
    assert decoded.dtype == (torch.int64 if name == "text" else torch.float32)


@pytest.mark.parametrize("name", MODALITIES)
def test_augmentation_does_not_draw_from_global_generators(name: str) -> None:
    modality = MODALITIES[name]()
    decoded = modality.decode(example(name))
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        results.append(modality.augment(decoded, np.random.default_rng(7)))
    assert torch.equal(*results)


@pytest.mark.parametrize("name", MODALITIES)
@pytest.mark.parametrize("members", [{}, {"cls": b"1"}, {"png": b"", "wav": b"", "txt": b""}])
def test_nothing_to_decode(name: str, members: dict[str, bytes]) -> None:
    with pytest.raises(DecodeError) as caught:
        MODALITIES[name]().decode(members)
    assert caught.value.exit_code == EXIT_INTEGRITY


@pytest.mark.parametrize("name", MODALITIES)
@settings(max_examples=60)
@given(data=st.data())
def test_damaged_content_raises_only_decode_errors(name: str, data: st.DataObject) -> None:
    modality = MODALITIES[name]()
    ((extension, whole),) = example(name).items()
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, min(len(content), 200) - 1))] = data.draw(
            st.integers(0, 255)
        )
    content = content[: data.draw(st.integers(0, len(content)))]
    try:
        decoded = modality.decode({extension: bytes(content)})
    except DecodeError as error:
        assert str(error).endswith(".")  # noqa: PT017 - some damage is harmless
    else:
        assert tuple(decoded.shape) == modality.shape
        assert torch.isfinite(decoded.float()).all()


def options_of(kind: type[Modality]) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


@pytest.mark.parametrize(
    ("kind", "option"), [(kind, name) for kind in MODALITIES.values() for name in options_of(kind)]
)
def test_every_option_is_a_number_that_is_checked(kind: type[Modality], option: str) -> None:
    assert isinstance(getattr(kind(), option), int | float)
    with pytest.raises(UsageError, match=option):
        kind(**{option: -1})


def test_impossible_combinations_of_options_are_refused() -> None:
    with pytest.raises(UsageError, match="channels is 2"):
        ImageModality(channels=2)
    with pytest.raises(UsageError, match="frames is 0"):
        AudioModality(frames=0)
    with pytest.raises(UsageError, match="lower n_mels"):
        AudioModality(n_mels=200).decode(example("audio"))


# ------------------------------------------------------------------------------ image


@pytest.mark.parametrize(("kind", "extension"), [("PNG", "png"), ("WEBP", "webp")])
def test_pixels_come_out_as_they_went_in(kind: str, extension: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    decoded = ImageModality(6, 9, channels=3).decode({extension: png(pixels, kind)})
    np.testing.assert_allclose(decoded.numpy().transpose(1, 2, 0), pixels / 127.5 - 1, atol=1e-6)


def test_pictures_of_other_sizes_and_colours_are_converted() -> None:
    colour = png(np.full((300, 200, 4), 255, dtype=np.uint8))
    decoded = ImageModality().decode({"png": colour})
    assert decoded.shape == (1, 28, 56)
    assert torch.equal(decoded, torch.ones(1, 28, 56))
    photo = png(np.full((30, 30), 127, dtype=np.uint8), "JPEG")
    assert ImageModality(channels=3).decode({"jpg": photo}).abs().max() < 0.01


def test_pixel_bombs_are_refused_before_they_are_decoded() -> None:
    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    for side in (8_000, 20_000, 2**31 - 1):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
        bomb = (
            b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
        )
        with pytest.raises(DecodeError, match="not a readable picture"):
            ImageModality().decode({"png": bomb})


def test_image_without_augmentation_is_unchanged() -> None:
    modality = ImageModality(shift_x=0, shift_y=0, zoom=0, rotation_degrees=0)
    decoded = modality.decode(example("image"))
    torch.testing.assert_close(
        modality.augment(decoded, np.random.default_rng(0)), decoded, atol=1e-4, rtol=0
    )


def test_image_is_shifted_by_no_more_than_it_may() -> None:
    modality = ImageModality(shift_x=0.1, shift_y=0.0, zoom=0, rotation_degrees=0)
    picture = torch.zeros(1, 28, 56)
    picture[0, 10:18, 24:32] = 1.0
    places = []
    for seed in range(50):
        moved = modality.augment(picture, np.random.default_rng(seed))[0]
        mass = moved / moved.sum()
        places.append(float((mass.sum(0) * torch.arange(56)).sum()) - 27.5)
        assert float((mass.sum(1) * torch.arange(28)).sum()) == pytest.approx(13.5, abs=0.02)
    assert max(map(abs, places)) <= 5.65  # a tenth of 56 pixels
    assert max(places) > 4
    assert min(places) < -4


def test_rotation_keeps_lengths_on_both_axes() -> None:
    """Grid coordinates are not square: without the aspect a rotation would shear."""
    modality = ImageModality(shift_x=0, shift_y=0, zoom=0, rotation_degrees=40)
    rows, columns = torch.meshgrid(torch.arange(28.0), torch.arange(56.0), indexing="ij")
    line = torch.exp(-((rows - 13.5) ** 2) / 2) * (abs(columns - 27.5) < 8)

    def length(picture: torch.Tensor) -> float:
        mass = picture / picture.sum()
        points = torch.stack([rows.flatten(), columns.flatten()])
        return float(torch.linalg.eigvalsh(torch.cov(points, aweights=mass.flatten()))[1].sqrt())

    for seed in range(5):
        turned = modality.augment(line[None], np.random.default_rng(seed))[0]
        assert length(turned) == pytest.approx(length(line), rel=0.03)


# ------------------------------------------------------------------------------ audio


def plain() -> AudioModality:
    """No trimming or stretching, so that frames are those of the spectrogram."""
    return AudioModality(trim_db=0, range_db=200, fit_seconds=0.5, frames=50)


def test_log_mel_is_that_of_transformers() -> None:
    rng = np.random.default_rng(0)
    sound = (chirp(1.3) + 0.05 * rng.standard_normal(10_400)).astype(np.float32)
    expected = spectrogram(
        sound,
        window_function(256, "hann"),
        frame_length=256,
        hop_length=80,
        power=2.0,
        mel_filters=mel_filter_bank(129, 40, 40.0, 4000.0, 8000, mel_scale="htk"),
        mel_floor=1e-10,
        log_mel="log",
    )
    expected = expected[:, 40:90]  # half a second from the middle of 131 frames
    expected = expected - expected.mean(axis=1, keepdims=True)
    expected /= expected.std()
    stored = io.BytesIO()
    import soundfile

    soundfile.write(stored, sound, 8000, format="WAV", subtype="FLOAT")
    decoded = plain().decode({"wav": stored.getvalue()})[0].numpy()
    np.testing.assert_allclose(decoded, expected, atol=2e-4)


def test_bands_are_normalised_over_the_clip() -> None:
    decoded = AudioModality().decode(example("audio"))[0]
    torch.testing.assert_close(decoded.mean(1), torch.zeros(40), atol=1e-4, rtol=0)
    assert float(decoded.std()) == pytest.approx(1, abs=0.01)


def test_loudness_and_silence_around_a_clip_do_not_matter() -> None:
    rng = np.random.default_rng(0)
    sound = np.concatenate([np.zeros(3200), chirp(), np.zeros(4000)])
    sound = (sound + 0.003 * rng.standard_normal(len(sound))).astype(np.float32)
    alone, padded = (
        AudioModality().decode({"wav": wav_bytes(part, 8000)}).flatten()
        for part in (sound[3200:-4000], sound)
    )
    quiet = AudioModality().decode({"wav": wav_bytes(np.float32(0.5) * sound, 8000)}).flatten()
    untrimmed = AudioModality(trim_db=0).decode({"wav": wav_bytes(sound, 8000)}).flatten()
    assert np.corrcoef(padded, quiet)[0, 1] > 0.99
    assert np.corrcoef(alone, padded)[0, 1] > 0.8
    assert np.corrcoef(alone, untrimmed)[0, 1] < 0.5


def test_other_rates_channels_and_formats_sound_the_same() -> None:
    import soundfile

    def stored(sound: NDArray[np.float32], rate: int, kind: str) -> bytes:
        buffer = io.BytesIO()
        soundfile.write(buffer, sound, rate, format=kind)
        return buffer.getvalue()

    modality = plain()
    expected = modality.decode({"wav": wav_bytes(chirp(), 8000)}).flatten()
    high = chirp(rate=22050)
    stereo = np.stack([high, high], axis=1)
    for extension, content in (
        ("flac", stored(chirp(), 8000, "FLAC")),
        ("wav", stored(stereo, 22050, "WAV")),
    ):
        found = modality.decode({extension: content}).flatten()
        assert np.corrcoef(expected, found)[0, 1] > 0.97


def test_short_and_silent_clips_are_decoded() -> None:
    for sound in (np.zeros(1), np.zeros(8000), np.ones(3), chirp(0.01)):
        decoded = AudioModality().decode({"wav": wav_bytes(sound.astype(np.float32), 8000)})
        assert torch.isfinite(decoded).all()


def test_clips_that_are_too_long_are_refused_before_they_are_read() -> None:
    with pytest.raises(DecodeError, match="lasts 2 s; at most 1 s"):
        AudioModality(max_seconds=1).decode({"wav": wav_bytes(chirp(2), 8000)})


def test_audio_without_augmentation_is_unchanged() -> None:
    still = {
        name: 0
        for name in (
            *("shift_time", "stretch_time", "shift_mel", "stretch_mel", "gain", "equalise"),
            *("noise", "mask_frames", "mask_mels"),
        )
    }
    modality = AudioModality(**still)
    decoded = modality.decode(example("audio"))
    torch.testing.assert_close(modality.augment(decoded, np.random.default_rng(0)), decoded)


@pytest.mark.parametrize(("option", "axis"), [("mask_frames", 1), ("mask_mels", 0)])
def test_masks_are_no_wider_than_they_may_be(option: str, axis: int) -> None:
    off = dict.fromkeys(
        ("shift_time", "stretch_time", "shift_mel", "stretch_mel", "equalise", "noise"), 0
    )
    modality = AudioModality(**{**off, "mask_frames": 0, "mask_mels": 0, option: 5})
    widths = set()
    for seed in range(60):
        masked = modality.augment(torch.ones(1, 40, 64), np.random.default_rng(seed))[0]
        lines = (masked == 0).all(1 - axis)
        assert bool(((masked == 0) == lines.unsqueeze(1 - axis)).all())
        widths.add(int(lines.sum()))
    assert widths == set(range(6))


def test_a_shift_in_time_moves_the_sound() -> None:
    off = dict.fromkeys(
        (
            "stretch_time",
            "shift_mel",
            "stretch_mel",
            "equalise",
            "noise",
            "mask_frames",
            "mask_mels",
        ),
        0,
    )
    modality = AudioModality(**off, shift_time=0.25)
    clip = torch.zeros(1, 40, 64)
    clip[:, :, 32] = 1
    peaks = {
        int(modality.augment(clip, np.random.default_rng(seed))[0, 0].argmax())
        for seed in range(80)
    }
    assert min(peaks) < 20
    assert max(peaks) > 44
    assert all(15 <= peak <= 49 for peak in peaks)  # a quarter of 64 frames


# ------------------------------------------------------------------------------- text


@given(text=st.text(min_size=1, max_size=40).filter(lambda text: text.strip() != ""))
def test_text_is_its_bytes(text: str) -> None:
    decoded = TextModality(max_bytes=48).decode({"txt": text.encode()}).tolist()
    expected = [byte + 1 for byte in text.encode()][:48]
    assert decoded == expected + [0] * (48 - len(expected))


@pytest.mark.parametrize("content", [b"\xff\xfe", b"caf\xc3", b" \n"])
def test_what_is_no_text_is_refused(content: bytes) -> None:
    with pytest.raises(DecodeError):
        TextModality().decode({"txt": content})


@given(seed=st.integers(0, 1000), drop=st.floats(0, 1), substitute=st.floats(0, 1))
def test_augmented_text_is_made_of_its_own_bytes(seed: int, drop: float, substitute: float) -> None:
    modality = TextModality(drop=drop, substitute=substitute)
    text = modality.decode(example("text"))
    augmented = modality.augment(text, np.random.default_rng(seed))
    length = int((augmented > 0).sum())
    assert 1 <= length <= int((text > 0).sum())
    assert not augmented[length:].any()
    assert set(augmented[:length].tolist()) <= set(text.tolist())
    if drop == 0 and substitute == 0:
        assert torch.equal(augmented, text)


def test_wav_bytes_is_a_wave_file_of_the_samples() -> None:
    with wave.open(
        io.BytesIO(wav_bytes(np.array([0.0, 0.5, -0.5, 2.0, -2.0], np.float32), 8000))
    ) as file:
        assert file.getparams()[:4] == (1, 2, 8000, 5)
        pcm = np.frombuffer(file.readframes(5), "<i2")
    assert pcm.tolist() == [0, 16384, -16384, 32767, -32768]
