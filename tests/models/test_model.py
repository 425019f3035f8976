from __future__ import annotations

import pytest
import torch
from torch import nn

from cmkd_scale.errors import UsageError
from cmkd_scale.models.encoders import ENCODERS, INPUT_RANKS, build_encoder
from cmkd_scale.models.model import Model, build_model

INPUTS = {
    "resnet": torch.randn(5, 1, 28, 56),
    "byte_transformer": torch.randint(1, 257, (5, 24)),
    "features": torch.randn(5, 3, 20),
}


def make(name: str) -> Model:
    shape = tuple(INPUTS[name].shape[1:])
    return build_model(encoder=name, shape=shape, width=16, depth=1, feature_dim=12, classes=7)


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_shapes_and_gradients(name: str) -> None:
    model = make(name)
    output = model(INPUTS[name])
    assert output.features.shape == (5, 12)
    assert output.logits.shape == (5, 7)
    assert len(output.stages) >= 1
    output.logits.sum().backward()
    without = [key for key, value in model.named_parameters() if value.grad is None]
    assert without == []


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_a_sample_does_not_see_its_batch(name: str) -> None:
    model = make(name).train()
    together = model(INPUTS[name]).logits
    alone = torch.cat([model(sample.unsqueeze(0)).logits for sample in INPUTS[name]])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_padding_does_not_change_a_text() -> None:
    model = make("byte_transformer").eval()
    short = INPUTS["byte_transformer"].clone()
    short[:, 10:] = 0
    longer = torch.cat([short[:, :10], torch.zeros(5, 14, dtype=torch.int64)], dim=1)
    torch.testing.assert_close(model(short).features, model(longer).features)
    assert not torch.allclose(model(short).features, model(INPUTS["byte_transformer"]).features)


def test_left_and_right_are_told_apart() -> None:
    model = make("resnet").eval()
    image = torch.zeros(1, 1, 28, 56)
    image[..., 8:20, 8:20] = 1.0
    assert not torch.allclose(model(image).features, model(image.flip(-1)).features, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "shape", "width", "words"),
    [
        ("resnett", (1, 28, 28), 16, "did you mean 'resnet'"),
        ("resnet", (24,), 16, "model.encoder=byte_transformer"),
        (None, (1, 28, 28), 12, "multiple of 8"),
    ],
)
def test_what_does_not_fit_is_refused(
    name: str | None, shape: tuple[int, ...], width: int, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        build_encoder(name, shape, width, 1)


def test_every_encoder_states_its_input_rank() -> None:
    assert set(INPUT_RANKS) == set(ENCODERS) == set(INPUTS)


def test_several_pictures_are_encoded_alone_and_averaged() -> None:
    pictures = torch.randn(2, 3, 1, 28, 56)
    model = build_model(
        encoder=None, shape=(3, 1, 28, 56), width=16, depth=1, feature_dim=12, classes=7
    )
    pooled, stages = model.encoder(pictures)
    alone = [model.encoder(pictures[:, frame])[0] for frame in range(3)]
    torch.testing.assert_close(pooled, torch.stack(alone).mean(0))
    assert all(len(stage) == 2 for stage in stages)
