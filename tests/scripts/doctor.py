"""Run by two ranks: what a doctor finds where their machines are not alike."""

import sys
from pathlib import Path

import torch

from cmkd_scale import distributed
from cmkd_scale.config import make_config
from cmkd_scale.operations import doctor_ranks
from cmkd_scale.operations.doctor_findings import Book, Finding
from cmkd_scale.training.engine import Engine

root = Path(sys.argv[1])
Engine()
rank = distributed.rank()
assert distributed.gather_texts("a" * rank) == ["", "a"]

book = Book()
book.add([Finding("disk", "blocker", "full")] if rank == 1 else [])
assert book.findings == [Finding("disk", "blocker", "full", ranks=(1,))]
assert book.blocked

same = doctor_ranks.directory(root / "shared")
assert same[0].severity == "ok", same
own = root / str(rank)
own.mkdir()
apart = doctor_ranks.directory(own / "run", wait_seconds=0.2)
assert apart[0].severity == ("ok" if rank == 0 else "blocker"), apart
distributed.barrier()
assert list(own.iterdir()) == []

findings, speed = doctor_ranks.collectives(torch.device("cpu"))
assert findings[0].severity == "ok"
assert speed is not None
assert speed > 0

assert doctor_ranks.same_clock()[0].severity == "ok"
config = make_config({"run": {"seed": rank}})
(found,) = doctor_ranks.same_versions(config, "cpu")
assert "configuration" in found.found
assert found.severity == "blocker"
print("all seen\n", end="", flush=True)
distributed.leave()
distributed.end(0)
