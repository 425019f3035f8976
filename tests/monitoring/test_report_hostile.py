"""Whatever runs, methods, classes and configurations are called, the page is only text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cmkd_scale.monitoring.report import write_report
from tests.monitoring.test_report_runs import (
    NAMES,
    Page,
    make_bare_run,
    make_memory,
    make_predictions,
    make_run,
)

TRICKS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "</td></table></svg></style><svg onload=alert(3)>",
    "{{ 7*7 }}{% raw %}",
    "&lt;b&gt;&amp;",
    "$\\frac{1}{$ _a",
    "\u202egnp.exe\u2066",
    "a\0b\ud800\x1b[31m",
    "two\nlines\ttabs\r\n",
    "👩\u200d🔬 猫 صفارة e\u0301\u0301\u0301",
    "'\"--><!--]]>",
    "javascript:alert(4)//https://example.org/x",
    "long" * 600,
    " ",
    "",
)
"""Markup, templates, mathematics, turned text, control characters, lengths."""
ODD = st.text(max_size=8) | st.sampled_from(TRICKS)
FILE_NAME = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20
).filter(lambda name: name not in (".", "..") and len(name.encode()) < 200)
ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
DRAWN = {"svg", "g", "defs", "path", "use", "text", "image", "clippath", "rect"}
LOOKS = {
    *("viewbox", "style", "id", "d", "x", "y", "width", "height", "href", "transform"),
    *("clip-path", "opacity"),
}
NUMBER = count()


def name_page(
    root: Path, method: str, folder: str, classes: Sequence[str], words: Sequence[str]
) -> tuple[Page, str]:
    """The page of two runs in which everything that can be named is named so.

    Args:
        root: where to put them.
        method: of both, which differ in their configurations.
        folder: name of one.
        classes: their classes; without any there are no pictures but curves.
        words: keys and values of the configuration, streams, reasons.
    """
    root = root / f"{next(NUMBER)}"
    root.mkdir()
    more: dict[str, Any] = {
        "method": method,
        "config_digest": f"0{method}",
        "versions": {"torch": method},
        "restarts": {"resume": 1},
    }
    for seed, name in enumerate((folder, "other")):
        if classes:
            memory = make_memory(root / "memory.safetensors", classes)
            run = make_run(root / name, seed=seed, memory_files=[str(memory)], **more)
            make_predictions(run, classes)
        else:
            run = make_bare_run(root / name, seed=seed, **more)
        labels = {
            "here": words[0],
            "there": words[1],
            "shared": [],
            "only_here": list(words),
            "only_there": list(words),
            "counts_here": {word: 1 for word in words},
            **dict.fromkeys(("total_variation", "kullback_leibler", "largest_ratio"), 1.0),
        }
        (run / "labels.json").write_text(json.dumps(labels))
        with (run / "metrics.jsonl").open("a") as log:
            step = {"step": 30, "step_seconds": 0.1, f"samples_skipped/x{words[0]}": 2, **labels}
            log.write(json.dumps(step) + "\n")
        config = {
            "run": {"seed": seed},
            "method": {"name": method, "control": "none"},
            "data": {f"k{words[2]}": words[0] if seed else words[1], "a": seed},
        }
        text = yaml.safe_dump(config, allow_unicode=True)
        (run / "config.yaml").write_text(text, encoding="utf-8", errors="replace")
    file = write_report([root / folder, root / "other"], root / "report.html")[0]
    return Page(file), file.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, Page]:
    """Pages of harmless names, without and with classes."""
    root = tmp_path_factory.mktemp("harmless")
    words = ("one", "two", "key")
    return (
        name_page(root, "kd_memory", "run", (), words)[0],
        name_page(root, "kd_memory", "run", NAMES, words)[0],
    )


def check_only_text_differs(page: Page, html: str, reference: Page) -> None:
    assert page.tags == reference.tags
    assert [a[:2] for a in page.attributes] == [a[:2] for a in reference.attributes]
    assert {part for part in page.drawn if "." not in part} <= DRAWN
    assert {part.partition(".")[2] for part in page.drawn if "." in part} <= LOOKS
    assert page.pictures == reference.pictures
    assert not ACTS.search(html)


@settings(max_examples=25, deadline=None)
@given(method=ODD, folder=FILE_NAME, words=st.lists(ODD, min_size=3, max_size=3, unique=True))
def test_odd_names_of_runs_methods_and_keys_change_the_text_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory,
    harmless: tuple[Page, Page],
    method: str,
    folder: str,
    words: list[str],
) -> None:
    root = tmp_path_factory.getbasetemp()
    page, html = name_page(root, method, folder, (), words)
    check_only_text_differs(page, html, harmless[0])
    text = "".join(page.text)
    assert all(name in text for name in (method, folder) if name.isprintable())


@settings(max_examples=4, deadline=None)
@given(classes=st.lists(ODD, min_size=3, max_size=3, unique=True))
@example(classes=list(TRICKS[0:3]))
@example(classes=list(TRICKS[3:6]))
@example(classes=list(TRICKS[6:9]))
@example(classes=list(TRICKS[9:12]))
@example(classes=list(TRICKS[12:15]))
def test_odd_names_of_classes_change_the_text_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, harmless: tuple[Page, Page], classes: list[str]
) -> None:
    root = tmp_path_factory.getbasetemp()
    page, html = name_page(root, TRICKS[2], "<svg onload=alert(4)>", classes, classes)
    check_only_text_differs(page, html, harmless[1])
    listed = {cell for row in page.rows if len(row) == 4 for cell in row[:2]}
    shown = {name.strip() for name in classes if name.isprintable() and name.strip()}
    assert shown <= listed
