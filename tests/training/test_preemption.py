from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cmkd_scale.training.preemption import SIGNALS, Preemption
from tests.conftest import REPOSITORY, Launch

STOPPED_TWICE = """
import os, signal
from cmkd_scale.errors import PreemptedError
from cmkd_scale.training.preemption import Preemption

try:
    with Preemption(), Preemption() as inner:
        os.kill(os.getpid(), signal.SIGTERM)
        assert inner.received
        raise PreemptedError("stopped")
except PreemptedError:
    os.kill(os.getpid(), signal.SIGTERM)  # what launchers do
    raise SystemExit(138)
"""

ONE_OF_TWO = """
import os, signal
import torch.distributed as dist
from cmkd_scale import distributed
from cmkd_scale.training.preemption import Preemption

def say(*words):  # in one piece: two ranks write into one pipe
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

dist.init_process_group("gloo")
with Preemption() as preemption:
    say("before", preemption.agreed())
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGUSR1)
    say("after", preemption.agreed())
distributed.leave()
distributed.end(0)
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_a_signal_the_earlier_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with Preemption() as outer:
        ours = [signal.getsignal(number) for number in SIGNALS]
        assert ours != before
        with Preemption():
            pass
        assert [signal.getsignal(number) for number in SIGNALS] == ours, "the outer one goes on"
        assert not outer.received
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.slow
def test_a_signal_after_the_stop_does_not_change_the_exit_code() -> None:
    done = run(STOPPED_TWICE)
    assert done.returncode == 138, done.stderr


@pytest.mark.multirank
def test_a_signal_to_one_rank_is_known_to_all(tmp_path: Path, launch: Launch) -> None:
    script = tmp_path / "one_of_two.py"
    script.write_text(ONE_OF_TWO)
    words = launch(script, processes=2).stdout.split()
    assert words.count("after") == words.count("True") == words.count("False") == 2
