"""Run by several ranks: a memory follows features that are split over them; prints its digest."""

import os

import torch
import torch.distributed as dist  # noqa: TID251

from cmkd_scale import distributed
from cmkd_scale.memory.moving import MovingMemory
from tests.memory.examples import build_from, teacher_data

if "WORLD_SIZE" in os.environ:
    dist.init_process_group("gloo")
features, labels, weight, bias = teacher_data()
moving = MovingMemory(build_from(features, labels, weight, bias), every=2)
mine = torch.arange(len(labels))[distributed.rank() :: distributed.world_size()]
for turn in range(4):
    moving.observe(features[mine] + 0.1 * turn, labels[mine])
    if moving.due:
        moving.follow(weight, bias)
print(moving.memory.digest() + "\n", end="", flush=True)
distributed.leave()
distributed.end(0)
