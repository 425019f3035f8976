"""A fast checksum of tensors, to notice that ranks no longer hold the same bits.

Not against malice, as the digest of a memory's file is: against a machine whose memory has
flipped a bit, or a library that computes otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_CHUNK = 1 << 18  # elements
_ODD = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio
_MASK = 2**63 - 1


def checksum(tensors: Iterable[Tensor]) -> int:
    """A number below 2^63 that any changed bit of any tensor changes.

    Each word is multiplied by an odd number of its place and added, modulo 2^64: exact, so the
    same on every device.
    """
    total = 0
    for tensor in tensors:
        sums = [_chunk_sum(chunk) for chunk in _words(tensor).split(_CHUNK)]
        for value in torch.stack(sums).tolist() if sums else []:
            total = (total * 31 + value + 1) * _ODD % 2**64
    return total & _MASK


def _words(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().flatten()
    if flat.element_size() == 1:
        return flat.view(torch.uint8).to(torch.int32)
    return flat.view(torch.int16 if flat.element_size() == 2 else torch.int32)


def _chunk_sum(words: Tensor) -> Tensor:
    odd = 2 * torch.arange(len(words), device=words.device) + 1
    return (words.long() * odd).sum()
