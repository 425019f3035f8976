"""What it costs to watch a run: exporter, console and tracker, over the same steps without them.

    python tools/bench/monitoring.py [--quick] [--json FILE]

``Trainer`` is what ``cmkd student`` runs, on one rank and one thread: a ResNet on log-mels with
cross-entropy, batches held in memory, a line of the log every tenth step. All ways of watching
take their turns in one process on one model. The exporter is scraped once a second by another
process (a server's usual interval is 15 to 60 s); the console draws on a terminal of 120 columns
that leads nowhere; the tracker is Accelerate's for TensorBoard.

Ratios are medians over rounds, taken in turns; ``again`` is A against A, the noise, which is larger
than what is looked for. So the time that training spends in the calls themselves is measured, too:
``calls`` is that of a step, ``share`` over the step. What threads do beside training (answering,
drawing, writing) is in the CPU ratio only.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console

# A script sees only its own directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cmkd_scale.config_sections import TrainConfig
from cmkd_scale.monitoring.console import ConsoleSink
from cmkd_scale.monitoring.exporter import PrometheusSink
from cmkd_scale.monitoring.sinks import Sink, Sinks
from cmkd_scale.training.engine import Engine
from cmkd_scale.training.trackers import TrackerSink
from tools.bench._bench import Goal, Rows, finish, parse
from tools.bench._scaling_loops import Ours
from tools.bench._step_variants import Setting
from tools.bench.scaling import FULL, QUICK, in_turns, train_config

SHARE = 0.005
NOTHING, ALL = "log file", "all of them"
EVERY_STEPS = 10

_SCRAPES = """
import sys, time, urllib.error, urllib.request
while True:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/metrics", timeout=5).read()
    except OSError:
        pass
    time.sleep(1)
"""


class Timed:
    """A sink, and the seconds that training has spent in it."""

    def __init__(self, sink: Sink) -> None:
        """Measure what goes to ``sink``."""
        self._sink = Sinks([sink])
        self.seconds = 0.0

    def step(self, step: int, seconds: float, waited_seconds: float) -> None:
        """Pass it on."""
        begun = time.perf_counter()
        self._sink.step(step, seconds, waited_seconds)
        self.seconds += time.perf_counter() - begun

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Pass it on."""
        begun = time.perf_counter()
        self._sink.log(step, values)
        self.seconds += time.perf_counter() - begun

    def close(self) -> None:
        """Whoever has made it closes it, after all runs."""


@contextmanager
def exported(directory: Path) -> Iterator[Sink]:
    """An exporter, and somebody who scrapes it."""
    with (
        closing(PrometheusSink(0)) as sink,
        subprocess.Popen([sys.executable, "-c", _SCRAPES, str(sink.port)]) as scraper,
    ):
        try:
            yield sink
        finally:
            scraper.kill()


@contextmanager
def drawn(directory: Path) -> Iterator[Sink]:
    """A console on a terminal."""
    with open(os.devnull, "w") as nowhere:
        terminal = Console(file=nowhere, force_terminal=True, width=120, height=40)
        with closing(ConsoleSink(1_000_000, title="student", console=terminal)) as sink:
            yield sink


@contextmanager
def tracked(directory: Path) -> Iterator[Sink]:
    """TensorBoard's files."""
    with closing(TrackerSink(["tensorboard"], directory, run_id="bench", config={})) as sink:
        yield sink


Way = Callable[[Path], AbstractContextManager[Sink]]
"""Something that watches a run with files in a directory of its own."""

WAYS: Mapping[str, Sequence[Way]] = {
    NOTHING: (),
    f"{NOTHING} again": (),
    "exporter": (exported,),
    "console": (drawn,),
    "tracker": (tracked,),
    ALL: (exported, drawn, tracked),
}


class Watched:
    """Training under one way of watching, which lasts over all of its runs."""

    def __init__(self, ours: Ours, sinks: Sequence[Sink]) -> None:
        """Watch the runs of ``ours``, which other ways share."""
        self._ours = ours
        self._timed = [Timed(sink) for sink in sinks]
        self.calls: list[float] = []
        """Seconds in calls a step, of each run."""

    def __call__(self, config: TrainConfig) -> tuple[float, float]:
        """Seconds and CPU seconds a step."""
        before = sum(timed.seconds for timed in self._timed)
        times = self._ours(config, self._timed)
        self.calls.append((sum(timed.seconds for timed in self._timed) - before) / config.steps)
        return times


def table(setting: Setting, rounds: int, steps: int) -> Rows:
    """Time all ways in turns."""
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-monitoring-")))
        ours = Ours(Engine(), setting, root / "runs")
        watched = {}
        for name, ways in WAYS.items():
            directory = root / name.replace(" ", "_")
            directory.mkdir()
            watched[name] = Watched(ours, [stack.enter_context(way(directory)) for way in ways])
        rows = in_turns(dict(watched), train_config(setting, steps, log_every=EVERY_STEPS), rounds)
        for name, way in watched.items():
            calls = 1000 * statistics.median(way.calls[1:])
            rows[name] |= {"calls_milliseconds": calls, "share": calls / rows[name]["milliseconds"]}
    return rows


def show(rows: Rows) -> None:
    """Print a line for each way."""
    print(
        f"{'watched by':<18}{'ratio':>8}{'quartiles':>16}{'cpu ratio':>11}{'ms':>9}"
        f"{'calls, us':>11}{'share':>9}"
    )
    for name, row in rows.items():
        quartiles = f"{row['quartile_1']:.3f}-{row['quartile_3']:.3f}"
        print(
            f"{name:<18}{row['ratio']:>8.3f}{quartiles:>16}{row['cpu_ratio']:>11.3f}"
            f"{row['milliseconds']:>9.1f}{1000 * row['calls_milliseconds']:>11.1f}"
            f"{row['share']:>9.3%}"
        )


def main() -> None:
    """Print the table, and write it if asked."""
    options = parse(__doc__)
    torch.set_num_threads(1)
    print(f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    setting, rounds, steps = (QUICK, 5, 20) if options.quick else (FULL, 15, 20)
    rows = table(setting, rounds, steps)
    show(rows)
    goals = [Goal(f"share of {ALL} in a step", rows[ALL]["share"], SHARE)]
    finish(
        rows,
        goals,
        options.json,
        prometheus_client=version("prometheus_client"),
        rich=version("rich"),
        tensorboard=version("tensorboard"),
    )


if __name__ == "__main__":
    main()
