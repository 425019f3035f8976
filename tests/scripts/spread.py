"""Run by one or several ranks under any backend: a student's first steps, or its last ones.

``spread.py write OUT``: trains from the start and keeps its state after half of the steps in
``OUT/BACKEND``. ``spread.py read OUT``: continues from each state below OUT. ``spread.py parts``:
trains with gradients accumulated over 1, 2 and 4 parts. Each prints one JSON object on rank 0:
for each training its losses, and the sum of the weights that would be used from then on. With
``SPREAD_METHOD`` that method instead of ``ucmkd_global``, from a teacher that runs beside it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist  # noqa: TID251
from safetensors.torch import load_file, save_file
from torch import Tensor

from cmkd_scale import distributed
from cmkd_scale.data.companions import TEACHER_INPUTS, TEACHER_LABELS
from cmkd_scale.losses import Sizes
from cmkd_scale.models.encoders import FeatureEncoder
from cmkd_scale.models.model import Model
from cmkd_scale.training.alignment_options import AlignmentOptions
from cmkd_scale.training.distillation import Distillation
from cmkd_scale.training.engine import Engine, Options, State
from cmkd_scale.training.live_teacher import LiveTeacher
from cmkd_scale.training.method_checks import resolve_method
from cmkd_scale.training.targets import MemoryTargets
from tests.memory.examples import example_memory

STEPS = int(os.environ.get("SPREAD_STEPS", "8"))
BATCH = 48
HALF = STEPS // 2


METHOD = os.environ.get("SPREAD_METHOD", "ucmkd_global")
NAMES = tuple("abcdef")


def network(feature_dim: int) -> Model:
    encoder = FeatureEncoder(size=10, width=24, depth=2)
    return Model(encoder, encoder_dim=24, feature_dim=feature_dim, classes=6)


def make_module(engine: Engine) -> Distillation:
    """A student of another width than its teacher, with blocks to shard."""
    torch.manual_seed(0)
    model = network(12)
    if METHOD != "ucmkd_global":
        method = resolve_method(METHOD, {})
        live = LiveTeacher(network(8), NAMES, NAMES, learns=method.trains_teacher)
        sizes = Sizes(6, 12, 8, (24, 24), (24, 24))
        return Distillation(model, method, live=live, sizes=sizes, autocast=engine.compute)
    if os.environ.get("SPREAD_RECOMPUTE"):
        model.checkpoint_activations()
    method = resolve_method("ucmkd_global", {"class_bures": 0.1})
    options = AlignmentOptions(ring_size=40, refresh_every_steps=3)
    memory = MemoryTargets(example_memory(), steps=STEPS, options=options, needs=method.needs)
    return Distillation(model, method, [memory], autocast=engine.compute)


def train(
    engine: Engine,
    start: int = 0,
    state: State | None = None,
    keep: Path | None = None,
    parts: int = 1,
) -> dict[str, object]:
    """What comes of the steps from ``start`` on."""
    options = Options(
        global_batch_size=BATCH,
        parts=parts,
        weight_decay=0.05,
        layer_decay=0.8,
        clip=1.0,
        ema_decay=0.9,
    )
    engine.prepare(make_module(engine), options, state)
    rank, world = distributed.rank(), distributed.world_size()
    losses = []
    for step in range(start, STEPS):
        generator = torch.Generator().manual_seed(step)
        labels = torch.randint(6, (BATCH,), generator=generator)
        inputs = torch.randn(BATCH, 2, 5, generator=generator) + labels[:, None, None]
        mine = slice(rank, None, world)
        beside = {TEACHER_INPUTS: inputs.flip(2)[mine], TEACHER_LABELS: labels[mine]}
        stepped = engine.step(inputs[mine], labels[mine], step, beside, learning_rate=0.01)
        assert stepped.applied
        stepped.underway.wait()
        engine.module.finish_step(stepped.underway)
        loss = distributed.all_reduce_sum(stepped.result.loss.double().reshape(1)) / world
        losses.append(float(loss))
        if keep is not None and step + 1 == HALF:
            save(engine, keep)
    return {"losses": losses, "used": used(engine)}


def save(engine: Engine, directory: Path) -> None:
    for file, tensors in engine.state().items():
        whole = {name: value.clone().contiguous().cpu() for name, value in tensors}
        if distributed.is_main():
            (directory / file).parent.mkdir(parents=True, exist_ok=True)
            save_file(whole, directory / file)
    distributed.barrier()


def load(directory: Path) -> State:
    files = (path for path in directory.rglob("*.safetensors"))
    return {str(path.relative_to(directory)): load_file(path) for path in files}


def used(engine: Engine) -> float:
    weights: dict[str, Tensor] = engine.trained_weights()
    names = sorted(name for name in weights if name.startswith("model."))
    return float(sum(weights[name].double().abs().sum() for name in names))


def waits() -> set[float]:
    """After how many seconds processes give each other up, in all groups of all libraries."""
    cpu = torch.device("cpu")
    groups = dist.distributed_c10d._world.pg_map if distributed.is_initialized() else ()
    return {group._get_backend(cpu).options._timeout.total_seconds() for group in groups}


def main() -> None:
    precision = os.environ.get("SPREAD_PRECISION", "no")
    engine = Engine(mixed_precision=precision, collective_timeout_seconds=99.0)
    verb, out = sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else Path()
    name = engine.backend_name
    found: dict[str, object]
    if verb == "write":
        found = {name: train(engine, keep=out / name)}
    elif verb == "read":
        writers = sorted(path for path in out.iterdir() if path.is_dir())
        found = {path.name: train(engine, HALF, load(path)) for path in writers}
    else:
        found = {str(parts): train(engine, parts=parts) for parts in (1, 2, 4)}
    assert waits() <= {99.0}, waits()
    if distributed.is_main():
        print("\n" + json.dumps({"backend": name, "trained": found}), flush=True)
    distributed.leave()
    distributed.end(0)


main()
