"""The bilevel update against a plain transcription of the published one, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cmkd_scale.data.companions import TEACHER_INPUTS, TEACHER_LABELS
from cmkd_scale.models.model import Model, build_model
from cmkd_scale.training.distillation import Distillation
from cmkd_scale.training.engine import Engine, Options
from cmkd_scale.training.live_teacher import LiveTeacher
from cmkd_scale.training.method_checks import resolve_method
from tests.conftest import REPOSITORY, Launch
from tools.bench import _reference_steps as reference
from tools.bench._reference_steps import PairedBatch, ReferenceOptions

CLASSES, DIM, BATCH, STEPS = 5, 16, 12, 5
NAMES = tuple(f"class {i}" for i in range(CLASSES))
LEARNING_RATE, WEIGHT_DECAY = 1e-2, 0.05
OPTIONS = Options(
    global_batch_size=BATCH,
    parts=1,
    weight_decay=WEIGHT_DECAY,
    layer_decay=1.0,
    clip=5.0,
    ema_decay=None,
)


def small_model(shape: tuple[int, int, int], seed: int) -> Model:
    torch.manual_seed(seed)
    return build_model(
        encoder="resnet", shape=shape, width=8, depth=1, feature_dim=DIM, classes=CLASSES
    ).double()


def batches() -> list[PairedBatch]:
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(BATCH, *shape, generator=generator, dtype=torch.float64)

    return [
        PairedBatch(
            draw(1, 12, 16), draw(1, 14, 10), torch.randint(CLASSES, (BATCH,), generator=generator)
        )
        for _ in range(STEPS)
    ]


def ours(name: str, teacher: Model, count: int = STEPS) -> Distillation:
    """The student after some steps through the engine."""
    module = Distillation(
        small_model((1, 12, 16), 0),
        resolve_method(name, {}),
        live=LiveTeacher(copy.deepcopy(teacher), NAMES, NAMES),
    ).double()
    engine = Engine()
    engine.prepare(module, OPTIONS)
    for step, batch in enumerate(batches()[:count]):
        beside = {TEACHER_INPUTS: batch.teacher_inputs, TEACHER_LABELS: batch.labels}
        stepped = engine.step(
            batch.student_inputs, batch.labels, step, beside, learning_rate=LEARNING_RATE
        )
        assert stepped.applied
    return module


def published(teacher: Model) -> Model:
    """The same by the transcription: copy, inner steps, outer gradient, copy back."""
    student = small_model((1, 12, 16), 0)
    matrices = [p for p in student.parameters() if p.ndim > 1]
    vectors = [p for p in student.parameters() if p.ndim <= 1]
    # The outer optimizer is no part of the algorithm; it is the one of this program.
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": WEIGHT_DECAY},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=(0.9, 0.98),
    )
    for batch in batches():
        with pytest.MonkeyPatch.context() as patch:
            # Labels are smoothed in both losses, as in the release for its first data set.
            patch.setattr(reference, "label_alignment", smoothed_label_alignment)
            adapted = reference.adapt(student, teacher, batch, ReferenceOptions())
        adapted.zero_grad()
        logits = adapted(batch.student_inputs).logits
        functional.cross_entropy(logits, batch.labels, label_smoothing=0.1).backward()
        for own, other in zip(student.parameters(), adapted.parameters(), strict=True):
            own.grad = None if other.grad is None else other.grad.clone()
        nn.utils.clip_grad_norm_(student.parameters(), 5.0)
        optimizer.step()
    return student


def smoothed_label_alignment(logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    kappa = teacher_logits.softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)
    own = functional.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
    theirs = functional.cross_entropy(teacher_logits, labels, reduction="none")
    return (own - kappa * theirs).mean()


def flat(parameters: object) -> Tensor:
    return torch.cat([p.detach().flatten() for p in parameters])  # type: ignore[attr-defined]


def teacher_model(head_seed: int = 1) -> Model:
    teacher = small_model((1, 14, 10), 1).eval()
    torch.manual_seed(head_seed)
    nn.init.normal_(teacher.head.weight, std=0.5)
    return teacher


def test_the_reference_row_is_the_published_update() -> None:
    teacher = teacher_model()
    student = published(teacher)
    trained = ours("ucmkd_reference", teacher).model
    start = flat(small_model((1, 12, 16), 0).parameters())
    assert (flat(student.parameters()) - start).abs().max() > 1e-2
    torch.testing.assert_close(
        flat(trained.parameters()), flat(student.parameters()), rtol=0.0, atol=1e-8
    )


def test_the_inner_steps_matter() -> None:
    # Else the row above would be plain cross-entropy, and its test would prove nothing.
    teacher = teacher_model()
    plain = ours("ce_ls", teacher).model
    trained = ours("ucmkd_reference", teacher).model
    assert (flat(trained.parameters()) - flat(plain.parameters())).abs().max() > 1e-6


@pytest.mark.parametrize(
    ("name", "component", "depends"),
    [
        ("ucmkd_reference", "constant_label_gap", False),
        ("ucmkd_fixed", "taught_label_gap", True),
    ],
)
def test_whether_the_label_terms_gradient_depends_on_the_teacher(
    name: str, component: str, depends: bool
) -> None:
    batch = batches()[0]
    beside = {TEACHER_INPUTS: batch.teacher_inputs, TEACHER_LABELS: batch.labels}
    gradients = []
    for head_seed in (1, 2):
        live = LiveTeacher(teacher_model(head_seed), NAMES, NAMES)
        student = small_model((1, 12, 16), 0)
        module = Distillation(student, resolve_method(name, {}), live=live).double()
        loss = module(batch.student_inputs, batch.labels, 0, beside, inner=component).loss
        found = torch.autograd.grad(loss, list(student.parameters()), allow_unused=True)
        gradients.append(flat([g for g in found if g is not None]))
    assert torch.equal(*gradients) != depends


def test_the_students_own_weights_come_back_after_the_inner_steps() -> None:
    teacher = teacher_model()
    module = ours("ucmkd_fixed", teacher, count=0)
    from cmkd_scale.training.updates import Bilevel

    batch = batches()[0]
    beside = {TEACHER_INPUTS: batch.teacher_inputs, TEACHER_LABELS: batch.labels}
    before = flat(module.parameters())
    with Bilevel(module).adapted(batch.student_inputs, batch.labels, 0, beside):
        assert (flat(module.parameters()) - before).abs().max() > 1e-4
    assert torch.equal(flat(module.parameters()), before)


@pytest.mark.multirank
def test_two_ranks_adapt_as_one(launch: Launch) -> None:
    script = REPOSITORY / "tests" / "scripts" / "bilevel.py"
    sums = [launch(script, processes=world).stdout.split()[-1] for world in (1, 2)]
    assert float(sums[0]) == pytest.approx(float(sums[1]), rel=1e-9)
