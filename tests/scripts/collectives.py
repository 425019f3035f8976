"""Run by several ranks: every collective of ``distributed`` against what it must return."""

import torch
import torch.distributed as dist  # noqa: TID251

from cmkd_scale import distributed
from cmkd_scale.errors import CmkdError, IntegrityError

dist.init_process_group("gloo")
rank, world = distributed.rank(), distributed.world_size()

total = distributed.all_reduce_sum(torch.full((3,), rank + 1, dtype=torch.int64))
assert total.tolist() == [world * (world + 1) // 2] * 3

strided = torch.arange(12.0).view(3, 4).T  # a view that is not contiguous
expected = strided * world
assert torch.equal(distributed.all_reduce_sum(strided), expected)

# Rank 1 has no row at all.
mine = torch.full((0 if rank == 1 else rank + 1, 2), float(rank))
rows = distributed.gather_rows(mine)
wanted = [float(r) for r in range(world) for _ in range(0 if r == 1 else r + 1)]
assert rows[:, 0].tolist() == wanted, rows

nothing = distributed.gather_rows(torch.zeros(0, 5))
assert nothing.shape == (0, 5)

assert distributed.gather_integers(10 * rank) == [10 * r for r in range(world)]
assert distributed.any_rank(rank == world - 1)
assert not distributed.any_rank(False)


def fail() -> None:
    raise IntegrityError("broken")


stopped = None
try:
    distributed.run_on_main(fail)
except CmkdError as error:
    stopped = error
# The cause on rank 0, the same exit code everywhere.
assert stopped is not None
assert stopped.exit_code == 42
assert isinstance(stopped, IntegrityError) == (rank == 0)
done: list[int] = []
distributed.run_on_main(lambda: done.append(rank))
assert done == ([0] if rank == 0 else [])
distributed.barrier()
print("collectives right\n", end="", flush=True)
distributed.leave()
distributed.end(0)
