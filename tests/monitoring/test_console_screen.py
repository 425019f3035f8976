"""The screen's words: what is shown, what a small terminal leaves out, and odd numbers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.text import Text

from cmkd_scale.monitoring.console_screen import Place, screen, summary
from cmkd_scale.monitoring.console_state import RunState
from cmkd_scale.monitoring.console_words import count, duration, escaped, sparkline
from cmkd_scale.monitoring.metrics import METRICS

EVERYTHING = {
    "loss": 1.5,
    "loss/cross_entropy": 1.0,
    "loss/transport_cost": 0.5,
    "learning_rate": 0.001,
    "grad_norm": 2.25,
    "samples_per_second": 1812.4,
    "epoch_progress": 0.25,
    "guard_weight": 0.85,
    "alignment_distance/transport": 0.83,
    "alignment_marginal_error": 0.0123,
    "slowest_rank": 3.0,
    "slowest_rank_ratio": 1.2,
    "checkpoint_seconds": 1.53,
    "checkpoint_stall_seconds": 0.21,
    "steps_skipped": 1.0,
    "samples_skipped/decode": 2.0,
    "restarts/resume": 1.0,
    "restarts/rollback": 0.0,
}


def state_of(values: dict[str, float] = EVERYTHING, *, title: str = "student ucmkd") -> RunState:
    """At step 100 of 400, which took 0.5 s each, at time 60."""
    state = RunState(400, began=10.0, title=title, run="runs/debug/student")
    for step in range(80, 101):
        state.end_step(step, 0.5, 0.01, now=60.0)
    state.log(100, values, now=60.0)
    return state


def text_of(lines: list[Text]) -> str:
    return "\n".join(line.plain.rstrip() for line in lines)


def styles_of(lines: list[Text], words: str) -> set[str]:
    """Of all that is written where ``words`` begin."""
    line = next(line for line in lines if words in line.plain)
    at = line.plain.index(words)
    return {str(span.style) for span in line.spans if span.start <= at < span.end}


def test_a_screen_of_eighty_columns() -> None:
    state = state_of()
    state.log(110, {"loss": 0.5, "loss/cross_entropy": 0.25, "loss/transport_cost": 0.25}, 65.0)
    assert text_of(screen(state, 66.0, 80, 24)) == (
        "── student ucmkd ── runs/debug/student ─────────────────────────────────────────\n"
        "━━━━━━──────────────────   110/400   ETA 0:02:25   elapsed 0:00:56   epoch 25.0%\n"
        "loss             0.5        █▁\n"
        "  cross_entropy  0.25       █▁\n"
        "  transport_cost 0.25       █▁\n"
        "speed            1,812 samples/s   data wait 2.0%   0.5 s a step\n"
        "slowest          rank 3, 1.2x the others\n"
        "optimiser        lr 0.001   gradient norm 2.25\n"
        "guard            weight 0.85\n"
        "alignment        distance 0.83   marginal error 0.0123\n"
        "checkpoint       6 s ago   took 1.5 s   training waited 0.21 s   resumes 1\n"
        "trouble          skipped steps 1   damaged samples 2 (decode 2)"
    )


def test_before_the_first_step() -> None:
    state = RunState(400, began=10.0, title="teacher ce", resume_step=200)
    assert text_of(screen(state, 22.0, 60, 24, place=(200, "data", 11.6))) == (
        "── teacher ce ──────────────────────────────────────────────\n"
        "━━━━━━━━━━━━━━━━────────────────   200/400   elapsed 0:00:12\n"
        "checkpoint  none yet   continued from step 200\n"
        "now         before the first step   in data for 12 s"
    )


def test_a_terminal_of_ascii_gets_nothing_else() -> None:
    lines = screen(state_of(title="étudiant"), 60.0, 60, 24, ascii_only=True)
    assert text_of(lines).isascii()
    assert lines[1].plain.startswith("####....")


@pytest.mark.parametrize(
    ("height", "words"),
    [
        (1, ["100/400"]),
        (3, ["100/400", "no step for", "rank 3"]),
        (7, ["student ucmkd", "100/400", "1.5", "1,812", "rank 3", "no step for", "trouble"]),
    ],
)
def test_a_short_terminal_is_left_what_matters_most(height: int, words: list[str]) -> None:
    state = state_of({**EVERYTHING, "slowest_rank_ratio": 1.8})
    lines = screen(state, 155.0, 80, height, place=(100, "exchange", 94.0))
    assert len(lines) == height
    assert all(word in text_of(lines) for word in words)


def test_without_a_line_for_each_component_they_share_one() -> None:
    assert "cross_entropy 1   transport_cost 0.5" in text_of(screen(state_of(), 60.0, 80, 10))


def test_one_component_alone_is_not_said_twice() -> None:
    shown = text_of(screen(state_of({"loss": 1.0, "loss/cross_entropy": 1.0}), 60.0, 80, 24))
    assert "cross_entropy" not in shown


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (62.0, None),  # five times the usual 0.5 s have not gone by
        (73.0, "in checkpoint for 12 s"),
        (155.0, "no step for 95 s; usual 0.5 s   in checkpoint for 12 s"),
        (100_000.0, "no step for 27:45:40; usual 0.5 s   in checkpoint for 12 s"),
    ],
)
def test_a_step_that_takes_long(now: float, expected: str | None) -> None:
    lines = screen(state_of(), now, 80, 24, place=(100, "checkpoint", 12.2))
    last = lines[-1].plain
    assert (last.split(maxsplit=1) == ["now", expected]) == (expected is not None)
    if now > 100:
        assert styles_of(lines, "no step for") == {"bold red"}


def test_who_waits_in_an_exchange_waits_for_others() -> None:
    place: Place = (100, "exchange", 12.0)
    assert text_of(screen(state_of(), 72.0, 80, 24, place=place)).endswith(
        "in exchange for 12 s, waiting for other ranks"
    )
    alone = state_of({"loss": 1.0})
    assert text_of(screen(alone, 72.0, 80, 24, place=place)).endswith("in exchange for 12 s")


@pytest.mark.parametrize(("ratio", "style"), [(1.5, set()), (1.51, {"yellow"})])
def test_a_slow_rank_is_named_in_amber(ratio: float, style: set[str]) -> None:
    state = state_of({"slowest_rank": 12.0, "slowest_rank_ratio": ratio})
    assert styles_of(screen(state, 60.0, 80, 24), "rank 12") == style
    assert ("slowest rank 12" in summary(state, {"loss": 1.0})) == bool(style)


def test_what_is_counted_adds_up() -> None:
    state = state_of()
    state.log(110, {"steps_skipped": 2.0, "samples_skipped/decode": 3.0}, 61.0)
    state.log(120, {"samples_skipped/digest": 1.0, "read_retries": 4.0}, 62.0)
    state.log(130, {"samples_skipped/digest": math.nan, "checkpoint_failures": 1.0}, 63.0)
    for shown in (text_of(screen(state, 63.0, 200, 24)), summary(state, {"loss": 1.0})):
        assert "skipped steps 3" in shown
        assert "damaged samples 6 (decode 5, digest 1)" in shown
        assert "retried reads 4" in shown
        assert "failed checkpoints 1" in shown


def test_waiting_for_data_is_told_when_it_is_much() -> None:
    state = RunState(400, began=0.0)
    for step in range(1, 11):
        state.end_step(step, 1.0, 0.05, now=float(step))
    assert "data wait" not in summary(state, {"loss": 1.0})
    state.end_step(11, 1.0, 0.5, now=11.0)
    assert "data wait 9.1%" in summary(state, {"loss": 1.0})
    assert styles_of(screen(state, 11.0, 80, 24), "data wait 9.1%") == {"yellow"}


def test_long_paths_are_told_by_their_end() -> None:
    state = state_of()
    state.run = "runs/" + "deep/" * 30 + "seed3"
    assert "/seed3 ─" in screen(state, 60.0, 60, 24)[0].plain


KEYS = [
    key.replace("*", name)
    for metric in METRICS
    for key in metric.keys
    for name in ("decode", "[b]")
]
NUMBERS = st.floats() | st.sampled_from([0.0, math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324])


@given(
    logs=st.lists(st.dictionaries(st.sampled_from(KEYS), NUMBERS), max_size=5),
    steps=st.lists(st.tuples(NUMBERS, NUMBERS), max_size=5),
    names=st.tuples(st.text(max_size=50), st.text(max_size=200), st.text(max_size=20)),
    size=st.tuples(st.integers(40, 200), st.integers(1, 40)),
    totals=st.tuples(st.integers(0, 10**15), st.integers(0, 10**15)),
    now=st.floats(0, 1e12),
    place=st.none() | st.tuples(st.integers(), st.text(max_size=20), NUMBERS),
    ascii_only=st.booleans(),
)
def test_nothing_breaks_it_and_no_line_is_too_wide(
    logs: list[dict[str, float]],
    steps: list[tuple[float, float]],
    names: tuple[str, str, str],
    size: tuple[int, int],
    totals: tuple[int, int],
    now: float,
    place: Place | None,
    ascii_only: bool,
) -> None:
    title, run, component = names
    total, step = totals
    state = RunState(total, began=0.0, title=title, run=run)
    for seconds, waited in steps:
        state.end_step(step, seconds, waited, now)
    for values in logs:
        state.log(
            step, {"loss/one": 1.0, f"loss/{component}": 1.0, "test/accuracy": 0.5, **values}, now
        )
        summary(state, values)
    width, height = size
    lines = screen(state, now + 50.0, width, height, place=place, ascii_only=ascii_only)
    assert 1 <= len(lines) <= height
    for line in lines:
        assert line.cell_len <= width
        assert line.plain.isprintable()


@given(st.lists(NUMBERS, max_size=40))
def test_a_sparkline_orders_its_values(values: list[float]) -> None:
    line = sparkline(values)
    assert len(line) == len(values)
    finite = [(value, mark) for value, mark in zip(values, line, strict=True) if mark != "·"]
    assert [value for value, _ in finite] == [value for value in values if math.isfinite(value)]
    marks = [mark for _, mark in sorted(finite)]
    assert marks == sorted(marks)  # the eight marks are ordered as code points, too
    if marks and 1e-300 < finite_span(values) < math.inf:
        assert marks[0] == "▁"
        assert marks[-1] == "█"


def finite_span(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return max(finite) - min(finite)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0:00:00"), (3700, "1:01:40"), (-5, "0:00:00"), (math.inf, "-"), (math.nan, "-")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plain name.png", "plain name.png"),
        ("naïve 日本 ☺", "naïve 日本 ☺"),
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\x1b[2J\x07\x9b", "\\x1b[2J\\x07\\x9b"),
        ("\u202egnp.exe\u2028", "\\u202egnp.exe\\u2028"),
        (b"caf\xe9".decode(errors="surrogateescape"), "caf\\xe9"),
        ("\ud800", "\\ud800"),
    ],
)
def test_what_is_escaped_is_one_line_that_moves_nothing(text: str, line: str) -> None:
    assert escaped(text) == line
    assert escaped(text).isprintable()


def test_counts_below_ten_keep_two_digits() -> None:
    assert [count(value) for value in (0.2677, 3.0, 9.97, 12.4, 1024.4)] == [
        *("0.27", "3", "10", "12", "1,024"),
    ]
