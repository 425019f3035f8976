"""Run by several ranks: build one memory and print its digest, in two orders."""

import os

import torch.distributed as dist  # noqa: TID251

from cmkd_scale import distributed
from tests.memory.examples import build_from, teacher_data

if "WORLD_SIZE" in os.environ:
    dist.init_process_group("gloo")
data = teacher_data()
digests = [build_from(*data).digest(), build_from(*data, shuffle=5).digest()]
print("".join(f"digest {digest}\n" for digest in digests), end="", flush=True)
if distributed.is_initialized():
    dist.destroy_process_group()
