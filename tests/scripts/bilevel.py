"""Run by one or several ranks: a few bilevel steps in float64; prints what the weights come to."""

from __future__ import annotations

import torch

from cmkd_scale import distributed
from cmkd_scale.data.companions import TEACHER_INPUTS, TEACHER_LABELS
from cmkd_scale.models.encoders import FeatureEncoder
from cmkd_scale.models.model import Model
from cmkd_scale.training.distillation import Distillation
from cmkd_scale.training.engine import Engine, Options
from cmkd_scale.training.live_teacher import LiveTeacher
from cmkd_scale.training.method_checks import resolve_method

NAMES = ("a", "b", "c")
BATCH = 12


def model(seed: int) -> Model:
    torch.manual_seed(seed)
    return Model(
        FeatureEncoder(size=10, width=24, depth=2), encoder_dim=24, feature_dim=8, classes=3
    )


# Its label steps alone: a transport of two halves of a batch is not that of the whole.
method = resolve_method("ucmkd_fixed", {})
object.__setattr__(method, "inner", (("taught_label_gap", 2),))
module = Distillation(model(0), method, live=LiveTeacher(model(1), NAMES, NAMES)).double()
assert isinstance(module.live, LiveTeacher)
module.live._frozen[0].double()
engine = Engine()
engine.prepare(module, Options(BATCH, 1, 0.05, 1.0, 5.0, None))
rank, world = distributed.rank(), distributed.world_size()
for step in range(4):
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(3, (BATCH,), generator=generator)
    both = torch.randn(2, BATCH, 2, 5, generator=generator, dtype=torch.float64)
    inputs, other = both + labels[:, None, None]
    mine = slice(rank, None, world)
    beside = {TEACHER_INPUTS: other[mine], TEACHER_LABELS: labels[mine]}
    engine.step(inputs[mine], labels[mine], step, beside, learning_rate=0.01)
if distributed.is_main():
    print("\n" + repr(sum(float(p.detach().abs().sum()) for p in module.model.parameters())))
distributed.leave()
distributed.end(0)
