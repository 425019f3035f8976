from __future__ import annotations

from pathlib import Path

import pytest

from cmkd_scale import launch_check
from cmkd_scale.errors import UsageError


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["python", "/bin/accelerate", "launch", "--cpu", "--num_processes", "2", "x.py"], 2),
        (["accelerate", "launch", "--num_processes=3", "x.py"], 3),
        (["accelerate", "launch", "--cpu", "x.py"], None),
        (["accelerate", "launch", "--num_processes"], None),
        (["accelerate", "config"], None),
        (["bash", "-c", "x --num_processes 2"], None),
        ([], None),
    ],
)
def test_reading_the_launcher_command_line(command: list[str], expected: int | None) -> None:
    assert launch_check.processes_on_command_line(command) == expected


def test_reading_the_launcher_config_file(tmp_path: Path) -> None:
    file = tmp_path / "accelerate.yaml"
    file.write_text("distributed_type: MULTI_CPU\nnum_processes: 2\n")
    command = ["python", "-m", "accelerate.commands.launch", "launch", "--config_file", str(file)]
    assert launch_check.processes_on_command_line(command) == 2
    assert launch_check.processes_on_command_line([*command, "--num_processes", "3"]) == 3
    file.write_text("[")
    assert launch_check.processes_on_command_line(command) is None


def test_two_trainings_that_believe_to_be_alone_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="not what it seems"):
        launch_check.check_world(seen_by_trainer=1, configured=None)


def test_a_configured_world_size_is_enforced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    launch_check.check_world(seen_by_trainer=1, configured=1)
    with pytest.raises(UsageError, match=r"run\.world_size"):
        launch_check.check_world(seen_by_trainer=1, configured=4)
