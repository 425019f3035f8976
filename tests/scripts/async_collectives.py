"""Run by one or several ranks: exchanges and collectives under way against what they must return.

Every rank knows the inputs of all, so it works out each result by itself.
"""

import os

import torch
import torch.distributed as dist  # noqa: TID251
from torch import Tensor, nn

from cmkd_scale import distributed

if "WORLD_SIZE" in os.environ:
    dist.init_process_group("gloo")
rank, world = distributed.rank(), distributed.world_size()
ranks = range(world)


def numbers(of_rank: int, *shape: int) -> Tensor:
    """Whole numbers, so that sums are exact in any order; other ones for each rank."""
    generator = torch.Generator().manual_seed(of_rank)
    return torch.randint(-50, 50, shape, generator=generator).float()


def owners(of_rank: int, count: int) -> Tensor:
    """Which rank owns each row."""
    generator = torch.Generator().manual_seed(100 + of_rank)
    return torch.randint(world, (count,), generator=generator)


def work() -> None:
    """Something to do meanwhile that takes longer than the collective."""
    layer = nn.Linear(256, 256)
    for _ in range(20):
        layer(torch.ones(64, 256)).square().mean().backward()


def check_exchange(rows: list[Tensor], owner: list[Tensor]) -> None:
    """``rows`` and ``owner`` of every rank."""
    arrived = distributed.exchange_rows(rows[rank], owner[rank])
    expected = torch.cat([part[of == rank] for part, of in zip(rows, owner, strict=True)])
    assert arrived.dtype == expected.dtype
    assert arrived.shape == expected.shape, (arrived.shape, expected.shape)
    assert torch.equal(arrived, expected)


counts = [7 * r + 3 for r in ranks]
rows, owner = [numbers(r, counts[r], 4) for r in ranks], [owners(r, counts[r]) for r in ranks]
check_exchange(rows, owner)
check_exchange([part.long() for part in rows], owner)
check_exchange([part[:, 0] for part in rows], owner)  # one dimension, and strided
check_exchange([numbers(r, 2, 3, counts[r]).permute(2, 0, 1) for r in ranks], owner)
# The last rank has no row; then every row belongs to rank 0; then there is none at all.
some = [count * (r < world - 1) for r, count in enumerate(counts)]
check_exchange([numbers(r, some[r], 4) for r in ranks], [owners(r, some[r]) for r in ranks])
check_exchange(rows, [torch.zeros(count, dtype=torch.int64) for count in counts])
check_exchange([part[:0] for part in rows], [part[:0] for part in owner])

for shape in [(), (5,), (3, 4), (0,), (0, 5)]:
    mine = [numbers(r, *shape) for r in ranks]
    total = distributed.start_all_reduce_sum(mine[rank].clone())
    gathered = distributed.start_gather(mine[rank].clone())
    work()
    # Waited for in another order than they began in.
    assert torch.equal(gathered.wait(), torch.stack(mine))
    assert torch.equal(total.wait(), torch.stack(mine).sum(0))
    assert torch.equal(total.wait(), torch.stack(mine).sum(0))  # a second time
    size = 4 * mine[rank].numel()
    assert abs(total.bytes_on_wire - 2 * (world - 1) / world * size) < 1e-6
    assert gathered.bytes_on_wire == (world - 1) * size

for dtype in (torch.int64, torch.float64):
    mine = [numbers(r, 6).to(dtype) for r in ranks]
    strided = torch.stack([mine[rank], mine[rank] + 1], 1)[:, 1]
    assert torch.equal(
        distributed.start_all_reduce_sum(strided).wait(), torch.stack(mine).sum(0) + world
    )
    assert torch.equal(distributed.start_gather(strided).wait(), torch.stack(mine) + 1)
    waited = distributed.start_all_reduce_sum(mine[rank].clone()).wait()
    begun = distributed.start_all_reduce_sum(mine[rank].clone())
    work()
    assert torch.equal(begun.wait(), waited)

print("async collectives right\n", end="", flush=True)
distributed.leave()
distributed.end(0)
