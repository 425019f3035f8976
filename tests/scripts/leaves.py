"""Run by several ranks: the program ends outside of the process group, whatever its exit code.

leaves.py CODE ARGUMENT...
"""

import sys

import torch.distributed as dist  # noqa: TID251

from cmkd_scale import distributed
from cmkd_scale.cli import main

dist.init_process_group("gloo")
assert main(sys.argv[2:]) == int(sys.argv[1])
assert not distributed.is_initialized()
distributed.end(0)
