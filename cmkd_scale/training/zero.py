"""The door to DeepSpeed: ZeRO stages 1 to 3 (Rajbhandari et al. 2020), whole tensors out and in.

Its parameters stay float32 (mixed precision is autocast, as elsewhere), so what is trained is
what is saved. A gradient that is not finite makes DeepSpeed leave the update out by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from deepspeed.utils import safe_get_local_optimizer_state
from torch import Tensor, nn

from cmkd_scale import distributed
from cmkd_scale.training.backends import MOMENTS, STEP, Backend, by_parameter


class Zero(Backend):
    """A DeepSpeed engine."""

    def __init__(self, module: nn.Module, engine: Any) -> None:
        """Take what ``deepspeed.initialize`` has made of ``module`` and torch's AdamW."""
        super().__init__(module, engine.optimizer.optimizer)
        self.wrapped = engine
        self.engine = engine
        self.stage = int(engine.zero_optimization_stage())

    @contextmanager
    def _boundary(self, last: bool) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(is_boundary=last)
        yield

    def part(self, last: bool) -> AbstractContextManager[None]:
        """See ``Backend``."""
        return self._boundary(last)

    def backward(self, loss: Tensor, parts: int) -> None:
        """See ``Backend``; DeepSpeed divides by the number of parts itself."""
        self.engine.backward(loss)

    def update(self, clip: float) -> Tensor:
        """See ``Backend``; ``clip`` is in DeepSpeed's config."""
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return torch.as_tensor(float("inf") if norm is None else norm)

    def held(self, parameter: nn.Parameter) -> Tensor:
        """See ``Backend``."""
        held: Tensor = _of_deepspeed(parameter).ds_tensor if self.stage == 3 else parameter
        return held.detach()

    def whole(self, parameter: nn.Parameter, held: Tensor) -> Tensor:
        """See ``Backend``; stage 3 cuts the flat tensor up and pads the last piece."""
        if self.stage < 3:
            return held
        pieces = distributed.gather_rows(held.flatten())
        return pieces[: _of_deepspeed(parameter).ds_numel].view(_of_deepspeed(parameter).ds_shape)

    def cut(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """See ``Backend``."""
        if self.stage < 3:
            return value.detach().clone().to(parameter.device)
        held = self.held(parameter)
        flat = value.flatten()
        begin = distributed.rank() * held.numel()
        piece = torch.zeros_like(held)
        mine = flat[begin : begin + held.numel()]
        piece[: len(mine)].copy_(mine)
        return piece

    def optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        """See ``Backend``."""
        states = [state for state in self.optimizer.state.values() if STEP in state]
        if not states:
            return
        step = torch.as_tensor(states[0][STEP], dtype=torch.float32).cpu().clone()
        for name, parameter in self.parameters().items():
            if parameter.requires_grad:
                for key in MOMENTS:
                    yield f"{name}/{key}", self._whole_moment(parameter, key)
                yield f"{name}/{STEP}", step

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """See ``Backend``."""
        parameters = self.parameters()
        found = by_parameter(state, parameters)
        if not found:
            return
        step = next(iter(found.values()))[STEP]
        for flat in self._flat_parameters():  # whose states would only come to be at an update
            moments = {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
            self.optimizer.state[flat] = {STEP: step.clone().to(flat.device), **moments}
        for name, moments in found.items():
            parameter = parameters[name]
            for key in MOMENTS:
                piece = self._piece(parameter, key)
                if piece is None:
                    continue
                mine, begin = piece
                value = moments[key].flatten()[begin : begin + len(mine)]
                mine[: len(value)].copy_(value)

    def _whole_moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        """A moment of a parameter, of which each rank has a piece or nothing; collective."""
        piece = self._piece(parameter, key)
        if self.stage == 3:
            assert piece is not None  # each rank has one, padded at its end
            return self.whole(parameter, piece[0])
        whole = torch.zeros(parameter.numel(), device=parameter.device)
        if piece is not None:
            mine, begin = piece
            whole[begin : begin + len(mine)] = mine.to(whole.device)
        return distributed.all_reduce_sum(whole).view_as(parameter)

    def _piece(self, parameter: nn.Parameter, key: str) -> tuple[Tensor, int] | None:
        """This rank's piece of a parameter's moment in the flat states, and where it begins.

        DeepSpeed's own ``safe_get_full_optimizer_state`` does not serve: stages 1 and 2 know the
        states of the first parameter group only, and its setter fails on a padded piece.
        """
        if self.stage == 3:
            piece = safe_get_local_optimizer_state(parameter, key)
            return piece, distributed.rank() * len(piece)
        mapping = _of_deepspeed(parameter)._hp_mapping
        if mapping is None:
            return None
        flat = self.engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        place = mapping.hp_fragment_address
        state = self.optimizer.state[flat][key].narrow(0, place.start, place.numel)
        return state, mapping.lp_fragment_address.start

    def _flat_parameters(self) -> list[Tensor]:
        """What torch's AdamW moves: this rank's pieces of many parameters, one after the other."""
        optimizer = self.engine.optimizer
        if self.stage == 3:
            flat: list[Tensor] = optimizer.fp32_partitioned_groups_flat
        else:
            flat = optimizer.single_partition_of_fp32_groups
        return flat


def _of_deepspeed(parameter: nn.Parameter) -> Any:
    """The parameter with the attributes that DeepSpeed has given it."""
    return parameter
