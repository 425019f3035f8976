"""Damaged splits on the command line: what is wrong is said in words, and by the exit code."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cmkd_scale.cli import main
from cmkd_scale.data.manifest import MANIFEST
from cmkd_scale.errors import (
    EXIT_DONE,
    EXIT_INTEGRITY,
    EXIT_USAGE,
)
from tests.data.fuzz_checks import (
    example,
    same_content,
)
from tests.data.fuzz_splits import (
    FuzzSplit,
    random_of,
)
from tests.data.mutations import CHANGES, FORGERIES, damaged, restate
from tests.data.tar_mutations import Files

pytestmark = pytest.mark.usefixtures("limit")


@pytest.fixture
def pipes() -> Iterator[None]:
    """Reading keys changes what a closed pipe does to this process."""
    before = signal.getsignal(signal.SIGPIPE)
    yield
    signal.signal(signal.SIGPIPE, before)


@pytest.mark.usefixtures("pipes")
@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param(range(20), id="quick"),
        pytest.param(range(20, 200), id="thorough", marks=pytest.mark.slow),
    ],
)
def test_the_command_line_says_what_is_wrong_and_how(
    splits: list[FuzzSplit], capsys: pytest.CaptureFixture[str], numbers: range
) -> None:
    for number in numbers:
        split = splits[number % len(splits)]
        forged = number % 3 == 2
        changes = FORGERIES if forged else CHANGES
        files, names = damaged(random_of("cli", number), split.pristine, changes)
        if forged:
            restate(files)
        with example(split, files, f"example {number}: {names}"):
            check_commands(split, files, forged, capsys)


def check_commands(
    split: FuzzSplit, files: Files, forged: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    unchanged = same_content(files.get(MANIFEST), split.pristine[MANIFEST])
    whole = unchanged and all(files.get(n) == c for n, c in split.pristine.items() if n != MANIFEST)
    rank = ["--rank", "0", "--world-size", "1"]
    codes = {}
    for verb in (["verify"], ["info"], ["stream", *rank, "--samples", "all", "--print-keys"]):
        code = codes[verb[0]] = main(["shards", *verb, str(split.root)])
        out, err = capsys.readouterr()
        assert code in (EXIT_DONE, EXIT_USAGE, EXIT_INTEGRITY)
        assert "Traceback" not in err
        assert (code == EXIT_DONE) == ("cmkd: " not in err)
        if verb[0] == "stream" and code == EXIT_DONE and not forged:
            assert sorted(out.split()) == [sample.key for sample in split.samples]
    if MANIFEST not in files:
        assert set(codes.values()) == {EXIT_USAGE}
    elif not forged:
        assert codes["verify"] == (EXIT_DONE if whole else EXIT_INTEGRITY)
        assert codes["info"] == (EXIT_DONE if unchanged else EXIT_INTEGRITY)


@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param(range(2), id="quick"),
        pytest.param(range(2, 30), id="thorough", marks=pytest.mark.slow),
    ],
)
def test_a_run_trains_on_whole_data_or_ends_with_42(
    splits: list[FuzzSplit], tmp_path: Path, capsys: pytest.CaptureFixture[str], numbers: range
) -> None:
    split = splits[0]
    config = tmp_path / "config.yaml"
    for number in numbers:
        files, names = damaged(random_of("train", number), split.pristine, CHANGES)
        tree = {
            "run": {"dir": str(tmp_path / f"run-{number}")},
            "data": {"shards": str(split.root), "test_split": "train"},
            "model": {"width": 8, "feature_dim": 4},
            "train": {"steps": 2, "global_batch_size": 10},
        }
        config.write_text(json.dumps(tree))
        with example(split, files, f"example {number}: {names}"):
            code = main(["teacher", "--config", str(config)])
            err = capsys.readouterr().err
            assert "Traceback" not in err
            if MANIFEST not in files:
                assert code == EXIT_USAGE
                continue
            unchanged = same_content(files[MANIFEST], split.pristine[MANIFEST])
            labelled = {i for i, sample in enumerate(split.samples) if sample.label >= 0}
            whole = unchanged and labelled <= split.readable(files)
            assert code == (EXIT_DONE if whole else EXIT_INTEGRITY), err
            assert whole or "shard-00000" in err or MANIFEST in err
