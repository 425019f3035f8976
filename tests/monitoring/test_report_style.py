"""Labels and legends that odd names must not break."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from cmkd_scale.monitoring.report_runs import Group
from cmkd_scale.monitoring.report_style import add_legend, method_colours, short, styled


def legend_texts(names: list[str]) -> list[str]:
    with styled():
        figure = Figure(layout="constrained")
        add_legend(figure, {name: {"color": "black"} for name in names})
        return [text.get_text().strip() for text in figure.legends[0].get_texts()]


def test_no_name_is_hidden_from_a_legend() -> None:
    assert legend_texts(["_hidden", "$x$", " "]) == ["_hidden", "$x$", "?"]


def test_a_legend_is_read_row_by_row() -> None:
    # Five columns, which matplotlib fills one after the other.
    names = [f"name {letter}" for letter in "abcdefg"]
    assert [text[-1] for text in legend_texts(names)] == list("afbgcde")


def test_a_control_shares_the_colour_of_its_method_and_those_without_teacher_are_grey() -> None:
    names = ["kd_memory", "ucmkd_global", "ucmkd_global/permuted", "ce_ls", "ce"]
    colours = method_colours([Group(name, ()) for name in names])
    assert colours["ucmkd_global"] == colours["ucmkd_global/permuted"] != colours["kd_memory"]
    assert colours["ce"] == colours["ce_ls"] not in (colours["kd_memory"], colours["ucmkd_global"])


@pytest.mark.parametrize(
    ("name", "label"),
    [("cat", "cat"), ("a" * 30, "a" * 23 + "…"), ("a\nb", "a?b"), ("\ud800", "?"), ("  ", "?")],
)
def test_a_label_is_printable_and_short(name: str, label: str) -> None:
    assert short(name) == label
