"""Run by several ranks: batches split over them go through targets; prints what is left."""

import json
import os

import torch
import torch.distributed as dist  # noqa: TID251

from cmkd_scale import distributed
from cmkd_scale.memory.checksum import checksum
from cmkd_scale.training.alignment_options import AlignmentOptions
from cmkd_scale.training.targets import MemoryTargets
from tests.memory.examples import example_memory

CASES = {
    "class-masked": AlignmentOptions(ring_size=40, refresh_every_steps=4),
    "soft-label": AlignmentOptions(transport="soft_label", ring_size=40, debias=True),
    "search": AlignmentOptions(
        transport="label_free",
        cost="squared_euclidean",
        ring_size=37,
        refresh_every_steps=3,
        search_candidates=8,
        search_least_mass=0.5,
        search_refresh_steps=3,
        potential_optimizer="sgd",
    ),
}


def run(options: AlignmentOptions) -> tuple[MemoryTargets, float, float]:
    """The targets after 12 steps, bytes sent, and bytes by the formula."""
    rank, world = distributed.rank(), distributed.world_size()
    generator = torch.Generator().manual_seed(0)
    targets = MemoryTargets(example_memory(), steps=20, options=options)
    sent, formula = 0.0, 0.0
    for step in range(12):
        features = torch.randn(24, 8, generator=generator)
        labels = torch.randint(6, (24,), generator=generator)
        # As the loader does: position p of the global batch belongs to rank p mod W.
        mine = slice(rank, None, world)
        _, outgoing = targets(features[mine], labels[mine], step)
        exchange = targets.start([outgoing])
        torch.randn(200, 200) @ torch.randn(200, 200)  # work in between
        targets.finish(exchange, step)
        sent += exchange.bytes_on_wire
        rows = outgoing.rows
        assert rows is not None
        formula += 2 * (world - 1) / world * outgoing.sums.numel() * 4
        formula += (world - 1) * rows.numel() * 4
    return targets, sent, formula


if "WORLD_SIZE" in os.environ:
    dist.init_process_group("gloo")
found, sums = {}, []
for name, options in CASES.items():
    targets, sent, formula = run(options)
    statistics = targets.statistics
    assert statistics is not None
    order = statistics.ring_steps.argsort(stable=True)
    found[name] = {
        "potentials": targets.potentials.value.tolist(),
        "ring": statistics.ring[order].tolist(),
        "moments": statistics.variance.tolist(),
        "measures": [value for _, value in sorted(targets.measures(11).items())],
    }
    sums.append(checksum(targets.buffers()))
result = {"cases": found, "checksum": str(sums), "bytes": sent, "formula": formula}
print(json.dumps(result) + "\n", end="", flush=True)
distributed.leave()
distributed.end(0)
