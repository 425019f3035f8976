"""Numbers in writing: number words in the languages of num2words, with typing errors.

Every text belongs to one split by its hash, so no text that is tested on, misspelt or not,
was ever trained on. A misspelt text is nearer to its own number than to any other of its
language.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
from pydantic import JsonValue

from cmkd_scale.data.datasets.keyed import keyed_order
from cmkd_scale.errors import UsageError

_BUCKETS = {"test": range(2), "validation": range(2, 3), "train": range(3, 10)}
_MOST_ERRORS = 2
_ERROR_EVERY = 8  # letters: a short word takes one error at most
_ATTEMPTS = 100


def number_words(language: str) -> tuple[str, ...]:
    """00 to 99 in the words of a language; 07 is its zero and its seven.

    Raises:
        UsageError: num2words is not installed.
    """
    try:
        from num2words import num2words
    except ImportError as error:
        raise UsageError(
            "Number words come with num2words: pip install 'cmkd_scale[numbers]'."
        ) from error
    words = [str(num2words(number, lang=language)) for number in range(100)]
    return tuple(f"{words[0]} {word}" if i < 10 else word for i, word in enumerate(words))


@functools.lru_cache(maxsize=1)
def languages() -> dict[str, tuple[str, ...]]:
    """Languages that name all numbers by different words, and those words.

    Left out: languages that num2words cannot do, and regional forms that name the numbers
    from 00 to 99 as another one does.
    """
    number_words("en")  # a missing package must not look like a language that fails
    from num2words import CONVERTER_CLASSES

    spoken: dict[str, tuple[str, ...]] = {}
    for language in sorted(CONVERTER_CLASSES):
        try:
            words = number_words(language)
        except Exception:
            continue
        if len(set(words)) == len(words) and words not in spoken.values():
            spoken[language] = words
    return spoken


class Writing:
    """Renders numbers with the texts of one split."""

    def __init__(self, split: str, seed: int) -> None:
        """Gather the words.

        Raises:
            UsageError: num2words is not installed.
        """
        self._split = split
        self._names = (seed, split)
        self._languages = languages()

    def render(
        self, number: int, rank: int, rng: np.random.Generator
    ) -> tuple[str, bytes, dict[str, JsonValue]]:
        """UTF-8 text, its language and what was meant."""
        order = keyed_order(len(self._languages), "languages", *self._names, number)
        names = list(self._languages)
        # A short word may have no text in the split: then the next language is asked.
        for turn in range(len(order)):
            language = names[order[(rank + turn) % len(order)]]
            text = self._draw(language, number, rng)
            if text is not None:
                meant = self._languages[language][number]
                return "txt", text.encode(), {"language": language, "meant": meant}
        raise UsageError(f"num2words has too few languages for {number:02d}; upgrade it.")

    def _draw(self, language: str, number: int, rng: np.random.Generator) -> str | None:
        """A text of this split with zero or more typing errors, if there is one."""
        words = self._languages[language]
        most = min(_MOST_ERRORS, len(words[number]) // _ERROR_EVERY + 1)
        for _ in range(_ATTEMPTS):
            text = words[number]
            for _ in range(int(rng.integers(most + 1))):
                text = mistype(text, alphabet(language), rng)
            if split_of(text) == self._split and is_nearest(text, number, words):
                return text
        return None


@functools.lru_cache(maxsize=256)
def alphabet(language: str) -> str:
    """The letters in which a language writes its numbers, sorted."""
    return "".join(sorted(set("".join(languages()[language])) - {" "}))


def split_of(text: str) -> str:
    """The one split that a text may occur in: train 7 in 10, validation 1, test 2."""
    bucket = hashlib.sha256(text.encode()).digest()[0] % 10
    return next(split for split, buckets in _BUCKETS.items() if bucket in buckets)


def mistype(text: str, letters: str, rng: np.random.Generator) -> str:
    """One typing error: a letter wrong, missing, doubled or too many, or two swapped."""
    i = int(rng.integers(len(text)))
    letter = letters[rng.integers(len(letters))]
    kind = rng.integers(5)
    if kind == 0:
        return text[:i] + letter + text[i + 1 :]
    if kind == 1 and len(text) > 1:
        return text[:i] + text[i + 1 :]
    if kind == 2:
        return text[:i] + text[i] + text[i:]
    if kind == 3:
        return text[:i] + letter + text[i:]
    return text[:i] + text[i : i + 2][::-1] + text[i + 2 :]


def is_nearest(text: str, number: int, words: tuple[str, ...]) -> bool:
    """Whether a text is nearer to the words of its number than to those of any other."""
    own = edit_distance(text, words[number])
    # Letters that one has and the other lacks cost an edit each: spares most distances.
    rivals = (
        other
        for i, other in enumerate(words)
        if i != number
        and abs(len(other) - len(text)) <= own
        and len(set(other).difference(text)) <= own
    )
    return own == 0 or all(edit_distance(text, other) > own for other in rivals)


def edit_distance(first: str, second: str) -> int:
    """Fewest letters inserted, deleted or replaced (Levenshtein)."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]
