"""Run by several ranks: batches split over them go through targets; prints what is left."""

import json
import os
import sys
from typing import get_args

import torch
import torch.distributed as dist  # noqa: TID251

from cmkd_scale import distributed
from cmkd_scale.memory.checksum import checksum
from cmkd_scale.training.targets import MemoryTargets
from cmkd_scale.training.transports import AlignmentOptions, Kind
from tests.memory.examples import example_memory

if "WORLD_SIZE" in os.environ:
    dist.init_process_group("gloo")
rank, world = distributed.rank(), distributed.world_size()
generator = torch.Generator().manual_seed(0)
kind = get_args(Kind)[get_args(Kind).index(sys.argv[1])]
options = AlignmentOptions(transport=kind, ring_size=40, refresh_every_steps=4)
targets = MemoryTargets(example_memory(), steps=20, options=options)
sent, formula = 0.0, 0.0
for step in range(12):
    features = torch.randn(24, 8, generator=generator)
    labels = torch.randint(6, (24,), generator=generator)
    # As the loader does: position p of the global batch belongs to rank p mod W.
    mine = slice(rank, None, world)
    share = torch.ones(24 // world)
    _, outgoing = targets(features[mine], labels[mine], share, step)
    exchange = targets.start(outgoing)
    torch.randn(200, 200) @ torch.randn(200, 200)  # work in between
    targets.finish(exchange, step)
    sent += exchange.bytes_on_wire
    rows = outgoing.rows
    assert rows is not None
    formula += 2 * (world - 1) / world * outgoing.sums.numel() * 4 + (world - 1) * rows.numel() * 4
assert targets.statistics is not None
order = targets.statistics.ring_steps.argsort(stable=True)
result = {
    "checksum": checksum(targets.buffers()),
    "potentials": targets.potentials.value.tolist(),
    "ring": targets.statistics.ring[order].tolist(),
    "measures": [value for _, value in sorted(targets.measures(11).items())],
    "bytes": sent,
    "formula": formula,
}
print(json.dumps(result) + "\n", end="", flush=True)
if distributed.is_initialized():
    dist.destroy_process_group()
