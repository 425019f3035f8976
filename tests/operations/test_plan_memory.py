from __future__ import annotations

from dataclasses import replace

import pytest

from cmkd_scale.operations.plan_memory import BACKENDS, Sizes, advise, rank_memory

BILLION = 10**9
SIZES = Sizes(
    parameters=BILLION,
    root_parameters=BILLION // 100,
    largest_block=BILLION // 50,
    frozen_bytes=0,
    activation_bytes=0,
    evaluation_bytes=0,
    averaged=False,
    blob_bytes=0,
    gather_bytes=4,
    runtime_bytes=0,
    context_bytes=0,
    cached_bytes=0,
)


def states(backend: str, world: int) -> float:
    """Weights, gradients and moments in GB, without what a backend keeps beside them."""
    device = rank_memory(SIZES, backend, world).device
    return sum(device.get(name, 0) for name in ("parameters", "gradients", "moments")) / 1e9


@pytest.mark.parametrize(
    ("backend", "gigabytes"),
    # Rajbhandari et al. 2020, figure 1, with K = 8 for float32 weights: 4 + 4 + 8 bytes.
    [
        ("ddp", 16.0),
        ("zero1", 4 + 4 + 8 / 64),
        ("zero2", 4 + (4 + 8) / 64),
        ("zero3", 16 / 64),
        ("fsdp2", 16 / 64),
    ],
)
def test_states_are_cut_up_as_the_stages_say(backend: str, gigabytes: float) -> None:
    assert states(backend, 64) == pytest.approx(gigabytes)


def test_evaluation_comes_when_activations_are_gone() -> None:
    sizes = replace(SIZES, activation_bytes=10 * BILLION, evaluation_bytes=5 * BILLION)
    assert rank_memory(sizes, "single", 1).device_bytes == 26 * BILLION
    sizes = replace(sizes, evaluation_bytes=11 * BILLION)
    assert rank_memory(sizes, "ddp", 2).device_bytes == 27 * BILLION


def test_a_checkpoint_holds_weights_moments_average_and_memory() -> None:
    assert SIZES.checkpoint_bytes == 12 * BILLION
    assert replace(SIZES, averaged=True, blob_bytes=7).checkpoint_bytes == 16 * BILLION + 7
    assert rank_memory(SIZES, "ddp", 2).host["checkpoint"] == 12 * BILLION


def test_what_is_frozen_has_neither_gradient_nor_moments() -> None:
    frozen = replace(SIZES, parameters=BILLION // 100, kept_bytes=4 * BILLION)
    assert rank_memory(frozen, "ddp", 2).device_bytes == 4 * BILLION + 16 * BILLION // 100
    assert frozen.checkpoint_bytes == 4 * BILLION + 12 * BILLION // 100


def test_offload_moves_to_the_host() -> None:
    near, far = (rank_memory(SIZES, name, 4) for name in ("zero3", "zero3_offload"))
    assert near.bytes == far.bytes
    assert far.device_bytes < near.device_bytes


def test_the_first_that_fits_is_advised() -> None:
    sizes = {name: rank_memory(SIZES, name, 64).device_bytes for name in BACKENDS}
    plenty = 20 * max(sizes.values())
    assert advise(SIZES, 64, plenty, shared=False) == "ddp"
    assert advise(SIZES, 1, plenty, shared=False) == "single"
    less = int(sizes["ddp"] / 0.9) - 1
    assert advise(SIZES, 64, less, shared=False) not in ("ddp", None)
    assert advise(SIZES, 64, 1000, shared=False) is None
    # A machine's memory holds the checkpoint, too.
    enough = int(sizes["ddp"] / 0.9) + 1
    assert advise(SIZES, 64, enough, shared=False) == "ddp"
    assert advise(SIZES, 64, enough, shared=True) != "ddp"
