"""Number words: all languages, typing errors that leave the number readable."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmkd_scale.data.datasets.writing import (
    Writing,
    alphabet,
    edit_distance,
    is_nearest,
    languages,
    mistype,
    number_words,
    split_of,
)

WORD = st.text("abcd", max_size=6)


def test_many_languages_name_all_numbers_differently() -> None:
    found = languages()
    assert len(found) > 40
    assert {"en", "fr", "de", "ja", "ru", "vi"} <= set(found)
    assert not {"en_IN", "es_VE", "fr_DZ"} & set(found)  # the same words as en, es and fr
    for words in found.values():
        assert len(set(words)) == 100
        assert all(word.strip() for word in words)
    assert len(set(found.values())) == len(found)


def test_words_of_numbers() -> None:
    english = number_words("en")
    assert (english[0], english[7], english[42]) == ("zero zero", "zero seven", "forty-two")
    assert number_words("de")[21] == "einundzwanzig"


def reference_distance(first: str, second: str) -> int:
    """Levenshtein's recursion as it is defined."""
    if not first or not second:
        return len(first) + len(second)
    return min(
        reference_distance(first[1:], second) + 1,
        reference_distance(first, second[1:]) + 1,
        reference_distance(first[1:], second[1:]) + (first[0] != second[0]),
    )


@settings(max_examples=60)
@given(first=WORD, second=WORD)
def test_edit_distance_is_levenshtein(first: str, second: str) -> None:
    assert edit_distance(first, second) == reference_distance(first, second)


@settings(max_examples=60)
@given(words=st.lists(WORD, min_size=2, max_size=6, unique=True), text=WORD)
def test_is_nearest_compares_with_every_word(words: list[str], text: str) -> None:
    for number in range(len(words)):
        distances = [edit_distance(text, word) for word in words]
        others = distances[:number] + distances[number + 1 :]
        assert is_nearest(text, number, tuple(words)) == (distances[number] < min(others))


@given(text=st.text("abc é", min_size=1, max_size=12), seed=st.integers(0, 10_000))
def test_a_typing_error_is_one_edit_or_a_swap(text: str, seed: int) -> None:
    wrong = mistype(text, "xyz", np.random.default_rng(seed))
    assert wrong
    swapped = sorted(wrong) == sorted(text) and edit_distance(text, wrong) <= 2
    assert swapped or edit_distance(text, wrong) <= 1


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_texts_can_be_read_and_belong_to_their_split(split: str) -> None:
    writing = Writing(split, seed=0)
    misspelt = 0
    for number in range(0, 100, 7):
        for rank in range(4):
            rng = np.random.default_rng([number, rank])
            extension, content, about = writing.render(number, rank, rng)
            text, language = content.decode(), str(about["language"])
            words = languages()[language]
            assert extension == "txt"
            assert about["meant"] == words[number]
            assert split_of(text) == split
            distances = [edit_distance(text, word) for word in words]
            assert int(np.argmin(distances)) == number
            assert sorted(distances)[1] > distances[number]
            assert set(text) <= set(alphabet(language)) | {" "}
            misspelt += text != words[number]
    assert 20 < misspelt < 60


def test_splits_have_their_shares_of_texts() -> None:
    splits = [split_of(word) for words in languages().values() for word in words]
    shares = {split: splits.count(split) / len(splits) for split in set(splits)}
    assert shares == pytest.approx({"train": 0.7, "validation": 0.1, "test": 0.2}, abs=0.03)


def test_samples_of_a_number_are_dealt_out_to_different_languages() -> None:
    writing = Writing("train", 0)
    found = {
        str(writing.render(42, rank, np.random.default_rng(rank))[2]["language"])
        for rank in range(len(languages()))
    }
    assert len(found) > 0.9 * len(languages())
