"""A decoding worker that is killed, wherever it was, ends what it read for at once."""

from __future__ import annotations

import itertools
import multiprocessing
from collections import deque
from collections.abc import Iterator

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from cmkd_scale.data.workers import answers
from cmkd_scale.errors import CmkdError


class Blocks(Dataset[NDArray[np.uint8] | Tensor]):
    """Answers of a size, arrays or (which travel as shared files) tensors."""

    def __init__(self, size: int, *, tensors: bool) -> None:
        self.size = size
        self.tensors = tensors

    def __getitem__(self, number: int) -> NDArray[np.uint8] | Tensor:
        if number < 0:
            raise ValueError(f"no block {number}")
        block = np.full(self.size, number % 251, dtype=np.uint8)
        return torch.from_numpy(block) if self.tensors else block


def decoding() -> list[psutil.Process]:
    """The workers of this process, oldest first."""
    children = multiprocessing.active_children()
    found = [child.pid for child in children if child.name == "decoding" and child.pid]
    return [psutil.Process(pid) for pid in sorted(found)]


# Of a megabyte, no pipe takes a whole answer: the worker is killed while it writes.
@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("size", "tensors"), [(10, False), (2**20, False), (2**20, True)])
def test_a_worker_that_is_killed_is_told_with_the_remedy(
    workers: int, size: int, tensors: bool
) -> None:
    source: Iterator[object] = answers(Blocks(size, tensors=tensors), itertools.count(), workers)
    for _ in range(3):
        next(source)
    victim = decoding()[-1]
    victim.kill()
    expected = f"One of {workers} processes .* by signal 9.* continues from the newest checkpoint"
    with pytest.raises(CmkdError, match=expected):
        deque(source, maxlen=0)  # endless but for that; what had arrived is delivered
    assert not decoding(), "the others end, too"


@pytest.mark.slow
def test_a_fault_of_the_data_set_is_told_in_its_turn() -> None:
    source = answers(Blocks(10, tensors=False), iter([1, 2, -3, 4]), 2)
    assert [int(block[0]) for block in itertools.islice(source, 2)] == [1, 2]
    with pytest.raises(RuntimeError, match="ValueError: no block -3"):
        next(source)


@pytest.mark.slow
def test_answers_keep_the_order_of_requests_and_end_with_them() -> None:
    for workers, count in itertools.product((1, 3), (0, 1, 20)):
        blocks = answers(Blocks(2**17, tensors=False), range(count), workers)
        assert [int(block[0]) for block in blocks] == list(range(count))
    assert not decoding()


@pytest.mark.slow
def test_requests_larger_than_a_pipe_do_not_block_it() -> None:
    request = np.zeros(2**20, dtype=np.uint8)
    source = answers(Echo(), (request for _ in range(8)), 1)
    assert sum(len(block) for block in source) == 8 * 2**20


class Echo(Dataset[NDArray[np.uint8]]):
    """Answers with the request."""

    def __getitem__(self, request: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return request
