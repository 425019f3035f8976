"""Soft labels of prototypes, cut to their likeliest classes: a table that scales with J, not J C.

At 21,000 classes and 16 prototypes each, the whole table would take 28 GB. The k likeliest
classes are listed; all others share what is left in equal parts. With k = C nothing is cut and
classes stand in their order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from cmkd_scale.memory.bank import PrototypeMemory

MOST_LISTED = 256
"""Classes listed a prototype when a memory is built: up to so many classes nothing is cut."""
_MOST_ENTRIES = 2**22  # probabilities of samples that are held at a time


class SoftLabels(NamedTuple):
    """Probabilities of n rows over C classes."""

    values: Tensor
    """[n, k] float32"""
    classes: Tensor
    """[n, k] int32; an entry of C is empty and has the value 0."""
    rest: Tensor
    """[n] probability of each class that is known and not listed."""

    def dense(self, known: Tensor) -> Tensor:
        """[n, C] probabilities; classes outside ``known`` [C] bool get none but what is listed."""
        table = self.values.new_zeros(len(self.values), len(known) + 1)
        table[:, :-1] = self.rest.unsqueeze(1) * known
        return table.scatter(1, self.classes.long(), self.values)[:, :-1].contiguous()


def compress(probabilities: Tensor, keep: int, known: Tensor | None = None) -> SoftLabels:
    """List the ``keep`` likeliest classes of each row.

    Args:
        probabilities: [n, C], rows that sum to 1.
        keep: classes to list, at most; C or more cuts nothing.
        known: [C] bool, the classes that have a probability; None for all.
    """
    count, classes = probabilities.shape
    if keep >= classes:
        order = torch.arange(classes, dtype=torch.int32).expand(count, -1)
        return SoftLabels(probabilities, order.contiguous(), probabilities.new_zeros(count))
    # Among probabilities of 0, known classes go first: the rest is shared by those that are left.
    ranked = probabilities if known is None else probabilities.masked_fill(~known, -1.0)
    values, listed = ranked.topk(keep, dim=1)
    values = values.clamp(min=0.0)
    left = (classes if known is None else int(known.sum())) - keep
    rest = (1.0 - values.sum(1)).clamp(min=0.0) / max(1, left)
    return SoftLabels(values, listed.int(), rest if left > 0 else torch.zeros_like(rest))


def concatenate(parts: list[SoftLabels]) -> SoftLabels:
    """Rows of all parts, one after the other."""
    return SoftLabels(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def class_soft_labels(memory: PrototypeMemory, classes: Tensor) -> Tensor:
    """Mean soft labels [c, c] of samples of ``classes`` [c], over these classes.

    Args:
        memory: that knows them.
        classes: ascending.
    """
    rows = torch.isin(memory.prototype_class, classes).nonzero()[:, 0]
    soft = SoftLabels(
        memory.soft_label_values[rows],
        memory.soft_label_classes[rows],
        memory.soft_label_rest[rows],
    )
    own = torch.searchsorted(classes, memory.prototype_class[rows])
    mass = memory.prototype_mass[rows].unsqueeze(1)
    table = soft.values.new_zeros(len(classes), len(classes))
    table.index_add_(0, own, mass * soft.dense(memory.class_kept > 0)[:, classes])
    return table / table.sum(1, keepdim=True).clamp(min=1e-12)


def head_says(
    points: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    temperature: float,
    *,
    keep: int,
    known: Tensor | None = None,
) -> SoftLabels:
    """What a head says of single points, such as prototypes: of a mean, not a mean.

    Args:
        points: [n, D]
        head_weight: [C, D]
        head_bias: [C]
        temperature: of the softmax.
        keep: classes to list, see ``compress``.
        known: [C] bool, the classes that have a probability; None for all.
    """
    parts = []
    for rows in points.split(max(1, _MOST_ENTRIES // len(head_bias))):
        logits = torch.addmm(head_bias, rows, head_weight.T) / temperature
        if known is not None:
            logits = logits.masked_fill(~known, -torch.inf)
        parts.append(compress(torch.softmax(logits, 1), keep, known))
    return concatenate(parts)


def mean_probabilities(
    features: Tensor,
    assignment: Tensor,
    count: int,
    head_weight: Tensor,
    head_bias: Tensor,
    temperature: float,
) -> Tensor:
    """What a head says of the samples of each prototype, on average.

    Summed in float64 in the order of the samples, a few rows at a time, so that neither
    threads nor memory decide about the bits.

    Args:
        features: [n, D] samples.
        assignment: [n] prototype of each.
        count: prototypes K; each has a sample.
        head_weight: [C, D]
        head_bias: [C]
        temperature: of the softmax.

    Returns:
        [K, C] float32, rows that sum to 1.
    """
    classes = len(head_bias)
    sums = torch.zeros(count, classes, dtype=torch.float64)
    rows = max(1, _MOST_ENTRIES // classes)
    for some, of in zip(features.split(rows), assignment.split(rows), strict=True):
        logits = torch.addmm(head_bias, some, head_weight.T) / temperature
        sums.index_add_(0, of, torch.softmax(logits, 1).double())
    return (sums / assignment.bincount(minlength=count).unsqueeze(1)).float()
