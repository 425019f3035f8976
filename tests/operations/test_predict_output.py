from __future__ import annotations

import pytest

from cmkd_scale.operations.predict import Prediction
from cmkd_scale.operations.predict_files import Source
from cmkd_scale.operations.predict_output import show
from tests.monitoring.terminals import Terminal

LABELS = ("anger", "fear", "a label that is far too long for its column", "[red]joy\x1b[2J")
TOP = (("anger", 0.75), ("fear", 0.125), (LABELS[2], 0.1), (LABELS[3], 0.025))


def drawn(
    *sources: Source, columns: int = 80, top: tuple[tuple[str, float], ...] = TOP, rows: int = 32
) -> list[str]:
    terminal = Terminal(columns, 40)
    predictions = (Prediction(source, top) for source in sources)
    show(predictions, terminal.console, LABELS, rows)
    return [line for line in terminal.transcript() if line]


def files(*names: str) -> list[Source]:
    return [Source("file", name) for name in names]


def test_a_table_at_80_columns() -> None:
    long = "pictures/of/a/deeply/nested/directory/with a long name.png"
    lines = drawn(
        *files("a.png", long, f"{'x' * 90}.png", "日本語の名前はとても長いので切る必要がある.png"),
        Source("text", "a text that is longer than its column"),
    )
    assert lines == [
        "file                    label                      prob.  then",
        "a.png                   anger                      75.0%  fear 12.5%",
        "…/with a long name.png  anger                      75.0%  fear 12.5%",
        "…xxxxxxxxxxxxxxxxx.png  anger                      75.0%  fear 12.5%",
        "…で切る必要がある.png   anger                      75.0%  fear 12.5%",
        "a text that is longer…  anger                      75.0%  fear 12.5%",
    ]


def test_without_other_labels_the_names_have_their_room() -> None:
    name = "pictures/of/a/deeply/nested/directory/x.png"
    lines = drawn(*files(name), top=TOP[:1])
    assert lines[0].split() == ["file", "label", "prob."]
    assert lines[1].split() == [name, "anger", "75.0%"]
    assert len(lines[1]) == 80


@pytest.mark.parametrize("columns", [40, 80, 200])
@pytest.mark.parametrize("rows", [1, 2, 3, 32])
def test_each_is_one_line_however_many_are_drawn_at_a_time(columns: int, rows: int) -> None:
    names = [f"{'d' * n}/{n}.png" for n in range(7)]
    lines = drawn(*files(*names), columns=columns, rows=rows)
    assert len(lines) == 8
    assert lines[0].startswith("file")
    for n, line in enumerate(lines[1:]):
        assert f"{n}.png" in line.split("  ")[0] + " "


def test_nothing_in_a_name_or_label_moves_the_cursor() -> None:
    top = (TOP[3], TOP[3])
    lines = drawn(*files("a\nb\x1b[1A[bold].png", "\udcff.png", "c.png"), top=top, columns=120)
    assert len(lines) == 4
    assert lines[1].startswith("a\\nb\\x1b[1A[bold].png ")
    assert lines[2].startswith("\\xff.png ")
    assert lines[3].startswith("c.png ")
    assert all(line.count("[red]joy\\x1b[2J") == 2 for line in lines[1:])


def test_off_a_terminal_a_line_has_everything(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(20, 5)
    terminal.console = type(terminal.console)(file=terminal, force_terminal=False, width=20)
    show([Prediction(Source("file", "x/y.png"), TOP)], terminal.console, LABELS, 32)
    assert capsys.readouterr().out == (
        "x/y.png: anger 75.0%, fear 12.5%, a label that is far too long for its column 10.0%, "
        "[red]joy\\x1b[2J 2.5%\n"
    )
