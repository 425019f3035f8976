from __future__ import annotations

import io
import json
import os
import shutil
import sys
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import softmax

from cmkd_scale.cli import main
from cmkd_scale.errors import IntegrityError, UsageError
from cmkd_scale.models.model import Model
from cmkd_scale.operations.exported import GRAPH
from cmkd_scale.operations.predict import Prediction, Predictor, predict
from cmkd_scale.operations.predict_files import Failure, Source
from cmkd_scale.stages.streams import make_modality
from tests.operations.exports import LABELS, write_random

SIZE = 16


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    directory = tmp_path_factory.mktemp("image") / "export"
    return directory, write_random(
        directory, "image", {"height": SIZE, "width": SIZE, "channels": 3}, graph=True
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("text") / "export"
    write_random(directory, "text", graph=True)
    return directory


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Names in an order that is not the one in which they were made."""
    root = tmp_path / "pictures"
    for seed, name in enumerate(("c/a.png", "b.webp", "a.PNG", "c/b/x.png", "a0.png")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        # WebP without loss, so that every file holds exact pixels.
        picture(seed).save(root / name, "WEBP" if "webp" in name else "PNG", lossless=True)
    return root


def run(*words: str | Path) -> int:
    return main(["predict", *map(str, words)])


def expected(model: Model, file: Path) -> Any:
    """Probabilities [C], by Pillow, torch and scipy alone."""
    pixels = np.asarray(Image.open(file).convert("RGB"), dtype=np.float64) / 127.5 - 1
    inputs = torch.from_numpy(pixels.transpose(2, 0, 1)[None].astype(np.float32))
    with torch.no_grad():
        return softmax(model(inputs).logits[0].double().numpy())


@pytest.mark.parametrize("backend", ["torch", "onnx"])
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_probabilities_are_the_models_in_the_order_of_the_files(
    image: tuple[Path, Model], pictures: Path, backend: str, batch_size: int
) -> None:
    directory, model = image
    names = ["c/b/x.png", "a.PNG", "b.webp", "a.PNG"]
    files = [pictures / name for name in names]
    found = predict(directory, files, top_k=3, batch_size=batch_size, backend=backend)
    assert [outcome.source for outcome in found] == [Source("file", str(file)) for file in files]
    for outcome, file in zip(found, files, strict=True):
        assert isinstance(outcome, Prediction)
        probabilities = expected(model, file)
        best = np.argsort(-probabilities)[:3]
        assert [label for label, _ in outcome.top] == [LABELS[place] for place in best]
        np.testing.assert_allclose([part for _, part in outcome.top], probabilities[best], 1e-4)
        assert (outcome.label, outcome.probability) == outcome.top[0]


def test_all_labels_are_given_where_there_are_fewer_than_asked_for(
    image: tuple[Path, Model], pictures: Path
) -> None:
    (found,) = predict(image[0], pictures / "a.PNG", top_k=99)
    assert isinstance(found, Prediction)
    assert sorted(label for label, _ in found.top) == sorted(LABELS)
    assert sum(part for _, part in found.top) == pytest.approx(1)


def test_torch_computes_nothing_for_the_other_backend(
    image: tuple[Path, Model], pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("the model was called")

    monkeypatch.setattr(Model, "__init__", refuse)
    assert isinstance(predict(image[0], [pictures / "a.PNG"], backend="onnx")[0], Prediction)


def test_a_directory_stands_for_the_files_below_it(
    image: tuple[Path, Model], pictures: Path, tmp_path: Path
) -> None:
    (pictures / ".hidden.png").write_bytes(b"no")
    (pictures / ".git").mkdir()
    (pictures / ".git" / "a.png").write_bytes(b"no")
    (pictures / "notes.txt").write_text("no")
    (pictures / "c" / "named.png").mkdir()
    (pictures / "c" / "round").symlink_to(pictures)
    found = predict(image[0], [pictures])
    names = ["a.PNG", "a0.png", "b.webp", "c/a.png", "c/b/x.png"]
    assert [row.source.name for row in found] == [str(pictures / name) for name in names]
    assert all(isinstance(row, Prediction) for row in found)


def test_names_come_from_standard_input_between_others(
    image: tuple[Path, Model], pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(pictures)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"b.webp\n\nc")))
    assert run(image[0], "a.PNG", "-", "--jsonl", "a0.png") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["file"] for row in rows] == ["a.PNG", "b.webp", "c/a.png", "c/b/x.png", "a0.png"]


def test_what_is_no_list_of_names_is_refused(
    image: tuple[Path, Model], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with open("/dev/zero", "rb") as endless:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(endless))
        assert run(image[0], "-") == 2
    assert "not names of files, one a line" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["{0}", "--json", "a.PNG", "--top-k", "2", "-odd=name.png"],
        ["{0}", "--json", "a.PNG", "--top-k", "2", "--", "-odd=name.png"],
        ["--json", "--top-k=2", "{0}", "--", "a.PNG", "-odd=name.png"],
        ["{0}", "a.PNG", "--json", "--top-k=2", "./-odd=name.png"],
    ],
)
def test_files_and_options_may_stand_in_any_order(
    image: tuple[Path, Model],
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    words: list[str],
) -> None:
    monkeypatch.chdir(pictures)
    picture(9).save("-odd=name.png")
    words = [word.format(image[0]) for word in words]
    if "--" not in words and "-odd=name.png" in words:
        with pytest.raises(SystemExit) as ended:
            run(*words)
        assert ended.value.code == 2
        assert "unrecognized arguments: -odd=name.png" in capsys.readouterr().err
        return
    assert run(*words) == 0
    rows = json.loads(capsys.readouterr().out)["predictions"]
    assert [row["file"].removeprefix("./") for row in rows] == ["a.PNG", "-odd=name.png"]
    assert {len(row["top"]) for row in rows} == {2}


def test_one_object_holds_predictions_and_failures(
    image: tuple[Path, Model], pictures: Path, capsys: Any
) -> None:
    (pictures / "bad.png").write_bytes(b"no picture")
    assert run(image[0], pictures, "--json", "--top-k", "1") == 42
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert {"model": str(image[0]), "modality": "image"}.items() <= found.items()
    assert len(found["predictions"]) == 5
    for row in found["predictions"]:
        assert set(row) == {"file", "label", "probability", "top"}
        assert row["top"] == [{"label": row["label"], "probability": row["probability"]}]
    error = "it is not a PNG, JPEG or WebP picture."
    assert found["failed"] == [{"file": str(pictures / "bad.png"), "error": error}]
    assert f"{pictures}/bad.png: {error}\n" in printed.err
    assert "1 of 6 could not be predicted" in printed.err


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_texts_come_from_the_command_line_and_from_files(
    text: Path, tmp_path: Path, capsys: Any, backend: str
) -> None:
    (tmp_path / "a.txt").write_text("good\nday")
    words = ["--text", "good\nday", "--text=good night", "--text", "\udcff", "--backend", backend]
    assert run(text, tmp_path, *words, "--jsonl") == 42
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row.get("file") for row in rows] == [str(tmp_path / "a.txt"), None, None, None]
    assert [row.get("text") for row in rows] == [None, "good\nday", "good night", "\\xff"]
    assert rows[0]["top"] == rows[1]["top"] != rows[2]["top"]
    assert "not UTF-8" in rows[3]["error"]


def test_a_file_is_all_the_frames_of_a_sample(pictures: Path, tmp_path: Path) -> None:
    options = {"height": SIZE, "width": SIZE, "channels": 3}
    several = write_random(tmp_path / "several", "image", {**options, "frames": 4})
    (found,) = predict(tmp_path / "several", [pictures / "a0.png"], top_k=len(LABELS))
    assert isinstance(found, Prediction)
    alone = expected(several, pictures / "a0.png")
    for label, part in found.top:
        assert part == pytest.approx(alone[LABELS.index(label)], rel=1e-4)


def test_sounds_and_arrays_are_read(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(np.random.default_rng(0).integers(-9999, 9999, 4000, "<i2").tobytes())
    np.save(tmp_path / "b.npy", np.arange(8.0))
    for name, modality, options in (("a.wav", "audio", {}), ("b.npy", "features", {"dim": 8})):
        model = write_random(tmp_path / modality, modality, options)
        content = {name[2:]: (tmp_path / name).read_bytes()}
        with torch.no_grad():
            logits = model(make_modality(modality, options).decode(content)[None]).logits
        (found,) = predict(tmp_path / modality, [tmp_path / name])
        assert isinstance(found, Prediction)
        assert found.label == LABELS[int(logits.argmax())]
        assert found.probability == pytest.approx(float(logits.softmax(1).max()))


def test_a_package_that_is_missing_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    write_random(tmp_path / "audio", "audio")
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    monkeypatch.setitem(sys.modules, "soundfile", None)
    assert run(tmp_path / "audio", tmp_path / "a.wav", tmp_path / "a.wav") == 2
    assert capsys.readouterr().err.count("Reading sound needs soundfile") == 1


def test_scores_that_are_not_finite_are_no_prediction(tmp_path: Path, capsys: Any) -> None:
    write_random(tmp_path / "features", "features", {"dim": 8})
    np.save(tmp_path / "a.npy", np.arange(8.0))
    np.save(tmp_path / "b.npy", np.array([3e38, -3e38] * 4, dtype=np.float32))
    assert run(tmp_path / "features", tmp_path / "b.npy", tmp_path / "a.npy", "--json") == 42
    found = json.loads(capsys.readouterr().out)
    assert [Path(row["file"]).name for row in found["predictions"]] == ["a.npy"]
    assert [row["error"] for row in found["failed"]] == ["the model has no finite scores for it."]


def test_files_are_read_a_batch_at_a_time(image: tuple[Path, Model], pictures: Path) -> None:
    asked = 0

    def endless() -> Iterator[Source]:
        nonlocal asked
        while True:
            asked += 1
            yield Source("file", str(pictures / "a0.png"))

    outcomes = Predictor(image[0]).outcomes(endless(), batch_size=4)
    for number in range(1, 20):
        next(outcomes)
        assert asked == 4 * -(-number // 4)


@pytest.mark.multirank
def test_workers_give_the_same_in_the_same_order(image: tuple[Path, Model], pictures: Path) -> None:
    (pictures / "b.png").write_bytes(b"no")
    files = [pictures, pictures / "gone.png", pictures / "c"]
    alone = predict(image[0], files, batch_size=3)
    assert predict(image[0], files, batch_size=3, workers=2) == alone
    assert sum(isinstance(row, Failure) for row in alone) == 2


@pytest.mark.parametrize("form", ["--jsonl", "--json", "--top-k=3"])
def test_a_reader_that_has_enough_ends_it_quietly(
    image: tuple[Path, Model],
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    form: str,
) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert run(image[0], pictures, form) == 0
        stdout.flush()  # as the interpreter does at its end
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "nothing to predict"),
        (["a.png", "--workers", "-1"], 2, "--workers"),
        (["a.png", "--device", "abacus"], 2, "Device 'abacus' cannot be used"),
        (["a.png", "--device", "cuda", "--backend", "onnx"], 2, "runs on the CPU"),
        (["--text", "good day"], 2, "A text for a model of image"),
    ],
)
def test_wrong_use_is_said(
    image: tuple[Path, Model], capsys: Any, words: list[str], code: int, said: str
) -> None:
    assert run(image[0], *words) == code
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.out == ""


@pytest.mark.parametrize("changed", [{"top_k": 0}, {"batch_size": 0}, {"backend": "tvm"}])
def test_impossible_arguments_are_refused(
    image: tuple[Path, Model], changed: dict[str, Any]
) -> None:
    with pytest.raises(UsageError):
        predict(image[0], ["a.png"], **changed)


def test_a_model_that_is_damaged_or_has_no_graph_is_refused(
    image: tuple[Path, Model], pictures: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "export"
    shutil.copytree(image[0], directory)
    with (directory / GRAPH).open("ab") as file:
        file.write(b"\n")
    assert predict(directory, []) == [], "the other backend does not read it"
    with pytest.raises(IntegrityError, match=GRAPH):
        predict(directory, [], backend="onnx")
    write_random(tmp_path / "plain", "image")
    with pytest.raises(UsageError, match="--format onnx"):
        predict(tmp_path / "plain", [], backend="onnx")
    with pytest.raises(UsageError, match="no exported model"):
        predict(pictures, [])
