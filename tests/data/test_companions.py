from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cmkd_scale.data.companions import (
    TEACHER_FEATURES,
    TEACHER_INPUTS,
    TEACHER_LABELS,
    UNLABELLED,
    UNLABELLED_WEAK,
    Accompanied,
    CachedSamples,
    TeacherSamples,
)
from cmkd_scale.data.partners import Mode
from cmkd_scale.data.stream import SampleReader
from cmkd_scale.data.teacher_outputs import TeacherOutputs
from cmkd_scale.errors import IntegrityError, UsageError
from cmkd_scale.records import Batch
from tests.data.examples import build_toy
from tests.data.test_loader import NoisyText, make
from tests.data.test_teacher_outputs import write


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> SampleReader:
    return SampleReader(build_toy(tmp_path_factory.mktemp("student")))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> SampleReader:
    return SampleReader(build_toy(tmp_path_factory.mktemp("teacher"), count=40))


def samples(
    reader: SampleReader, mode: Mode = "class_matched", labels: Sequence[int] | None = None
) -> TeacherSamples:
    own: NDArray[np.int64] = (
        reader.labels().astype(np.int64) if labels is None else np.array(labels, dtype=np.int64)
    )
    return TeacherSamples(reader, NoisyText(), own, mode=mode, seed=3, augment=True)


def steps(loader: Accompanied, count: int) -> list[Batch]:
    return list(itertools.islice(loader.batches(), count))


def letters(inputs: torch.Tensor) -> list[str]:
    """The letter of its class that each text of bytes holds."""
    texts = ("".join(chr(byte - 1) for byte in row.tolist() if byte) for row in inputs[:, :-1])
    return [text.rstrip()[-1] for text in texts]


def test_class_matched_samples_have_the_students_classes(
    student: SampleReader, teacher: SampleReader
) -> None:
    loader = Accompanied(make(student), teacher=samples(teacher))
    drawn = set()
    for batch in steps(loader, 20):
        assert torch.equal(batch.beside[TEACHER_LABELS], batch.labels)
        expected = [chr(ord("a") + label) for label in batch.labels.tolist()]
        assert letters(batch.beside[TEACHER_INPUTS]) == expected
        drawn |= {bytes(row.tolist()[:-1]) for row in (batch.beside[TEACHER_INPUTS] % 256)}
    assert len(drawn) > 30  # of 40: not the same few again and again


def test_unpaired_samples_do_not_look_at_the_students_classes(
    student: SampleReader, teacher: SampleReader
) -> None:
    loader = Accompanied(make(student), teacher=samples(teacher, "unpaired"))
    equal, total = 0, 0
    for batch in steps(loader, 50):
        equal += int((batch.beside[TEACHER_LABELS] == batch.labels).sum())
        total += len(batch.labels)
    # One in four by chance: 600 draws lie within five standard deviations.
    assert abs(equal / total - 0.25) < 5 * (0.25 * 0.75 / total) ** 0.5


def test_paired_samples_have_the_students_keys(student: SampleReader) -> None:
    pairs = samples(student, "paired")
    pairs.require_keys([student.key(place) for place in range(len(student))])
    for batch in steps(Accompanied(make(student), teacher=pairs), 10):
        assert torch.equal(batch.inputs[:, :-1], batch.beside[TEACHER_INPUTS][:, :-1])


@pytest.mark.parametrize("mode", ["class_matched", "unpaired", "paired"])
def test_outputs_are_of_the_samples_that_would_be_drawn(
    student: SampleReader, tmp_path: Path, mode: Mode
) -> None:
    """The outputs of a teacher whose features are its inputs."""
    labels = student.labels().astype(np.int64)
    places = np.random.default_rng(0).permutation(len(student))  # other than those of the split
    decoded = torch.stack([NoisyText().decode(student[place].members) for place in places.tolist()])
    write(tmp_path, decoded.float(), places, labels[places], [student.key(p) for p in places])
    cached = CachedSamples(TeacherOutputs(tmp_path), labels[places], mode=mode, seed=3)
    live = TeacherSamples(student, NoisyText(), labels, mode=mode, seed=3, augment=False)
    both = (Accompanied(make(student), teacher=teacher) for teacher in (cached, live))
    for one, other in zip(*(steps(loader, 12) for loader in both), strict=True):
        assert torch.equal(one.beside[TEACHER_FEATURES], other.beside[TEACHER_INPUTS].float())
        assert torch.equal(one.beside[TEACHER_LABELS], other.beside[TEACHER_LABELS])


@settings(max_examples=20, deadline=None)
@given(world=st.integers(1, 4), stop=st.integers(0, 7))
def test_draws_depend_on_the_place_in_the_order_alone(
    student: SampleReader, teacher: SampleReader, world: int, stop: int
) -> None:
    whole = steps(Accompanied(make(student), teacher=samples(teacher)), 8)
    for rank in range(world):
        loader = Accompanied(make(student, rank=rank, world_size=world), teacher=samples(teacher))
        first = steps(loader, stop)
        state = loader.state()
        again = Accompanied(make(student, rank=rank, world_size=world), teacher=samples(teacher))
        again.load_state(state)
        for ours, all_of_it in zip([*first, *steps(again, 8 - stop)], whole, strict=True):
            for name in (TEACHER_INPUTS, TEACHER_LABELS):
                assert torch.equal(ours.beside[name], all_of_it.beside[name][rank::world])


def test_classes_and_keys_that_are_missing_are_named(
    student: SampleReader, teacher: SampleReader
) -> None:
    without_two = [label if label != 2 else -1 for label in teacher.labels().tolist()]
    with pytest.raises(UsageError, match=r"1 of 4 classes have no sample.*\(two\).*data\.mode"):
        samples(teacher, labels=without_two).require_classes(
            {0: "zero", 1: "one", 2: "two", 3: "three"}
        )
    samples(teacher, labels=without_two).require_classes({0: "zero", 3: "three"})
    pairs = samples(teacher, "paired")
    with pytest.raises(UsageError, match=r"20 of 60 samples of the student have no partner"):
        pairs.require_keys([student.key(place) for place in range(len(student))])


def test_classes_that_the_student_lacks_are_never_drawn(
    student: SampleReader, teacher: SampleReader
) -> None:
    without_two = [label if label != 2 else -1 for label in teacher.labels().tolist()]
    loader = Accompanied(make(student), teacher=samples(teacher, "unpaired", without_two))
    found = {int(y) for batch in steps(loader, 30) for y in batch.beside[TEACHER_LABELS]}
    assert found == {0, 1, 3}


def test_a_damaged_sample_of_the_teacher_ends_the_run(
    student: SampleReader, tmp_path: Path
) -> None:
    reader = SampleReader(build_toy(tmp_path, count=40))
    shard = next(tmp_path.rglob("*.tar"))
    content = bytearray(shard.read_bytes())
    content[512] ^= 1  # the first byte of the first sample
    shard.write_bytes(content)
    loader = Accompanied(make(student), teacher=samples(reader))
    with pytest.raises(IntegrityError, match="toy-train-0000"):
        steps(loader, 200)


def test_unlabelled_samples_come_twice_and_have_a_place_of_their_own(
    student: SampleReader, teacher: SampleReader
) -> None:
    def loader() -> Accompanied:
        others = (make(teacher, batch=8, augment=True), make(teacher, batch=8))
        return Accompanied(make(student), unlabelled=others)

    first = loader()
    batches = steps(first, 7)
    for batch in batches:
        strong, weak = batch.beside[UNLABELLED], batch.beside[UNLABELLED_WEAK]
        assert len(strong) == len(weak) == 8
        assert torch.equal(strong[:, :-1], weak[:, :-1])
        assert not torch.equal(strong, weak)
    state = first.state()
    assert (state["position"], state["unlabelled"]["position"]) == (84 - 60, 56 - 40)
    again = loader()
    again.load_state(state)
    (following,) = steps(again, 1)
    expected = steps(loader(), 8)[-1]
    assert following.keys == expected.keys
    assert torch.equal(following.beside[UNLABELLED], expected.beside[UNLABELLED])
    assert first.exchange()["read_retries"] == 0.0
