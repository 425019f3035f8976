"""A signal is meant for the program: one that finds a stage at its end stops the next."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import REPOSITORY
from tests.stages.conftest import Story

WHILE_RESULTS_ARE_WRITTEN = """
import os, signal, sys
from cmkd_scale.config import load_config
from cmkd_scale.errors import PreemptedError
from cmkd_scale.stages import runs
from cmkd_scale.stages.student import student
from pathlib import Path

real = runs.write_json

def watched(path, value):
    os.kill(os.getpid(), signal.SIGTERM)
    real(path, value)

runs.write_json = watched
student(load_config(Path(sys.argv[1])), console=False)
try:
    student(load_config(Path(sys.argv[2])), console=False)
except PreemptedError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_signal_that_finds_a_stage_at_its_end_stops_the_next(
    story: Story, tmp_path: Path
) -> None:
    runs = tmp_path / "first", tmp_path / "second"
    files = [run.with_suffix(".yaml") for run in runs]
    for run, file in zip(runs, files, strict=True):
        file.write_text(yaml.safe_dump(story.tree(run, train={"steps": 4})))
    done = subprocess.run(
        [sys.executable, "-c", WHILE_RESULTS_ARE_WRITTEN, *map(str, files)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (runs[0] / "results.json").exists()
    assert "Stopped by a signal after step 1; the state is saved" in done.stdout
    assert not (runs[1] / "results.json").exists()
