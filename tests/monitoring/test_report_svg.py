"""Pictures inside the page, parsed anew: colours, names, and labels that try to be markup."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from cmkd_scale.monitoring.report_style import COLOURS, INK, PAPER, make_figure, short, styled
from cmkd_scale.monitoring.report_svg import DARK, draw, to_svg, variable


def figure_of(label: str) -> Figure:
    figure, [axes] = make_figure(1.5)
    axes.plot([0, 1], [0, 1], "o-", color=COLOURS[0])
    axes.imshow([[0.0, 1.0]])
    axes.set_xticks([0], [label])
    return figure


def svg_of(label: str) -> str:
    with styled():
        return to_svg(figure_of(label))


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_and_fonts_are_the_pages_own() -> None:
    svg = svg_of("cat")
    assert f"fill: var({variable(INK)})" in svg
    assert f"stroke: var({variable(COLOURS[0])})" in svg
    assert f"fill: var({variable(PAPER)})" in svg
    assert not [colour for colour in DARK if colour in svg.lower()]
    assert "font-family" not in svg
    assert ">cat</text>" in svg


@pytest.mark.parametrize("colour", [INK, *COLOURS])
def test_what_is_drawn_stands_out_from_dark_paper(colour: str) -> None:
    assert contrast(DARK[colour], DARK[PAPER]) >= 3  # WCAG 2.1, 1.4.11: graphical objects


def test_each_name_that_is_used_is_defined_and_no_other() -> None:
    root = ElementTree.fromstring(svg_of("cat"))
    defined = [element.get("id") for element in root.iter() if element.get("id")]
    used = re.findall(r'(?:href="|url\()#([\w.-]+)', svg_of("cat"))
    assert len(defined) == len(set(defined))
    assert set(defined) == set(used)


def test_nothing_of_it_reaches_the_rest_of_the_page() -> None:
    tags = {element.tag for element in ElementTree.fromstring(svg_of("cat")).iter()}
    assert tags <= {"svg", "g", "defs", "path", "use", "text", "image", "clipPath", "rect"}


def test_equal_figures_give_equal_drawings() -> None:
    with styled():
        assert draw(figure_of("cat")) == draw(figure_of("cat"))


@settings(max_examples=20, deadline=None)
@given(st.text(max_size=30))
@example("</text></svg><script>alert(1)</script>")
@example('" onload="alert(1)')
@example("]]>&lt;&#60;script>")
@example("url(#a) #22262b id=")
@example("$\\frac{1}{$ \ufffe\ud800\0")
def test_a_label_is_text_whatever_it_says(name: str) -> None:
    label = short(name)
    root = ElementTree.fromstring(svg_of(label))
    plain = ElementTree.fromstring(svg_of("cat"))
    assert label in [element.text for element in root.iter("text")]
    shape = [(element.tag, sorted(element.attrib)) for element in root.iter()]
    assert shape == [(element.tag, sorted(element.attrib)) for element in plain.iter()]
