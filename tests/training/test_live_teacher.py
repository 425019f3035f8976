from __future__ import annotations

import pytest
import torch

from cmkd_scale.errors import UsageError
from cmkd_scale.models.encoders import FeatureEncoder
from cmkd_scale.models.model import Model
from cmkd_scale.training.live_teacher import CachedTeacher, LiveTeacher

TEACHER = ("a", "b", "c", "d")


def model() -> Model:
    torch.manual_seed(0)
    return Model(
        FeatureEncoder(size=6, width=16, depth=1), encoder_dim=16, feature_dim=8, classes=4
    )


def test_scores_come_in_the_students_classes() -> None:
    teacher = LiveTeacher(model(), TEACHER, ("d", "x", "a"))
    inputs = torch.randn(5, 2, 3)
    values = teacher(inputs, torch.zeros(5, dtype=torch.int64))
    plain = model()(inputs)
    logits = values["live_logits"]
    assert isinstance(logits, torch.Tensor)
    torch.testing.assert_close(logits[:, [0, 2]], plain.logits[:, [3, 0]])
    assert (logits.softmax(1)[:, 1] == 0).all()
    torch.testing.assert_close(values["live_features"], plain.features)
    assert torch.equal(values["excluded"], torch.tensor([False, True, False]))


def test_its_head_is_read_on_other_features_with_a_gradient_to_them_alone() -> None:
    teacher = LiveTeacher(model(), TEACHER, TEACHER, learns=True)
    features = torch.randn(3, 8, requires_grad=True)
    scores = teacher.read_head(features)
    torch.testing.assert_close(scores, model().head(features))
    scores.sum().backward()
    assert features.grad is not None
    assert teacher.model.head.weight.grad is None


def test_no_common_class_is_refused() -> None:
    with pytest.raises(UsageError, match="no class name in common"):
        LiveTeacher(model(), TEACHER, ("e", "f"))


def test_what_it_has_said_stands_for_it() -> None:
    names = ("d", "x", "a")
    inputs, labels = torch.randn(5, 2, 3), torch.tensor([0, 2, 2, 0, 2])
    live = LiveTeacher(model(), TEACHER, names)
    said, head = model().eval()(inputs), model().head
    cached = CachedTeacher(head.weight.detach(), head.bias.detach(), TEACHER, names)
    values = cached(said.features.detach(), said.logits.detach(), labels)
    assert values.keys() <= CachedTeacher.provides
    assert LiveTeacher.provides - CachedTeacher.provides == {"live_stages"}
    torch.testing.assert_close(values, {name: live(inputs, labels)[name] for name in values})
    features = torch.randn(3, 8)
    torch.testing.assert_close(cached.read_head(features), live.read_head(features))
    assert (cached.feature_dim, list(cached.parameters()), cached.state_dict()) == (8, [], {})


@pytest.mark.parametrize("learns", [False, True])
def test_only_one_that_learns_is_a_part_of_the_module(learns: bool) -> None:
    teacher = LiveTeacher(model(), TEACHER, TEACHER, learns=learns)
    assert bool(list(teacher.parameters())) == learns
    assert bool(teacher.state_dict()) == learns
    values = teacher.train()(torch.randn(2, 2, 3), torch.zeros(2, dtype=torch.int64))
    features = values["live_features"]
    assert isinstance(features, torch.Tensor)
    assert features.requires_grad == learns
