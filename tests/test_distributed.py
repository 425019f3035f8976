from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cmkd_scale import distributed
from cmkd_scale.errors import UsageError
from tests.conftest import REPOSITORY, Launch

SCRIPT = REPOSITORY / "tests" / "scripts" / "collectives.py"


def test_without_a_process_group_everything_is_local() -> None:
    rows = torch.arange(6.0).view(3, 2)
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.gather_rows(rows) is rows
    assert torch.equal(distributed.all_reduce_sum(rows.clone()), rows)
    assert distributed.any_rank(True)
    assert not distributed.any_rank(False)
    distributed.barrier()


@pytest.mark.multirank
@pytest.mark.parametrize("processes", [2, 3])
def test_collectives_on_real_ranks(launch: Launch, processes: int) -> None:
    done = launch(SCRIPT, processes=processes)
    assert done.stdout.count("collectives right") == processes


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
    assert distributed.processes_on_command_line(command) == expected


def test_reading_the_launcher_config_file(tmp_path: Path) -> None:
    file = tmp_path / "accelerate.yaml"
    file.write_text("distributed_type: MULTI_CPU\nnum_processes: 2\n")
    command = ["python", "-m", "accelerate.commands.launch", "launch", "--config_file", str(file)]
    assert distributed.processes_on_command_line(command) == 2
    assert distributed.processes_on_command_line([*command, "--num_processes", "3"]) == 3
    file.write_text("[")
    assert distributed.processes_on_command_line(command) is None


def test_two_trainings_that_believe_to_be_alone_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="not what it seems"):
        distributed.check_world(seen_by_trainer=1, configured=None)


def test_a_configured_world_size_is_enforced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    distributed.check_world(seen_by_trainer=1, configured=1)
    with pytest.raises(UsageError, match=r"run\.world_size"):
        distributed.check_world(seen_by_trainer=1, configured=4)


@pytest.mark.multirank
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_exchanges_and_collectives_under_way(launch: Launch, processes: int) -> None:
    script = SCRIPT.with_name("async_collectives.py")
    done = launch(script, processes=processes)
    assert done.stdout.count("async collectives right") == processes
