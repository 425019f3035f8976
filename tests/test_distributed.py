from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cmkd_scale import distributed
from cmkd_scale.errors import UsageError
from tests.conftest import REPOSITORY, Launch

FAILING = """
import sys
import torch.distributed as dist
from cmkd_scale import distributed
from cmkd_scale.errors import CmkdError, IntegrityError
dist.init_process_group("gloo")
rank = distributed.rank()
def work():
    if rank == 1:
        raise IntegrityError("broken")
try:
    distributed.run_together(work)
except CmkdError as error:
    own = isinstance(error, IntegrityError)
    print(f"rank {rank} own={own} code={error.exit_code} {error}\\n", end="", flush=True)
done = []
distributed.run_together(lambda: done.append(rank))
assert done == [rank]
dist.destroy_process_group()
"""
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


@pytest.mark.multirank
def test_a_failure_of_one_rank_ends_all_alike(launch: Launch, tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    lines = launch(script, processes=3).stdout.splitlines()
    because = "own=False code=42 stopped, because rank 1 did; its message says why."
    expected = [f"rank 0 {because}", "rank 1 own=True code=42 broken", f"rank 2 {because}"]
    assert sorted(line for line in lines if line) == expected


def test_a_failure_with_one_process_is_its_own() -> None:
    def work() -> None:
        raise UsageError("wrong")

    with pytest.raises(UsageError, match="wrong"):
        distributed.run_together(work)


def test_a_result_is_where_the_tensor_was() -> None:
    class Work:
        def wait(self) -> None:
            pass

    # As with NCCL, where what arrives for a CPU tensor lies on another device.
    pending = distributed.Pending(torch.ones(3), Work(), torch.device("meta"))  # type: ignore[arg-type]
    assert pending.wait().device == torch.device("meta")
    assert pending.wait().device == torch.device("meta")


@pytest.mark.multirank
def test_the_program_leaves_the_process_group_before_it_ends(launch: Launch) -> None:
    # Inside of it, gloo aborted a third of the processes at exit, and their exit code was lost.
    launch(REPOSITORY / "tests" / "scripts" / "leaves.py", processes=2)
