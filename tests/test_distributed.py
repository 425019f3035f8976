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
from cmkd_scale.errors import UsageError
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
distributed.leave()
distributed.end(0)
"""
SILENT = """
from datetime import timedelta
import torch
import torch.distributed as dist
from cmkd_scale import distributed

dist.init_process_group("gloo", timeout=timedelta(seconds=60))
of_a_library = dist.new_group([0, 1])
distributed.barrier()
distributed.limit_waits(2.0)
told = distributed.open_store()
if distributed.rank() == 1:
    while told.get("given up") is None:
        pass
else:
    try:
        dist.all_reduce(torch.ones(3), group=of_a_library)
    except RuntimeError as error:
        print("lost", distributed.lost_peer(error), flush=True)
    told.put("given up", "yes")
distributed.end(0)
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


@pytest.mark.multirank
def test_a_silent_rank_is_given_up_in_a_group_of_a_library_too(
    launch: Launch, tmp_path: Path
) -> None:
    script = tmp_path / "silent.py"
    script.write_text(SILENT)
    assert "lost True" in launch(script, processes=2).stdout


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
@pytest.mark.parametrize("words", ["0 methods --json", "2 memory-info nothing/here"])
def test_the_program_leaves_the_process_group_before_it_ends(launch: Launch, words: str) -> None:
    # Inside of it, gloo aborted a third of the processes at exit, and their exit code was lost.
    launch(REPOSITORY / "tests" / "scripts" / "leaves.py", *words.split(), processes=2)
