"""Run by several ranks: build one memory in five ways and print its digests."""

import os
import tempfile
from pathlib import Path

import torch.distributed as dist  # noqa: TID251

from cmkd_scale import distributed
from cmkd_scale.memory import build
from cmkd_scale.memory.spool import Spool
from tests.memory.examples import batches_of, build_with, spool_of, teacher_data

if "WORLD_SIZE" in os.environ:
    dist.init_process_group("gloo")
features, labels, weight, bias = teacher_data()
batches = batches_of(features, labels, limit=11)
digests = [build_with(spool_of(order), weight, bias).digest() for order in (batches, batches[::-1])]
with tempfile.TemporaryDirectory() as directory:
    digests.append(build_with(spool_of(batches, Path(directory)), weight, bias).digest())
    again = Spool(8, Path(directory))  # of each rank its own, as on machines that share no disk
    assert again.take_up().tolist() == list(range(len(batches)))
    digests.append(build_with(again, weight, bias).digest())
build.BLOCK_BYTES = 1  # a block for each class
digests.append(build_with(spool_of(batches), weight, bias).digest())
print("".join(f"digest {digest}\n" for digest in digests), end="", flush=True)
distributed.leave()
distributed.end(0)
