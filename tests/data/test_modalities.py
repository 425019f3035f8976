"""Bytes to tensors: against independent references, on damaged input, and under augmentation."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import struct
import wave
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from cmkd_scale.data import modality_image
from cmkd_scale.data.audio import wav_bytes
from cmkd_scale.data.damage import DamagedError
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


def npy(array: NDArray[np.generic]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def example(name: str) -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    return {
        "image": {"png": png(rng.integers(0, 256, (28, 56), dtype=np.uint8))},
        "audio": {"wav": wav_bytes(chirp(), 8000)},
        "text": {"txt": "quarante-deux à peu près".encode()},
        "features": {"npy": npy(rng.standard_normal(512, dtype=np.float32))},
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
    assert isinstance(caught.value, DamagedError)
    assert caught.value.reason == "undecodable"


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


def jpeg(picture: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", **options)
    return buffer.getvalue()


def photo(mode: str = "RGB", width: int = 83, height: int = 61) -> Image.Image:
    """Smooth colours with edges, as photographs have."""
    rows, columns = np.mgrid[:height, :width]
    planes = [rows * 4 % 256, columns * 3 % 256, (rows * columns) % 256]
    return Image.fromarray(np.stack(planes, axis=2).astype(np.uint8)).convert(mode)


@pytest.fixture(params=["simplejpeg", "Pillow"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of reading a JPEG."""
    if request.param == "Pillow":
        monkeypatch.setattr(modality_image, "_simplejpeg", None)
    else:
        pytest.importorskip("simplejpeg")
    return str(request.param)


JPEGS = {
    "colour": jpeg(photo()),
    "no subsampling": jpeg(photo(), subsampling=0, quality=95),
    "low quality": jpeg(photo(), quality=10),
    "progressive": jpeg(photo(), progressive=True),
    "grey": jpeg(photo("L")),
    "odd size": jpeg(photo(width=1, height=7)),
    "without conversion": jpeg(photo(), keep_rgb=True),
}


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_of_a_jpeg_are_those_of_pillow(kind: str, channels: int, reader: str) -> None:
    with Image.open(io.BytesIO(JPEGS[kind])) as picture:
        expected = np.asarray(picture.convert("L" if channels == 1 else "RGB"))
    height, width = expected.shape[:2]
    decoded = ImageModality(height, width, channels=channels).decode({"jpg": JPEGS[kind]})
    pixels = ((decoded.numpy() + 1) * 127.5).round().astype(np.uint8).transpose(1, 2, 0)
    assert np.array_equal(pixels.squeeze(), expected.squeeze())


def test_jpegs_are_read_by_simplejpeg_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("simplejpeg")
    monkeypatch.setattr(modality_image, "_read_any", None)
    for content in JPEGS.values():
        ImageModality().decode({"jpg": content})


def test_a_jpeg_for_printing_is_read(reader: str) -> None:
    content = jpeg(photo("CMYK"), quality=95)
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.mode == "CMYK"
        expected = np.asarray(picture.convert("RGB"))
    decoded = ImageModality(61, 83, channels=3).decode({"jpg": content})
    pixels = ((decoded.numpy() + 1) * 127.5).round().astype(np.uint8).transpose(1, 2, 0)
    assert np.array_equal(pixels, expected)


def test_jpeg_bombs_are_refused_before_they_are_decoded(
    reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reader == "simplejpeg":
        monkeypatch.setattr(modality_image, "_read_any", None)  # not needed
    content = bytearray(JPEGS["colour"])
    size = content.index(b"\xff\xc0") + 5  # height and width of the baseline frame
    for height, width in ((7_000, 8_000), (10_000, 10_000), (65_000, 65_000)):
        content[size : size + 4] = struct.pack(">HH", height, width)
        with pytest.raises(DecodeError, match="not a readable picture"):
            ImageModality().decode({"jpg": bytes(content)})


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_jpegs_raise_only_decode_errors(reader: str, data: st.DataObject) -> None:
    content = bytearray(JPEGS[data.draw(st.sampled_from(sorted(JPEGS)))])
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    with contextlib.suppress(DecodeError):
        assert ImageModality().decode({"jpg": bytes(content)}).shape == (1, 28, 56)


def row_of(count: int) -> dict[str, bytes]:
    """Frames of one colour each: that of frame n is n."""
    names = [f"{number:03d}.png" for number in range(count)]
    contents = [png(np.full((4, 4), number, dtype=np.uint8)) for number in range(count)]
    return {**dict(zip(names, contents, strict=True)), "cls": b"1", "json": b"{}"}


def frames_of(members: dict[str, bytes], frames: int) -> list[int]:
    """Which frames are read."""
    modality = ImageModality(4, 4, frames=frames)
    decoded = modality.decode(members)
    assert tuple(decoded.shape) == modality.shape
    assert modality.shape == ((1, 4, 4) if frames == 1 else (frames, 1, 4, 4))
    return [round(float(one.mean() + 1) * 127.5) for one in decoded.reshape(frames, 1, 4, 4)]


@pytest.mark.parametrize(
    ("held", "frames", "expected"),
    [
        (8, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (8, 4, [1, 3, 5, 7]),
        (9, 3, [1, 4, 7]),
        (10, 4, [1, 3, 6, 8]),
        (16, 1, [8]),
        (1, 3, [0, 0, 0]),
        (2, 5, [0, 0, 1, 1, 1]),
    ],
)
def test_frames_are_evenly_spaced_and_few_are_repeated(
    held: int, frames: int, expected: list[int]
) -> None:
    members = row_of(held)
    assert frames_of(members, frames) == expected
    assert frames_of(dict(reversed(members.items())), frames) == expected


@given(held=st.integers(1, 30), frames=st.integers(1, 12))
def test_each_frame_is_the_middle_of_an_equal_part(held: int, frames: int) -> None:
    expected = [(2 * part + 1) * held // (2 * frames) for part in range(frames)]
    assert frames_of(row_of(held), frames) == expected


def test_a_single_picture_is_no_row_of_frames() -> None:
    assert ImageModality(frames=1).decode(example("image")).shape == (1, 28, 56)
    with pytest.raises(DecodeError, match=r"no frames, and data\.transform\.frames=2"):
        ImageModality(frames=2).decode(example("image"))


def test_a_damaged_frame_is_damage_where_it_is_read() -> None:
    members = {**row_of(4), "003.png": b"\x89PNG"}
    with pytest.raises(DecodeError):
        frames_of(members, 4)
    assert frames_of(members, 1) == [2]


@pytest.mark.parametrize(
    ("extension", "wanted"),
    [("jpg", True), ("007.jpg", True), ("12.webp", True), ("wav", False), ("0.npy", False)],
)
def test_pictures_are_wanted_with_or_without_a_number(extension: str, wanted: bool) -> None:
    assert ImageModality().wants(extension) is wanted


def test_all_frames_of_a_sample_are_moved_alike() -> None:
    modality = ImageModality(channels=3, frames=2)
    members = {"000.png": example("image")["png"], "001.png": example("image")["png"]}
    first, second = modality.augment(modality.decode(members), np.random.default_rng(3))
    assert torch.equal(first, second)
    alone = ImageModality(channels=3)
    expected = alone.augment(alone.decode(example("image")), np.random.default_rng(3))
    torch.testing.assert_close(first, expected)


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


def test_frames_are_ordered_by_number_not_by_letter() -> None:
    members = {
        f"{number}.png": png(np.full((4, 4), 20 * number, dtype=np.uint8)) for number in range(12)
    }
    modality = ImageModality(height=4, width=4, frames=2)
    shades = (modality.decode(members).mean(dim=(1, 2, 3)) + 1) * 127.5
    assert shades.round().tolist() == [60, 180]


def test_pictures_of_16_bits_keep_their_greys() -> None:
    wide = np.full((4, 4), 40000, dtype=np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(wide).save(buffer, "PNG")
    picture = ImageModality(height=4, width=4).decode({"png": buffer.getvalue()})
    assert float(picture.mean()) == pytest.approx(40000 / 65535 * 2 - 1, abs=0.01)
