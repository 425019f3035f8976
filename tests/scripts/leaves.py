"""Run by several ranks: the program ends outside of the process group, whatever its exit code."""

import torch.distributed as dist  # noqa: TID251

from cmkd_scale import distributed
from cmkd_scale.cli import main

for arguments, code in ((["methods", "--json"], 0), (["memory-info", "nothing/here"], 2)):
    dist.init_process_group("gloo")
    assert main(arguments) == code
    assert not distributed.is_initialized()
