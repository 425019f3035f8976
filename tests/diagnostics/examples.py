"""Small inputs of the error bound, and the teacher's losses by hand."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cmkd_scale.diagnostics.bound import BoundInputs

QUICK: dict[str, int] = {"draws": 4, "permutations": 4}


def make(
    seed: int = 0,
    *,
    classes: int = 4,
    dim: int = 3,
    samples: int = 30,
    points: int = 14,
    scale: float = 1.0,
    missing: int = 0,
) -> BoundInputs:
    """Random heads, features and masses; the last ``missing`` classes have no prototypes."""
    g = torch.Generator().manual_seed(seed)
    taught = classes - missing
    owners = torch.cat([torch.arange(taught), torch.randint(taught, (points,), generator=g)])
    owners = owners.sort().values
    mass = torch.rand(len(owners), generator=g, dtype=torch.float64) + 0.1
    mass /= torch.bincount(owners, mass, minlength=classes)[owners]
    return BoundInputs(
        features=scale * torch.randn(samples, dim, generator=g),
        logits=torch.randn(samples, classes, generator=g),
        labels=torch.randint(classes, (samples,), generator=g),
        prototypes=scale * torch.randn(len(owners), dim, generator=g),
        prototype_class=owners,
        prototype_mass=mass,
        head_weight=torch.randn(classes, dim, generator=g),
        head_bias=torch.randn(classes, generator=g),
        known=torch.arange(classes) < taught,
    )


def teacher_losses(inputs: BoundInputs, features: Tensor, labels: Tensor) -> list[float]:
    """``-log p_T(y | z)`` by hand, over the classes that the head knows."""
    known = [c for c in range(len(inputs.known)) if inputs.known[c]]
    weight, bias = inputs.head_weight.double().numpy(), inputs.head_bias.double().numpy()
    out = []
    for z, y in zip(features.double().numpy(), labels.tolist(), strict=True):
        scores = {c: float(weight[c] @ z + bias[c]) for c in known}
        out.append(math.log(math.fsum(math.exp(s - scores[y]) for s in scores.values())))
    return out
