"""``cmkd predict``: classes of files, by an exported model.

    for outcome in predict("runs/student/export", ["a.png", "pictures/"]):
        print(outcome)

A file that cannot be predicted is an outcome, too, and never ends the others. Files are read,
decoded and predicted a batch at a time, so that memory does not grow with their number.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from cmkd_scale.data.modalities import DecodeError, Modality
from cmkd_scale.data.workers import answers
from cmkd_scale.errors import EXIT_INTEGRITY, EXIT_USAGE, CmkdError, UsageError, did_you_mean
from cmkd_scale.operations.exported import GRAPH, Description, load_exported, read_description
from cmkd_scale.operations.predict_files import Failure, Source, find, read_file

BACKENDS = ("torch", "onnx")

_Decoded = list[tuple[Source, Tensor] | Failure]

Scorer = Callable[[Tensor], NDArray[Any]]
"""Inputs [B, ...] of the modality to logits [B, C]."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Of one file or text."""

    source: Source
    top: tuple[tuple[str, float], ...]
    """The likeliest labels, each with its probability, falling."""

    @property
    def label(self) -> str:
        """The likeliest."""
        return self.top[0][0]

    @property
    def probability(self) -> float:
        """Of ``label``."""
        return self.top[0][1]


Outcome = Prediction | Failure


def predict(
    directory: str | Path,
    files: str | Path | Iterable[str | Path] = (),
    *,
    texts: Iterable[str] = (),
    top_k: int = 5,
    batch_size: int = 32,
    device: str | None = None,
    backend: str = "torch",
    workers: int = 0,
) -> list[Outcome]:
    """Classes of files and texts, in their order; ``Predictor`` does it more than once.

    Args:
        directory: what ``cmkd export`` has written.
        files: one or several; see ``predict_files.find``.
        texts: come after the files.
        top_k: labels of each prediction, at most all.
        batch_size: samples that go through the model at a time.
        device: of torch, for example ``cuda:1``; None: the first GPU if there is one.
        backend: ``torch``, or ``onnx`` for the directory's ``model.onnx``.
        workers: processes that read and decode; 0: this one does.

    Returns:
        A ``Prediction`` or a ``Failure`` for each file and text.

    Raises:
        UsageError: no such model, device or backend, or texts for a model of something else.
        IntegrityError: the model is damaged.
    """
    predictor = Predictor(directory, device=device, backend=backend)
    several = [files] if isinstance(files, str | Path) else files
    sources = predictor.sources([os.fspath(file) for file in several], texts)
    return [*predictor.outcomes(sources, top_k=top_k, batch_size=batch_size, workers=workers)]


class Predictor:
    """An exported model that is ready to predict.

    Several threads may ``decode`` at a time, and one predict.
    """

    def __init__(
        self, directory: str | Path, *, device: str | None = None, backend: str = "torch"
    ) -> None:
        """Load it; arguments and errors as of ``predict``."""
        if backend not in BACKENDS:
            raise UsageError(f"There is no backend '{backend}'; {did_you_mean(backend, BACKENDS)}")
        described = read_description(Path(directory))
        self.modality: Modality = described.modality
        self.modality_name: str = described.spec.modality
        self.label_names: tuple[str, ...] = described.spec.label_names
        score = _with_torch if backend == "torch" else _with_onnx
        self._score = score(described, device)

    def sources(
        self, names: Iterable[str], texts: Iterable[str] = ()
    ) -> Iterator[Source | Failure]:
        """What names of files and directories, and texts, stand for; see ``find``.

        Raises:
            UsageError: texts for a model of something else.
        """
        texts = list(texts)
        if texts and self.modality_name != "text":
            raise UsageError(f"A text for a model of {self.modality_name}: give it files.")
        return itertools.chain(find(names, self.modality), (Source("text", text) for text in texts))

    def outcomes(
        self,
        sources: Iterable[Source | Failure],
        *,
        top_k: int = 5,
        batch_size: int = 32,
        workers: int = 0,
    ) -> Iterator[Outcome]:
        """Predict a batch at a time; arguments as of ``predict``.

        Raises:
            UsageError: an impossible argument, or a package that decodes is not installed.
            CmkdError: a worker was killed.
        """
        if min(top_k, batch_size) < 1:
            raise UsageError(f"top_k is {top_k}, batch_size {batch_size}: each must be 1 or more.")
        left = iter(sources)
        batches = iter(lambda: list(itertools.islice(left, batch_size)), [])
        reading = _Reading(self.modality)
        for decoded in answers(reading, batches, workers):
            if isinstance(decoded, CmkdError):
                raise decoded
            yield from self._predict(decoded, top_k)

    def decode(self, content: bytes) -> Tensor:
        """The content of a file, as the model takes it.

        Raises:
            DecodeError: it is damaged, or not what the model reads.
        """
        return decode(content, self.modality)

    def top(self, inputs: Tensor, top_k: int = 5) -> list[tuple[tuple[str, float], ...]]:
        """The likeliest labels and their probabilities, falling, for each of [B, ...] inputs.

        None of them for a sample with scores that are not finite.
        """
        logits_BC = np.asarray(self._score(inputs), dtype=np.float64)
        finite_B: NDArray[np.bool_] = np.all(np.isfinite(logits_BC), axis=1)
        logits_BC[~finite_B] = 0.0
        odds_BC = np.exp(logits_BC - logits_BC.max(axis=1, keepdims=True))
        probabilities_BC = odds_BC / odds_BC.sum(axis=1, keepdims=True)
        order_BK = np.argsort(-logits_BC, axis=1, kind="stable")[:, :top_k]
        return [
            tuple((self.label_names[c], float(row[c])) for c in order) if finite else ()
            for finite, order, row in zip(finite_B, order_BK, probabilities_BC, strict=True)
        ]

    def _predict(self, decoded: _Decoded, top_k: int) -> Iterator[Outcome]:
        """What was decoded of a batch, in its order."""
        inputs = [row[1] for row in decoded if not isinstance(row, Failure)]
        tops = iter(self.top(torch.stack(inputs), top_k) if inputs else ())
        for row in decoded:
            if isinstance(row, Failure):
                yield row
            elif top := next(tops):
                yield Prediction(row[0], top)
            else:
                yield Failure(row[0], "the model has no finite scores for it.", EXIT_INTEGRITY)


def decode(content: bytes, modality: Modality) -> Tensor:
    """A sample of the modality, from the content of one file, by what it holds.

    Where a sample has several frames, a file is all of them.

    Raises:
        DecodeError: it is damaged, or of another kind.
    """
    member = next(filter(modality.wants, modality.extensions))
    frame = f"0.{member}"
    return modality.decode({frame if modality.wants(frame) else member: content})


class _Reading(Dataset[_Decoded | CmkdError]):
    """Reads and decodes what it is asked for; may be sent to a worker."""

    def __init__(self, modality: Modality) -> None:
        self._modality = modality

    def __getitem__(self, request: Sequence[Source | Failure]) -> _Decoded | CmkdError:
        """In the order of the request; or the error that ends it, as the ``Decoder`` of shards."""
        try:
            with warnings.catch_warnings():
                # A picture that Pillow warns of is refused, and said to be.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                return [row if isinstance(row, Failure) else self._sample(row) for row in request]
        except CmkdError as error:
            return error

    def _sample(self, source: Source) -> tuple[Source, Tensor] | Failure:
        if source.kind == "text":
            content = source.name.encode("utf-8", "surrogatepass")  # decode refuses the rest
        else:
            try:
                content = read_file(source.name, self._modality)
            except UsageError as error:
                return Failure(source, str(error), EXIT_USAGE)
        try:
            return source, decode(content, self._modality)
        except DecodeError as error:
            return Failure(source, str(error), EXIT_INTEGRITY)


def _with_torch(described: Description, name: str | None) -> Scorer:
    model = load_exported(described.directory).model
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        model.to(device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        raise UsageError(f"Device '{name}' cannot be used here ({error}).") from None

    @torch.inference_mode()
    def score(inputs: Tensor) -> NDArray[Any]:
        logits: Tensor = model(inputs.to(device)).logits
        return logits.float().cpu().numpy()

    return score


def _with_onnx(described: Description, device: str | None) -> Scorer:
    from cmkd_scale.operations.export_inputs import named_inputs
    from cmkd_scale.operations.export_onnx import Graph

    if device not in (None, "cpu"):
        raise UsageError(f"Backend onnx runs on the CPU; leave out device '{device}'.")
    if GRAPH not in described.files:
        raise UsageError(
            f"{described.directory} holds no {GRAPH}; export the run with `cmkd export RUN "
            "--format onnx --out DIR`, or predict with backend torch."
        )
    described.check(*(file for file in described.files if file.startswith(GRAPH)))
    graph = Graph(described.directory / GRAPH)

    def score(inputs: Tensor) -> NDArray[Any]:
        named = named_inputs(graph.inputs, described.spec, inputs)
        return graph({name: value.numpy() for name, value in named.items()})[1]

    return score
