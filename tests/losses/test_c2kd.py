from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax
from scipy.stats import kendalltau
from torch import Tensor, nn

from cmkd_scale.losses import c2kd
from cmkd_scale.losses.c2kd import C2KDLoss, kendall_tau
from cmkd_scale.losses.sizes import Sizes

Array = NDArray[np.float64]

SIZES = Sizes(
    classes=6, student_dim=4, teacher_dim=4, student_stages=(3, 5), teacher_stages=(7, 8, 9)
)
BATCH = 7


class Example:
    """A loss, and what the two networks give it."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.loss = C2KDLoss(SIZES)
        self.logits = torch.randn(BATCH, 6, requires_grad=True)
        self.live_logits = torch.randn(BATCH, 6, requires_grad=True)
        self.stages = (torch.randn(BATCH, 3, 8, 8), torch.randn(BATCH, 5, 4, 2, requires_grad=True))
        self.live_stages = (
            torch.randn(BATCH, 4, 7),
            torch.randn(BATCH, 4, 8),
            torch.randn(BATCH, 4, 9, requires_grad=True),
        )
        self.labels = torch.randint(5, (BATCH,))

    def value(self, excluded: Tensor | None = None) -> Tensor:
        out: Tensor = self.loss(
            self.logits, self.live_logits, self.stages, self.live_stages, self.labels, excluded
        )
        return out

    def direct_proxies(self, student: Tensor, teacher: Tensor) -> None:
        """Let the deepest stages [B, C] be the proxies' scores themselves."""
        self.loss.student_proxy = nn.Sequential()
        self.loss.teacher_proxy = nn.Sequential()
        self.stages = (student, student)
        self.live_stages = (teacher, teacher, teacher)


def proxy_reference(proxy: nn.Sequential, pooled: Array) -> Array:
    first, gain, shift, second, bias = (p.detach().double().numpy() for p in proxy.parameters())
    hidden = pooled @ first.T
    spread = np.sqrt(hidden.var(1, keepdims=True) + 1e-5)
    hidden = (hidden - hidden.mean(1, keepdims=True)) / spread * gain + shift
    return np.asarray(np.where(hidden > 0, hidden, 0.1 * hidden) @ second.T + bias)


def divergence(target: Array, scores: Array) -> float:
    return float((softmax(target) * (log_softmax(target) - log_softmax(scores))).sum())


def reference(example: Example, unknown: list[int]) -> float:
    """The loss by its definition, a sample at a time, with unknown classes cut out."""
    deepest, live_deepest = example.stages[-1], example.live_stages[-1]
    proxy = proxy_reference(
        example.loss.student_proxy, deepest.detach().double().numpy().mean((2, 3))
    )
    live_proxy = proxy_reference(
        example.loss.teacher_proxy, live_deepest.detach().double().numpy().mean(1)
    )
    logits = example.logits.detach().double().numpy()
    live_logits = example.live_logits.detach().double().numpy()
    shared = [c for c in range(6) if c not in unknown]
    total = 0.0
    for row, label in enumerate(example.labels.tolist()):
        own, mine = logits[row], proxy[row]
        live, theirs = live_logits[row, shared], live_proxy[row, shared]
        total -= log_softmax(own)[label]
        total += divergence(own, mine) + divergence(mine, own)
        total += divergence(live, theirs) + divergence(theirs, live)
        if label in unknown:
            continue
        total -= log_softmax(live)[shared.index(label)]
        if kendalltau(mine[shared], theirs)[0] > 0:
            others = [c for c in shared if c != label]
            a, b = mine[others], live_proxy[row, others]
            total += divergence(a, b) + divergence(b, a)
    return total / BATCH


@pytest.mark.parametrize("unknown", [[], [5], [1, 3]])
@pytest.mark.parametrize("seed", range(4))
def test_value_against_the_definition(seed: int, unknown: list[int]) -> None:
    example = Example(seed)
    with torch.no_grad():
        example.live_logits[:, unknown] = -1e4
    excluded = torch.tensor([c in unknown for c in range(6)]) if unknown else None
    expected = reference(example, unknown)
    assert example.value(excluded).item() == pytest.approx(expected, rel=1e-5)


def test_gradient_to_the_logits_by_hand() -> None:
    # Targets are constants: what moves the logits is the label and their own proxy.
    example = Example()
    example.value().backward()
    student = torch.softmax(example.loss.student_proxy(example.stages[-1].mean((2, 3))), 1)
    teacher = torch.softmax(example.loss.teacher_proxy(example.live_stages[-1].mean(1)), 1)
    truth = nn.functional.one_hot(example.labels, 6)
    for logits, proxy in ((example.logits, student), (example.live_logits, teacher)):
        p = torch.softmax(logits, 1)
        assert logits.grad is not None
        torch.testing.assert_close(logits.grad, (p - truth + p - proxy) / BATCH)


def test_gradient_to_the_proxies_by_hand() -> None:
    example = Example()
    scores = torch.randn(BATCH, 6)
    student = scores.clone().requires_grad_()
    # Half of the samples are ranked the other way round.
    sign = torch.tensor([1.0, -1.0] * 4)[:BATCH].unsqueeze(1)
    teacher = (2.0 * sign * scores).requires_grad_()
    example.direct_proxies(student, teacher)
    example.value().backward()
    truth = nn.functional.one_hot(example.labels, 6).bool()
    p, q = (
        torch.softmax(side.detach().masked_fill(truth, -torch.inf), 1)
        for side in (student, teacher)
    )
    own = torch.softmax(student, 1) - torch.softmax(example.logits, 1)
    assert student.grad is not None
    expected = (own + (sign > 0) * (p - q)) / BATCH
    torch.testing.assert_close(student.grad, expected.detach())
    live = torch.softmax(teacher, 1) - torch.softmax(example.live_logits, 1)
    assert teacher.grad is not None
    torch.testing.assert_close(teacher.grad, ((live + (sign > 0) * (q - p)) / BATCH).detach())


def test_everything_is_trained_though_no_sample_is_selected() -> None:
    example = Example()
    with torch.no_grad():
        # The last layers of both proxies in opposite order, on equal inputs.
        for proxy, sign in ((example.loss.student_proxy, 1.0), (example.loss.teacher_proxy, -1.0)):
            last = list(proxy.parameters())[-2:]
            last[0].mul_(1e-3)
            last[1].copy_(sign * torch.arange(6.0))
    example.value().backward()
    for parameter in example.loss.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
    for stage in (example.stages[-1], example.live_stages[-1]):
        assert stage.grad is not None
        assert stage.grad.abs().sum() > 0


def test_a_label_that_the_teacher_does_not_know_trains_no_teacher_label() -> None:
    example = Example()
    with torch.no_grad():
        example.live_logits[:, 5] = -1e4
        example.labels[0] = 5
    excluded = torch.tensor([False] * 5 + [True])
    value = example.value(excluded)
    value.backward()
    assert value.item() < 100.0
    assert example.live_logits.grad is not None
    p = torch.softmax(example.live_logits[0], 0)
    proxy = example.loss.teacher_proxy(example.live_stages[-1].mean(1))[0]
    expected = (p - torch.softmax(proxy.masked_fill(excluded, -torch.inf), 0)) / BATCH
    torch.testing.assert_close(example.live_logits.grad[0], expected.detach())
    assert (example.live_logits.grad[:, 5] == 0).all()


def test_classes_unknown_on_one_side_do_not_vote_on_the_selection() -> None:
    example = Example()
    student = torch.tensor([[3.0, 2.0, 1.0, 0.0, -90.0, -90.0]]).repeat(BATCH, 1)
    teacher = torch.tensor([[0.0, 1.0, 2.0, 3.0, -90.0, -90.0]]).repeat(BATCH, 1)
    example.direct_proxies(student.requires_grad_(), teacher)
    with torch.no_grad():
        example.live_logits[:, 4:] = -1e4
    assert kendall_tau(student, teacher)[0] > 0
    example.value(torch.tensor([False] * 4 + [True] * 2)).backward()
    own = (torch.softmax(student, 1) - torch.softmax(example.logits, 1)) / BATCH
    assert student.grad is not None
    torch.testing.assert_close(student.grad, own.detach())


def test_a_batch_may_be_split() -> None:
    example = Example()
    whole = example.value().item()
    one_by_one = []
    for row in range(BATCH):
        part = copy.copy(example)
        one = slice(row, row + 1)
        part.logits, part.live_logits = example.logits[one], example.live_logits[one]
        part.stages = (example.stages[0][one], example.stages[1][one])
        first, second, third = example.live_stages
        part.live_stages = (first[one], second[one], third[one])
        part.labels = example.labels[one]
        one_by_one.append(part.value().item())
    assert np.mean(one_by_one) == pytest.approx(whole, rel=1e-5)


def test_weights_gathered_in_half_precision_are_used_in_float32() -> None:
    example = Example()
    example.loss.bfloat16()
    value = example.value()
    assert value.dtype == torch.float32
    example.loss.float()
    assert value.item() == example.value().item()


@settings(deadline=None, max_examples=50)
@given(
    rows=st.lists(
        st.lists(st.tuples(st.integers(0, 4), st.integers(-3, 3)), min_size=7, max_size=7),
        min_size=1,
        max_size=5,
    )
)
def test_rank_correlation_against_scipy(rows: list[list[tuple[int, int]]]) -> None:
    # Few different numbers, so that there are ties.
    both = torch.tensor(rows, dtype=torch.float32)
    first, second = both[..., 0], both[..., 1]
    expected = [kendalltau(a, b)[0] for a, b in zip(first.numpy(), second.numpy(), strict=True)]
    # A row all of one number has no ranks: NaN there, and 0, not selected, here.
    torch.testing.assert_close(
        kendall_tau(first, second), torch.tensor(np.nan_to_num(expected), dtype=torch.float32)
    )


def test_rank_correlation_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(3, 50, generator=generator)
    second = first + torch.randn(3, 50, generator=generator)
    expected = [kendalltau(a, b)[0] for a, b in zip(first.numpy(), second.numpy(), strict=True)]
    for held in (1, 3 * 50 * 7, 1 << 22):
        monkeypatch.setattr(c2kd, "_COMPARED_AT_ONCE", held)
        assert kendall_tau(first, second).tolist() == pytest.approx(expected, rel=1e-5)
