from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn

from cmkd_scale.data.companions import (
    TEACHER_INPUTS,
    TEACHER_LABELS,
    UNLABELLED,
    UNLABELLED_WEAK,
)
from cmkd_scale.losses import LOSSES, Sizes
from cmkd_scale.memory.alignment import align_to_student
from cmkd_scale.memory.bank import PrototypeMemory
from cmkd_scale.models.model import Model
from cmkd_scale.training.alignment_options import AlignmentOptions
from cmkd_scale.training.distillation import Distillation
from cmkd_scale.training.live_teacher import LiveTeacher
from cmkd_scale.training.method_checks import resolve_method
from cmkd_scale.training.methods import METHODS
from cmkd_scale.training.projectors import make_projector
from cmkd_scale.training.targets import MemoryTargets
from tests.memory.examples import example_memory

BATCH, INPUT, CLASSES, DIM = 12, 10, 6, 8
NAMES = tuple(f"class {i}" for i in range(CLASSES))


class Encoder(nn.Module):
    """A linear encoder: small enough to differentiate by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(INPUT, 16)

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        pooled = torch.tanh(self.layer(inputs))
        return pooled, (pooled,)


def network(dim: int = DIM) -> Model:
    return Model(Encoder(), encoder_dim=16, feature_dim=dim, classes=CLASSES)


def make(
    name: str,
    *memories: PrototypeMemory,
    dim: int = DIM,
    weights: dict[str, float] | None = None,
    trust: Sequence[float] = (),
) -> Distillation:
    torch.manual_seed(0)
    model = network(dim)
    method = resolve_method(name, weights or {})
    if method.live:
        return Distillation(
            model,
            method,
            live=LiveTeacher(network(), NAMES, NAMES, learns=method.trains_teacher),
            cohort=[network(dim) for _ in range(1, method.students)],
            sizes=Sizes(CLASSES, dim, DIM, (16,), (16,)),
        )
    if not method.needs_memory:
        return Distillation(model, method)
    targets = [
        MemoryTargets(memory, steps=10, options=AlignmentOptions(), needs=method.needs)
        for memory in memories or (example_memory(),)
    ]
    return Distillation(model, method, targets, trust=trust)


def trained_weights(name: str) -> set[str]:
    return {component for component, weight in METHODS[name].weights.items() if weight > 0}


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(BATCH, INPUT, generator=generator)
    return inputs, torch.randint(CLASSES, (BATCH,), generator=generator)


def beside() -> dict[str, torch.Tensor]:
    """What a step may read beside its batch."""
    generator = torch.Generator().manual_seed(2)
    names = (TEACHER_INPUTS, UNLABELLED, UNLABELLED_WEAK)
    inputs = {name: torch.randn(BATCH, INPUT, generator=generator) for name in names}
    return {**inputs, TEACHER_LABELS: batch()[1]}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_loss_is_the_sum_of_its_components(name: str) -> None:
    module = make(name)
    result = module(*batch(), 0, beside())
    assert set(result.components) == trained_weights(name)
    assert result.loss.item() == pytest.approx(sum(map(float, result.components.values())))
    result.loss.backward()
    for parameter in module.model.parameters():
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_only_the_student_is_trained(name: str) -> None:
    module = make(name)
    trained = {key for key, value in module.named_parameters() if value.requires_grad}
    parts = {key.partition(".")[0] for key in trained}
    method = METHODS[name]
    assert parts - {"parts"} == {
        "model",
        *(["cohort"] if method.students > 1 else []),
        *(["live"] if method.trains_teacher else []),
    }
    assert ("parts" in parts) == (name in ("c2kd", "norm", "review_kd"))


@pytest.mark.parametrize("name", [name for name in sorted(METHODS) if METHODS[name].live])
def test_a_teacher_runs_beside_the_student_and_is_no_part_of_it(name: str) -> None:
    module = make(name)
    held = [key for key in module.state_dict() if key.startswith("live.")]
    assert bool(held) == METHODS[name].trains_teacher
    before = beside()[TEACHER_INPUTS].clone()
    module(*batch(), 0, beside()).loss.backward()
    assert isinstance(module.live, LiveTeacher)
    for teacher in module.live._frozen:
        assert not teacher.training
        assert all(parameter.grad is None for parameter in teacher.parameters())
    assert torch.equal(before, beside()[TEACHER_INPUTS])


def test_trust_scales_every_term_of_a_teacher() -> None:
    full, half, none = (
        make("ucmkd_global", trust=[trust])(*batch(), 0).components for trust in (1.0, 0.5, 0.0)
    )
    for name in full:
        if name == "smoothed_cross_entropy":
            continue
        # The first step's plan does not depend on trust: potentials are zero.
        torch.testing.assert_close(half[name], 0.5 * full[name])
        assert none[name] == 0.0


@pytest.mark.parametrize("name", ["coral", "mmd", "kd_memory", "robust_cmkd", "socket"])
def test_without_trust_no_row_of_a_memory_learns_from_it(name: str) -> None:
    none = make(name, trust=[0.0])(*batch(), 0, beside()).components
    full = make(name, trust=[1.0])(*batch(), 0, beside()).components
    own = {"smoothed_cross_entropy", "information_maximisation", "centroid_pseudo_label"}
    for component in set(full) - own:
        assert none[component] == 0.0
        assert full[component] > 0.0


def test_a_teacher_without_trust_leaves_the_student_to_its_labels() -> None:
    guarded, plain = make("ucmkd_global", trust=[0.0]), make("ce_ls")
    for module in (guarded, plain):
        module(*batch(), 0).loss.backward()
    for ours, theirs in zip(guarded.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]


def test_trust_is_shared_out_between_teachers() -> None:
    module = make("ucmkd_global", example_memory(), example_memory(), trust=[0.75, 0.25])
    torch.testing.assert_close(
        module.class_share, torch.tensor([[0.5625], [0.1875]]).expand(2, CLASSES)
    )
    one = make("ucmkd_global", example_memory(), example_memory(), trust=[1.0, 0.0])
    torch.testing.assert_close(one.class_share, torch.tensor([[1.0], [0.0]]).expand(2, CLASSES))


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
        soft[i] = plan @ memory.soft_label_values[own].double()
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
    (outgoing,) = result.outgoing
    assert float(outgoing.sums.abs().sum()) == 0.0


def test_finishing_a_step_moves_potentials_and_statistics() -> None:
    module = make("ucmkd_global")
    (targets,) = module.memories
    before = targets.potentials.value.clone()
    module.finish_step(module.start_step([module(*batch(), 0)]))
    measures = module.measures(0)
    assert 0 < float(measures["alignment_marginal_error"]) < 2
    assert float(measures["alignment_distance/transport"]) > 0
    assert measures["alignment_wrong_class_mass"] == 0
    assert not torch.equal(targets.potentials.value, before)
    assert targets.statistics is not None
    assert len(targets.statistics.recent()[0]) == BATCH
    without = make("ce")
    without.finish_step(without.start_step([without(*batch(), 0)]))
    assert without.measures(0) == {}


def test_potentials_and_statistics_are_saved_and_the_memory_is_not() -> None:
    saved = {key for key in make("ucmkd_global").state_dict() if not key.startswith("model.")}
    potentials = {"value", "average", "seen", "recent", "updates"}
    statistics = {"weight", "mean", "variance", "ring", "ring_labels", "ring_steps", "written"}
    assert saved == {f"targets.0.potentials.{name}" for name in potentials} | {
        f"targets.0.statistics.{name}" for name in statistics
    }


@pytest.mark.parametrize("dim", [4, 12])
def test_a_projector_bridges_widths_and_carries_the_head_across(dim: int) -> None:
    memory = example_memory()
    module = make("ucmkd_global", memory, dim=dim)
    (projector,) = module.projectors
    inputs, _ = batch()
    output = module.model(inputs)
    # The student's head says of its features what the teacher's says of the projected ones.
    expected = projector(output.features) @ memory.head_weight.T + memory.head_bias
    torch.testing.assert_close(output.logits, expected, atol=1e-4, rtol=1e-4)
    result = module(*batch(), 0)
    assert float(result.components["head_pull"]) == pytest.approx(0.0, abs=1e-8)
    result.loss.backward()
    assert isinstance(projector, nn.Linear)
    assert projector.weight.grad is not None
    assert float(projector.weight.grad.abs().sum()) > 0
    assert {"projectors.0.weight", "projectors.0.bias"} <= set(module.state_dict())


@pytest.mark.parametrize("component", sorted(name for name in LOSSES if LOSSES[name].by_teacher))
def test_a_projector_is_trained_if_a_loss_has_a_gradient_through_it(component: str) -> None:
    # Under DDP a trained parameter without a gradient ends the run.
    off = dict.fromkeys(METHODS["ucmkd_global"].weights, 0.0)
    if component in off:
        weights = {**off, component: 1.0, "smoothed_cross_entropy": 1.0}
        module = make("ucmkd_global", dim=12, weights=weights)
    else:
        module = make("kd_memory", dim=12)
    module(*batch(), 0).loss.backward()
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name


def test_a_projector_keeps_the_size_of_features() -> None:
    # Features of unit mean square, as the model's last norm gives them.
    narrow, wide = make_projector(8, 32), make_projector(32, 8)
    unit = torch.nn.functional.layer_norm(torch.randn(500, 8), (8,))
    assert float(narrow(unit).detach().square().mean()) == pytest.approx(1.0, rel=1e-4)
    unit = torch.nn.functional.layer_norm(torch.randn(500, 32), (32,))
    assert float(wide(unit).detach().square().mean()) == pytest.approx(1.0, rel=0.15)


def test_the_same_memory_twice_teaches_what_it_teaches_once_in_its_own_space() -> None:
    memory = example_memory()
    once, twice = make("ucmkd_global", memory), make("ucmkd_global", memory, memory)
    second = twice.projectors[1]
    assert isinstance(second, nn.Linear)
    nn.init.eye_(second.weight)
    for module in (once, twice):
        module.model.head.load_state_dict({"weight": memory.head_weight, "bias": memory.head_bias})
    one, other = once(*batch(), 0), twice(*batch(), 0)
    torch.testing.assert_close(one.loss, other.loss, rtol=1e-5, atol=1e-5)
    for name, value in one.components.items():
        torch.testing.assert_close(value, other.components[name], rtol=1e-4, atol=1e-5)


def test_memories_are_fused_by_class_with_what_each_knows() -> None:
    names = [f"class {label}" for label in range(CLASSES)]
    whole = example_memory()
    # One teacher that knows the first three classes only, one that knows all.
    part = align_to_student(align_to_student(whole, names[:3]), names)
    module = make("kd_memory", part, whole)
    assert module.class_share.T.tolist() == [[0.5, 0.5]] * 3 + [[0.0, 1.0]] * 3
    alone = make("kd_memory", whole)
    inputs, _ = batch()
    labels = torch.full((BATCH,), 4)
    pair, single = (m(inputs, labels, 0).components["class_soft_label"] for m in (module, alone))
    torch.testing.assert_close(pair, single)


def test_the_gaussian_distance_trains_once_there_are_moments() -> None:
    module = make("ucmkd_global", weights={"class_bures": 1.0})
    inputs, labels = batch()
    labels = labels % 2
    first = module(inputs, labels, 0)
    assert float(first.components["class_bures"]) == pytest.approx(0.0, abs=1e-6)
    for step in range(3):
        module.finish_step(module.start_step([module(inputs, labels, step)]))
    later = module(inputs, labels, 3)
    assert float(later.components["class_bures"]) > 0.1


def test_mixed_precision_leaves_memory_and_losses_in_float32() -> None:
    module = make("ucmkd_global")
    exact = module(*batch(), 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = module(*batch(), 0)
    assert mixed.loss.dtype == torch.float32
    (outgoing,) = mixed.outgoing
    # Each of 12 samples sends a mass of exactly 1, which bfloat16 would round.
    assert float(outgoing.sums[:-3].sum()) == pytest.approx(24.0, abs=1e-4)
    assert mixed.loss.item() == pytest.approx(exact.loss.item(), rel=0.05)
