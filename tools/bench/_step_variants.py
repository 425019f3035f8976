"""What the step benchmarks run: one model and setting, every kind of step, what a memory costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from cmkd_scale.memory.bank import PrototypeMemory
from cmkd_scale.memory.build import build_memory
from cmkd_scale.memory.one_class import Recipe
from cmkd_scale.memory.soft_labels import compress
from cmkd_scale.memory.spool import Spool
from cmkd_scale.memory.spool_part import PassedBatch
from cmkd_scale.memory.statistics import Moments
from cmkd_scale.models.model import Model, build_model
from cmkd_scale.training.alignment_options import AlignmentOptions
from cmkd_scale.training.distillation import Distillation
from cmkd_scale.training.methods import METHODS
from cmkd_scale.training.targets import MemoryTargets
from tools.bench._reference_steps import PairedBatch, ReferenceOptions

ReferenceStep = Callable[[Model, Model, torch.optim.Optimizer, PairedBatch, ReferenceOptions], None]

OPTIONS = ReferenceOptions()
SIZES = (1600, 8000, 100_000)


@dataclass(frozen=True, slots=True)
class Setting:
    """What is trained, and how long."""

    classes: int = 100
    dim: int = 128
    batch: int = 64
    width: int = 64
    depth: int = 2
    """With a width of 64: the first three stages of ResNet-18, which the peers' figures are of."""
    student_shape: tuple[int, int, int] = (1, 40, 64)
    """A log-mel."""
    teacher_shape: tuple[int, int, int] = (1, 28, 56)
    """A picture of two digits."""
    sizes: tuple[int, ...] = SIZES
    """Prototypes of the memories."""
    counted_size: int = 8000
    """The one whose run is counted as a whole."""
    epochs: int = 10
    samples: int = 100_000
    """Of the student, and as many of the teacher."""
    built_classes: int = 10
    """Classes of the memory that is built to measure it."""

    @property
    def steps(self) -> int:
        """Of the run."""
        return self.epochs * math.ceil(self.samples / self.batch)

    def model(self, shape: tuple[int, int, int]) -> Model:
        """A ResNet."""
        return build_model(
            encoder="resnet",
            shape=shape,
            width=self.width,
            depth=self.depth,
            feature_dim=self.dim,
            classes=self.classes,
        )

    def paired_batch(self) -> PairedBatch:
        """Noise: what a step costs does not depend on what is to be seen."""
        return PairedBatch(
            torch.randn(self.batch, *self.student_shape),
            torch.randn(self.batch, *self.teacher_shape),
            torch.randint(self.classes, (self.batch,)),
        )


def random_memory(prototypes: int, classes: int, dim: int) -> PrototypeMemory:
    """A memory of the right shapes: what a step costs does not depend on what it knows."""
    generator = torch.Generator().manual_seed(0)
    per_class = prototypes // classes
    values = torch.randn(prototypes, dim, generator=generator)
    head = torch.randn(classes, dim, generator=generator)
    soft = compress(torch.softmax(values @ head.T / 4.0, 1), keep=classes)
    return PrototypeMemory(
        class_names=tuple(map(str, range(classes))),
        prototypes=values,
        prototype_class=torch.arange(classes).repeat_interleave(per_class),
        prototype_mass=torch.full((prototypes,), 1 / per_class),
        soft_label_values=soft.values,
        soft_label_classes=soft.classes,
        soft_label_rest=soft.rest,
        radius=torch.ones(prototypes),
        class_mean=torch.zeros(classes, dim),
        class_variance=torch.ones(classes, dim),
        class_factor=torch.zeros(classes, 4, dim),
        class_count=torch.full((classes,), 100),
        class_kept=torch.full((classes,), 100),
        class_risk=torch.zeros(classes),
        head_weight=head,
        head_bias=torch.zeros(classes),
        cost_scale=torch.tensor(16.0),
    )


def our_step(setting: Setting, method: str, prototypes: int | None) -> Callable[[], None]:
    """One training step of one of the package's methods."""
    torch.manual_seed(0)
    targets = []
    if prototypes is not None:
        memory = random_memory(prototypes, setting.classes, setting.dim)
        needs = METHODS[method].needs
        targets = [MemoryTargets(memory, steps=1000, options=AlignmentOptions(), needs=needs)]
    module = Distillation(setting.model(setting.student_shape), METHODS[method], targets)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    batch = setting.paired_batch()

    def step() -> None:
        result = module(batch.student_inputs, batch.labels, 0)
        underway = module.start_step([result])
        result.loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), OPTIONS.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        module.finish_step(underway)

    return step


def reference_step(setting: Setting, run: ReferenceStep) -> Callable[[], None]:
    """One training step of the reference, with a live teacher."""
    torch.manual_seed(0)
    student = setting.model(setting.student_shape)
    teacher = setting.model(setting.teacher_shape).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    batch = setting.paired_batch()
    return lambda: run(student, teacher, optimizer, batch, OPTIONS)


def teacher_pass(setting: Setting) -> Callable[[], None]:
    """The teacher's forward pass over one batch of its data."""
    teacher, inputs = setting.model(setting.teacher_shape).eval(), setting.paired_batch()[1]

    @torch.no_grad()
    def run() -> None:
        teacher(inputs)

    return run


def memory_build(setting: Setting) -> Callable[[], None]:
    """From the pass over ``built_classes`` classes to a memory."""
    per_class = setting.samples // setting.classes
    count = per_class * setting.built_classes
    labels = torch.arange(setting.built_classes).repeat(per_class)
    features = torch.randn(count, setting.dim)
    head = torch.randn(setting.classes, setting.dim)
    wanted = max(1, setting.counted_size // setting.classes)
    recipe = Recipe(head, torch.zeros(setting.classes), 4.0, prototypes_per_class=wanted)
    everything, nothing = torch.ones(count, dtype=torch.bool), torch.zeros(0, dtype=torch.int64)

    def run() -> None:
        spool = Spool(setting.dim)
        spool.add(PassedBatch(0, torch.arange(count), labels, features, everything, nothing))
        spool.flush()
        names = list(map(str, range(setting.classes)))
        risk = Moments(setting.classes, 1)
        build_memory(spool, risk, recipe, class_names=names, provenance={})

    return run
