from __future__ import annotations

import pytest
import torch

from cmkd_scale.models.model import Model, build_model
from cmkd_scale.training.parameter_groups import parameter_groups


def build(encoder: str, shape: tuple[int, ...]) -> Model:
    return build_model(encoder=encoder, shape=shape, width=16, depth=2, feature_dim=8, classes=3)


@pytest.mark.parametrize(
    ("encoder", "shape", "blocks"),
    [("features", (4, 6), 2), ("byte_transformer", (12,), 2), ("resnet", (1, 16, 16), 6)],
)
def test_layers_learn_the_slower_the_farther_they_are_from_the_head(
    encoder: str, shape: tuple[int, ...], blocks: int
) -> None:
    model = build(encoder, shape)
    assert len(model.blocks) == blocks
    groups = parameter_groups(model, model, weight_decay=0.1, layer_decay=0.5)
    scale = {id(p): group["scale"] for group in groups for p in group["params"]}
    assert set(scale) == {id(p) for p in model.parameters()}
    assert {scale[id(p)] for p in model.head.parameters()} == {1.0}
    assert {scale[id(p)] for p in model.projection.parameters()} == {1.0}
    for away, block in enumerate(reversed(model.blocks), start=1):
        assert {scale[id(p)] for p in block.parameters()} == {0.5**away}
    assert min(scale.values()) == 0.5 ** (blocks + 1)  # what comes before the blocks


def test_only_matrices_decay_and_without_layer_decay_there_are_two_groups() -> None:
    model = build("features", (4, 6))
    model.head.bias.requires_grad_(False)
    groups = parameter_groups(model, model, weight_decay=0.1, layer_decay=1.0)
    assert [(group["weight_decay"], group["scale"]) for group in groups] == [(0.0, 1.0), (0.1, 1.0)]
    assert all(p.ndim == 1 for p in groups[0]["params"])
    assert all(p.ndim > 1 for p in groups[1]["params"])
    assert not any(p is model.head.bias for p in groups[0]["params"])


def test_recomputed_activations_give_the_same_gradient() -> None:
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = build("resnet", (1, 16, 16))
        names = list(model.state_dict())
        if recompute:
            model.checkpoint_activations()
        output = model(torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(1)))
        output.logits.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        assert list(model.state_dict()) == names
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch's compiler
def test_compiled_blocks_compute_the_same() -> None:
    torch.manual_seed(0)
    model = build("features", (4, 6))
    inputs = torch.randn(5, 4, 6)
    wanted = model(inputs).logits
    names = list(model.state_dict())
    model.compile_blocks()
    torch.testing.assert_close(model(inputs).logits, wanted, atol=1e-5, rtol=1e-5)
    assert list(model.state_dict()) == names
