"""Run by several ranks: a few steps of dual ascent on a batch split over them."""

import os

import torch
import torch.distributed as dist  # noqa: TID251

from cmkd_scale import distributed
from cmkd_scale.losses.sinkhorn import semi_dual_plan
from cmkd_scale.memory.potentials import Potentials

if "WORLD_SIZE" in os.environ:
    dist.init_process_group("gloo")
generator = torch.Generator().manual_seed(0)
classes = torch.arange(4).repeat_interleave(3)
mass = torch.full((12,), 1 / 3)
potentials = Potentials(mass, classes, torch.full((4,), 10), rate=0.1)
for _ in range(5):
    cost = torch.rand(12, 3, generator=generator)
    labels = torch.randint(4, (12,), generator=generator)
    mine = slice(distributed.rank(), None, distributed.world_size())
    columns = 3 * labels.unsqueeze(1) + torch.arange(3)
    plan = semi_dual_plan(cost, mass.log()[columns], potentials.value[columns], 0.1)
    share = torch.ones(12)[mine]
    sent = potentials.sent_within_classes(plan[mine], columns[mine], labels[mine], share)
    potentials.update(distributed.all_reduce_sum(sent), within_classes=True)
print(",".join(f"{value:.9f}" for value in potentials.value.tolist()) + "\n", end="", flush=True)
distributed.leave()
distributed.end(0)
