"""The door of ONNX: a model as a graph, held against the model itself, and the graph's session."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cmkd_scale.errors import IntegrityError, UsageError
from cmkd_scale.models.model import Model
from cmkd_scale.operations.export_inputs import input_names, joined_inputs, named_inputs, probe
from cmkd_scale.stages.common import ModelSpec

if TYPE_CHECKING:
    import onnxruntime

OPSET = 20
OUTPUTS = ("features", "logits")
METADATA = "cmkd"
"""Key of the graph's ``metadata_props``: modality, preprocessing and label names as JSON."""
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_NOISY = ("torch.onnx", "onnxscript", "onnx_ir")


def require_onnx() -> None:
    """Refuse early what would fail late.

    Raises:
        UsageError: a package is missing.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"ONNX needs {', '.join(missing)}, which is not installed: pip install "
            "'cmkd_scale[onnx]'"
        )


class _Named(nn.Module):
    """A model as the graph has it: named inputs, and no stages."""

    def __init__(self, model: Model, spec: ModelSpec, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.spec, self.names = model, spec, names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(self.names, inputs, strict=True))
        output = self.model(joined_inputs(named, self.spec))
        return output.features, output.logits


def write_graph(model: Model, spec: ModelSpec, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write a model as ONNX, with its weights beside it if they are more than 2 GB.

    Args:
        model: in eval mode, on the CPU.
        spec: how it is built.
        path: of the graph, whose inputs have any batch size.
        metadata: goes into ``metadata_props``.

    Raises:
        UsageError: the model does things that no graph can express.
    """
    import onnx

    names = input_names(model.encoder)
    example = named_inputs(names, spec, probe(spec, 2))
    batch = torch.export.Dim("batch")
    try:
        with _quiet():
            program = torch.onnx.export(
                _Named(model, spec, names).eval(),
                tuple(example.values()),
                input_names=names,
                output_names=OUTPUTS,
                opset_version=OPSET,
                dynamo=True,
                dynamic_shapes=(({0: batch},) * len(names),),
                verbose=False,
            )
    # What tracing raises is a dozen kinds, of torch and of onnxscript.
    except Exception as error:
        raise UsageError(
            f"The encoder {type(model.encoder).__name__} cannot be written as an ONNX graph "
            f"({_reason(error.__cause__ or error)}). Export it with --format safetensors."
        ) from None
    assert program is not None
    program.model.metadata_props[METADATA] = json.dumps(metadata, sort_keys=True)
    program.save(path)
    onnx.checker.check_model(str(path))


class Graph:
    """A graph of ``write_graph``, run by onnxruntime on the CPU: no torch computes."""

    def __init__(self, path: Path) -> None:
        """Open a graph.

        Raises:
            UsageError: a package is missing.
            IntegrityError: onnxruntime cannot read the file.
        """
        require_onnx()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        try:
            self._session: onnxruntime.InferenceSession = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        # Its exceptions have no common base but this.
        except Exception as error:
            raise IntegrityError(
                f"{path} is no graph that onnxruntime can run ({_reason(error)}). Export it again "
                "with `cmkd export RUN --format onnx --out DIR`."
            ) from None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of what it reads."""
        return tuple(entry.name for entry in self._session.get_inputs())

    def __call__(
        self, inputs: Mapping[str, NDArray[Any]]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Map inputs by name, each [B, ...], to features [B, D] and logits [B, C]."""
        features, logits = self._session.run(list(OUTPUTS), dict(inputs))
        return features, logits


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's own warnings say nothing to a user; what it cannot do, it raises."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
