"""Synthesised speech: a pure function of the request, in voices of one split only."""

from __future__ import annotations

import numpy as np
import pytest

from cmkd_scale.data.datasets.speech import (
    ACCENTS,
    VARIANTS,
    Speech,
    Utterance,
    add_room_noise,
    synthesise,
)
from cmkd_scale.errors import UsageError

REQUESTS = [
    Utterance("forty two", "en+m1"),
    Utterance("seven", "en-us+f3", speed=210, pitch=80, gap=2),
    Utterance("zero nine", "en+klatt3", seed=5),
    Utterance("thirteen", "en-029+Annie", speed=130, pitch=20),
]


def test_an_utterance_does_not_depend_on_those_before_it() -> None:
    forward = [synthesise(request) for request in REQUESTS]
    backward = [synthesise(request) for request in reversed(REQUESTS)][::-1]
    for first, second in zip(forward, backward, strict=True):
        np.testing.assert_array_equal(first, second)


def test_text_voice_speed_and_pitch_are_heard() -> None:
    plain = synthesise(Utterance("forty two", "en+m1"))
    assert plain.dtype == np.int16
    assert 0.4 < len(plain) / 22050 < 1.5
    assert 1000 < np.abs(plain.astype(int)).max() <= 32767
    fast = synthesise(Utterance("forty two", "en+m1", speed=300))
    assert len(fast) < 0.8 * len(plain)
    for other in (
        Utterance("forty three", "en+m1"),
        Utterance("forty two", "en+m3"),
        Utterance("forty two", "en+m1", pitch=90),
    ):
        samples = synthesise(other)
        assert len(samples) != len(plain) or (samples != plain).any()


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        (Utterance("one", "en+m99"), "no variant 'm99'"),
        (Utterance("one", "nowhere+m1"), "no voice 'nowhere"),
        (Utterance("", "en+m1"), "said nothing"),
    ],
)
def test_impossible_requests_are_refused(request_: Utterance, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        synthesise(request_)


def test_voices_are_in_one_split_and_all_exist() -> None:
    everyone = [variant for variants in VARIANTS.values() for variant in variants]
    assert len(set(everyone)) == len(everyone)
    for i, variant in enumerate(everyone):
        assert len(synthesise(Utterance("six", f"{ACCENTS[i % len(ACCENTS)]}+{variant}"))) > 4000


def test_clips_of_a_number_are_dealt_out_to_different_voices() -> None:
    speech = Speech("train", 0)
    speakers = [
        speech.render(42, rank, np.random.default_rng(rank))[2]["speaker"] for rank in range(39)
    ]
    assert sorted(map(str, speakers)) == sorted(VARIANTS["train"])


def test_a_digit_in_front_is_said_as_in_a_picture() -> None:
    texts = [
        Speech("test", 0).render(n, 0, np.random.default_rng(0))[2]["text"] for n in (0, 7, 42)
    ]
    assert texts == ["zero zero", "zero seven", "forty two"]


def test_room_noise_has_the_stated_power_and_spectrum() -> None:
    rng = np.random.default_rng(0)
    speech = (0.1 * rng.standard_normal(80_000)).astype(np.float32)
    noisy = add_room_noise(speech, 8000, 6.0, np.random.default_rng(1))
    noise = noisy.astype(np.float64) - speech
    snr_db = 10 * np.log10(np.mean(speech.astype(np.float64) ** 2) / np.mean(noise**2))
    assert snr_db == pytest.approx(6.0, abs=0.01)
    power = np.abs(np.fft.rfft(noise)) ** 2
    hertz = np.fft.rfftfreq(len(noise), 1 / 8000)
    octaves = [power[(hertz >= low) & (hertz < 2 * low)].mean() for low in (1000, 2000)]
    assert 10 * np.log10(octaves[0] / octaves[1]) == pytest.approx(6.0, abs=0.5)


def test_noise_never_leaves_the_range() -> None:
    speech = np.full(1000, 0.8, dtype=np.float32)
    noisy = add_room_noise(speech, 8000, -20.0, np.random.default_rng(2))
    assert float(np.abs(noisy).max()) <= 1.0
