from __future__ import annotations

import pytest
import torch
from torch import nn

from cmkd_scale.models.model import Model, build_model
from cmkd_scale.operations.plan_trace import trace
from cmkd_scale.training.distillation import Distillation
from cmkd_scale.training.method_checks import resolve_method

BATCH, WIDTH = 6, 64


class Wide(nn.Module):
    """A chain of linear layers with nothing between them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.out_dim = WIDTH

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        for layer in self.layers:
            inputs = layer(inputs)
        return inputs, ()


def module() -> Distillation:
    model = Model(Wide(), encoder_dim=WIDTH, feature_dim=8, classes=4)
    return Distillation(model, resolve_method("ce", {}))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(BATCH, WIDTH), torch.zeros(BATCH, dtype=torch.int64)


def test_flops_are_those_of_the_matrix_products() -> None:
    inputs, labels = batch()
    found = trace(module(), inputs, labels, {})
    # Forward 2 n m a product; backward as much for the weights and, but for the first, the inputs.
    products = [(WIDTH, WIDTH)] * 3 + [(WIDTH, 16), (16, 8), (8, 4)]
    forward = sum(2 * BATCH * n * m for n, m in products)
    assert found.flops == 3 * forward - 2 * BATCH * WIDTH * WIDTH


def test_activations_are_those_of_the_batch() -> None:
    tall = torch.randn(100 * BATCH, WIDTH)
    labels = torch.zeros(100 * BATCH, dtype=torch.int64)
    small, large = trace(module(), *batch(), {}), trace(module(), tall, labels, {})
    # The outputs of three layers at least stay until the backward pass; without it, at most two.
    layer = 4 * 100 * BATCH * WIDTH
    assert 3 * layer < large.activation_bytes < 8 * layer
    assert 2 * layer <= large.inference_bytes < 3 * layer
    weights = 4 * sum(parameter.numel() for parameter in module().parameters())
    assert small.activation_bytes < weights  # whose gradients are not among them


def test_a_live_gradient_is_left_nowhere() -> None:
    traced = module()
    trace(traced, *batch(), {})
    assert all(parameter.grad is None for parameter in traced.parameters())


def test_recomputed_blocks_keep_less() -> None:
    def peak(recompute: bool) -> int:
        model = build_model(
            encoder="byte_transformer", shape=(32,), width=64, depth=6, feature_dim=8, classes=4
        )
        if recompute:
            model.checkpoint_activations()
        inputs = torch.randint(1, 200, (8, 32))
        labels = torch.zeros(8, dtype=torch.int64)
        found = trace(Distillation(model, resolve_method("ce", {})), inputs, labels, {})
        return found.activation_bytes

    assert peak(True) < 0.5 * peak(False)


@pytest.mark.parametrize("method", ["ce", "ce_ls"])
def test_twice_the_same(method: str) -> None:
    model = Model(Wide(), encoder_dim=WIDTH, feature_dim=8, classes=4)
    traced = Distillation(model, resolve_method(method, {}))
    assert trace(traced, *batch(), {}) == trace(traced, *batch(), {})
