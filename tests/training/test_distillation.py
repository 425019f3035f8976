from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from cmkd_scale.errors import UsageError
from cmkd_scale.memory.bank import PrototypeMemory, align_to_student
from cmkd_scale.models.model import Model
from cmkd_scale.training.distillation import Distillation
from cmkd_scale.training.methods import METHODS
from cmkd_scale.training.targets import MemoryTargets
from tests.memory.examples import example_memory

BATCH, INPUT, CLASSES, DIM = 12, 10, 6, 8


class Encoder(nn.Module):
    """A linear encoder: small enough to differentiate by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(INPUT, 16)

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        pooled = torch.tanh(self.layer(inputs))
        return pooled, (pooled,)


def make_targets(memory: PrototypeMemory, dim: int = DIM) -> MemoryTargets:
    return MemoryTargets(
        memory,
        feature_dim=dim,
        steps=10,
        epsilon_start=0.1,
        epsilon_end=0.02,
        potential_rate=0.1,
    )


def make(name: str, memory: PrototypeMemory | None = None) -> Distillation:
    torch.manual_seed(0)
    model = Model(Encoder(), encoder_dim=16, feature_dim=DIM, classes=CLASSES)
    method = METHODS[name]
    targets = None
    if method.needs_memory:
        targets = make_targets(example_memory() if memory is None else memory)
    return Distillation(model, method, targets)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(BATCH, INPUT, generator=generator)
    return inputs, torch.randint(CLASSES, (BATCH,), generator=generator)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_loss_is_the_sum_of_its_components(name: str) -> None:
    module = make(name)
    result = module(*batch(), 0)
    assert set(result.components) == set(METHODS[name].weights)
    assert result.loss.item() == pytest.approx(sum(map(float, result.components.values())))
    result.loss.backward()
    for parameter in module.model.parameters():
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_only_the_student_is_trained(name: str) -> None:
    module = make(name)
    trained = {key for key, value in module.named_parameters() if value.requires_grad}
    assert all(key.startswith("model.") for key in trained)


def test_components_against_their_definitions() -> None:
    memory = example_memory()
    module = make("ucmkd_global", memory)
    inputs, labels = batch()
    result = module(inputs, labels, 0)
    with torch.no_grad():
        output = module.model(inputs)
    features = output.features.double()
    transported, soft = torch.zeros(BATCH), torch.zeros(BATCH, CLASSES).double()
    for i in range(BATCH):
        own = memory.prototype_class == labels[i]
        cost = (features[i] - memory.prototypes[own].double()).norm(dim=1) / memory.cost_scale
        plan = torch.softmax(-cost / 0.1 + memory.prototype_mass[own].double().log(), 0)
        transported[i] = (plan * cost).sum()
        soft[i] = plan @ memory.soft_labels[own].double()
    weights = METHODS["ucmkd_global"].weights
    teacher_logits = features.float() @ memory.head_weight.T + memory.head_bias
    kl = nn.KLDivLoss(reduction="batchmean")
    expected = {
        "smoothed_cross_entropy": nn.CrossEntropyLoss(label_smoothing=0.1)(output.logits, labels),
        "transport_cost": transported.mean(),
        "teacher_head": nn.functional.cross_entropy(teacher_logits, labels),
        "transported_soft_label": 16 * kl(torch.log_softmax(output.logits / 4, 1), soft.float()),
        "teacher_head_soft_label": 16 * kl(torch.log_softmax(teacher_logits / 4, 1), soft.float()),
        "head_pull": torch.zeros(()),
    }
    for name, value in expected.items():
        torch.testing.assert_close(
            result.components[name], weights[name] * value.float(), atol=1e-4, rtol=1e-4
        )


def test_the_students_gradient_depends_on_the_teachers_head() -> None:
    memory = example_memory()
    other = replace(memory, head_weight=memory.head_weight.flip(0))
    gradients = []
    for teacher in (memory, other):
        module = make("ucmkd_global", teacher)
        # Equal heads, so that the teacher's is the only difference.
        nn.init.eye_(module.model.head.weight)
        result = module(*batch(), 0)
        result.loss.backward()
        weight = module.model.encoder.layer.weight  # type: ignore[union-attr]
        assert isinstance(weight.grad, torch.Tensor)
        gradients.append(weight.grad.clone())
    assert not torch.allclose(gradients[0], gradients[1], rtol=1e-2)


def test_the_head_starts_as_the_teachers_where_it_knows_the_class() -> None:
    names = ("class 5", "new", "class 1", "class 2", "class 3", "class 4")
    memory = align_to_student(example_memory(), names)
    head = make("ucmkd_global", memory).model.head
    assert torch.equal(head.weight[0], memory.head_weight[0])
    assert not torch.equal(head.weight[1], memory.head_weight[1])
    assert not torch.equal(make("kd_memory", memory).model.head.weight[0], memory.head_weight[0])


def test_classes_unknown_to_the_teacher_train_by_their_labels_alone() -> None:
    names = ("new", *(f"class {label}" for label in range(1, 6)))
    memory = align_to_student(example_memory(), names)
    module = make("ucmkd_global", memory)
    inputs, _ = batch()
    result = module(inputs, torch.zeros(BATCH, dtype=torch.int64), 0)
    taught = {name for name, value in result.components.items() if float(value) != 0.0}
    assert taught == {"smoothed_cross_entropy"}
    assert result.received is not None
    assert float(result.received.sum()) == 0.0


def test_finishing_a_step_moves_the_potentials() -> None:
    module = make("ucmkd_global")
    assert module.targets is not None
    before = module.targets.potentials.value.clone()
    measures = module.finish_step(module(*batch(), 0).received)
    assert 0 < float(measures["alignment_marginal_error"]) < 2
    assert not torch.equal(module.targets.potentials.value, before)
    assert make("ce").finish_step(None) == {}


def test_the_potentials_are_saved_and_the_memory_is_not() -> None:
    saved = {key for key in make("ucmkd_global").state_dict() if not key.startswith("model.")}
    assert saved == {"targets.potentials.value"}


def test_widths_that_differ_are_refused_with_the_remedy() -> None:
    with pytest.raises(UsageError, match=r"model\.feature_dim=8"):
        make_targets(example_memory(), dim=16)


def test_mixed_precision_leaves_memory_and_losses_in_float32() -> None:
    module = make("ucmkd_global")
    exact = module(*batch(), 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = module(*batch(), 0)
    assert mixed.loss.dtype == torch.float32
    assert mixed.received is not None
    # Each of 12 samples sends a mass of exactly 1, which bfloat16 would round.
    assert float(mixed.received.sum()) == pytest.approx(24.0, abs=1e-4)
    assert mixed.loss.item() == pytest.approx(exact.loss.item(), rel=0.05)
