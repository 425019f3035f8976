from __future__ import annotations

import pytest
import torch

from cmkd_scale.models.model import build_model
from cmkd_scale.training.averaging import WeightAverage
from cmkd_scale.training.backends import Replicated


def make() -> Replicated:
    model = build_model(
        encoder="features", shape=(2, 3), width=8, depth=1, feature_dim=4, classes=2
    )
    model.head.bias.requires_grad_(False)
    return Replicated(model, torch.optim.AdamW(model.parameters()), model)


def test_the_average_is_the_one_of_the_formula() -> None:
    backend = make()
    average = WeightAverage(backend, 0.8)
    weight = backend.parameters()["head.weight"]
    wanted = weight.detach().double().clone()
    for step in range(60):
        with torch.no_grad():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(step)))
        average.update(step)
        decay = min(0.8, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * weight.detach().double()
    torch.testing.assert_close(average.parts["head.weight"].double(), wanted, atol=1e-5, rtol=1e-5)
    assert "head.bias" not in average.parts  # nothing trains it


def test_what_is_saved_is_taken_up() -> None:
    backend = make()
    average = WeightAverage(backend, 0.9)
    with torch.no_grad():
        for parameter in backend.parameters().values():
            parameter.add_(1.0)
    average.update(0)
    state = {name: value.clone() for name, value in average.state()}
    other = WeightAverage(backend, 0.9)
    assert not torch.equal(other.parts["head.weight"], state["head.weight"])
    other.load(state)
    for name, value in state.items():
        assert torch.equal(other.parts[name], value)
    average.update(1)  # what was taken up is a copy
    with pytest.raises(AssertionError):
        torch.testing.assert_close(average.parts["head.weight"], other.parts["head.weight"])
