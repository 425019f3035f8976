from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cmkd_scale import cli
from cmkd_scale.config import make_config
from cmkd_scale.memory.bank import save_memory
from cmkd_scale.stages.teacher import teacher
from tests.conftest import REPOSITORY, Launch
from tests.data.examples import Toy, build_toy
from tests.memory.examples import example_memory

VERBS = [
    "quickstart",
    "shards build",
    "shards verify",
    "shards info",
    "shards stream",
    "teacher",
    "memory",
    "student",
    "evaluate",
    "methods",
    "memory-info",
    "doctor",
    "plan",
    "predict",
    "report",
    "export",
]


def run(*arguments: str | Path) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*verb.split(), "--help"])
    assert ended.value.code == 0
    assert f"example: cmkd {verb}" in capsys.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, cmkd_scale.cli as c; c._parser(); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_methods_as_text_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("methods") == 0
    text = capsys.readouterr().out
    assert run("methods", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["methods"]
    for row in rows:
        assert f"{row['name']}: {row['summary']}" in text
    assert {row["name"] for row in rows} >= {"ce", "ce_ls", "kd_memory", "ucmkd_global"}


def test_memory_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory = example_memory()
    file = tmp_path / "memory.safetensors"
    digest = save_memory(memory, file)
    assert run("memory-info", file, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["digest"] == digest
    assert shown["classes"] == 6
    assert shown["prototypes"] == len(memory.prototypes)
    assert shown["provenance"] == {"made": "for a test"}


Stream = Callable[..., list[str]]


@pytest.fixture
def stream(capsys: pytest.CaptureFixture[str]) -> Stream:
    def keys(shards: Path, rank: int, world_size: int, *more: str | Path) -> list[str]:
        capsys.readouterr()
        ranks = ("--rank", str(rank), "--world-size", str(world_size))
        assert run("shards", "stream", shards, *ranks, "--print-keys", *more) == 0
        return capsys.readouterr().out.split()

    return keys


def test_streams_of_two_ranks_continue_on_three(tmp_path: Path, stream: Stream) -> None:
    build_toy(tmp_path / "shards", count=31)
    shards = tmp_path / "shards" / "text"
    whole = stream(shards, 0, 1)
    assert len(set(whole)) == 31
    states = [tmp_path / "state-0", tmp_path / "state-1"]
    first = [
        stream(shards, rank, 2, "--stop-after", "5", "--save-state", states[rank])
        for rank in range(2)
    ]
    assert states[0].read_bytes() == states[1].read_bytes()
    rest = [stream(shards, rank, 3, "--state", states[0]) for rank in range(3)]
    assert [key for row in zip(*first, strict=True) for key in row] == whole[:10]
    assert rest == [whole[10 + rank :: 3] for rank in range(3)]


def test_a_state_at_the_end_starts_the_next_epoch(tmp_path: Path, stream: Stream) -> None:
    build_toy(tmp_path / "shards", count=9)
    state = tmp_path / "state"
    assert len(stream(tmp_path / "shards", 0, 2, "--save-state", state)) == 5
    assert json.loads(state.read_text())["epoch"] == 1
    second = stream(tmp_path / "shards", 0, 1, "--state", state)
    assert len(second) == 9


# ------------------------------------------------------------------------ wrong inputs


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards ``toy``, shards of other classes, a teacher, a memory; never written to."""
    root = tmp_path_factory.mktemp("world")
    for split in ("train", "validation", "test"):
        build_toy(root / "shards", split)
    save_memory(example_memory(classes=4), root / "memory" / "memory.safetensors")
    teacher(make_config(student_tree(root, root / "teacher")), console=False)
    return root


def student_tree(root: Path, run_dir: Path) -> dict[str, Any]:
    return {
        "run": {"dir": str(run_dir)},
        "data": {"shards": str(root / "shards")},
        "model": {"width": 16},
        "memory": {"run": str(root / "memory")},
        "train": {"steps": 2, "global_batch_size": 8, "warmup_steps": 1},
    }


def damage_shard(root: Path) -> None:
    shard = next((root / "shards").rglob("shard-000000.tar"))
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(bytes(content))


def damage_manifest(root: Path) -> None:
    next((root / "shards").rglob("train/manifest.json")).write_text("{")


def damage_memory(root: Path) -> None:
    file = root / "memory" / "memory.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"oops")


def damage_checkpoint(root: Path) -> None:
    for file in (root / "teacher" / "checkpoints").rglob("model.safetensors"):
        file.write_bytes(file.read_bytes()[:-4] + b"oops")


def rename_classes(root: Path) -> None:
    memory = example_memory(classes=4)
    names = ("cat", "dog", "owl", "ant")
    changed = memory.__class__(**{**vars(memory), "class_names": names})
    save_memory(changed, root / "memory" / "memory.safetensors")


def interrupt_build(root: Path) -> None:
    train = root / "shards" / "text" / "train"
    (train / "manifest.json").unlink()
    train.rename(train.with_name("train.partial"))


def another_run(root: Path) -> None:
    teacher(make_config(student_tree(root, root / "run")), console=False)


def nothing(root: Path) -> None:
    pass


STUDENT = ["student", "--config", "{root}/student.yaml"]
WRONG: dict[str, tuple[Callable[[Path], None], list[str], int, str]] = {
    "unknown key": (nothing, [*STUDENT, "train.stepz=3"], 2, "did you mean 'steps'"),
    "ill-typed value": (nothing, [*STUDENT, "train.steps=many"], 2, "train.steps"),
    "config absent": (nothing, ["student", "--config", "{root}/no.yaml"], 2, "cannot be read"),
    "shards absent": (nothing, [*STUDENT, "data.shards={root}/no"], 2, "cmkd shards build"),
    "builtin unknown": (
        nothing,
        [*STUDENT, "data.shards=builtin:number/audio"],
        2,
        "did you mean 'numbers'",
    ),
    "builtin option unknown": (
        nothing,
        [*STUDENT, "data.shards=builtin:numbers/text", "data.options.train_per_klass=3"],
        2,
        "did you mean 'train_per_class'",
    ),
    "split absent": (nothing, [*STUDENT, "data.test_split=tset"], 2, "tset"),
    "build interrupted": (interrupt_build, STUDENT, 2, "partial"),
    "manifest broken": (damage_manifest, STUDENT, 42, "manifest.json"),
    "shard damaged": (damage_shard, ["shards", "verify", "{root}/shards"], 42, "shard-000000"),
    "nothing to verify": (nothing, ["shards", "verify", "{root}/memory"], 2, "no shards"),
    "no common label": (rename_classes, STUDENT, 2, "no class name in common"),
    "search without its cost": (
        nothing,
        [*STUDENT, "method.transport=label_free", "method.search_candidates=8"],
        2,
        "method.cost=squared_euclidean",
    ),
    "memory absent": (nothing, [*STUDENT, "memory.run={root}/no"], 2, "cmkd memory"),
    "memory damaged": (damage_memory, STUDENT, 42, "own digest"),
    "memory unset": (nothing, [*STUDENT, "memory.run=null"], 2, "memory.run"),
    "method unknown": (nothing, [*STUDENT, "method.name=ucmkd_globl"], 2, "ucmkd_global"),
    "component unknown": (
        nothing,
        [*STUDENT, "method.weights.teacher_hed=1"],
        2,
        "did you mean 'teacher_head'",
    ),
    "class too small": (nothing, [*STUDENT, "data.n_per_class=99"], 2, "at most 15"),
    "transform unknown": (nothing, [*STUDENT, "data.transform.max_byte=9"], 2, "max_bytes"),
    "encoder of another modality": (
        nothing,
        [*STUDENT, "model.encoder=resnet"],
        2,
        "byte_transformer",
    ),
    "world size": (nothing, [*STUDENT, "run.world_size=2"], 2, "not what it seems"),
    "run of another config": (
        another_run,
        ["teacher", *STUDENT[1:], "train.steps=3"],
        2,
        "train.steps",
    ),
    "cache at a URL": (
        nothing,
        ["memory", "--config", "{root}/memory.yaml", "teacher.cache=s3://bucket/cache"],
        2,
        "teacher.cache: value error, must be a directory, not a URL",
    ),
    "run of another stage": (another_run, STUDENT, 2, "cmkd teacher"),
    "run not writable": (nothing, [*STUDENT, "run.dir=/dev/null/x"], 2, "cannot be written"),
    "teacher absent": (
        nothing,
        ["memory", "--config", "{root}/memory.yaml", "teacher.run={root}/no"],
        2,
        "cmkd teacher",
    ),
    "teacher unset": (nothing, ["memory", "--config", "{root}/memory.yaml"], 2, "teacher.run"),
    "checkpoint damaged": (
        damage_checkpoint,
        ["memory", "--config", "{root}/memory.yaml", "teacher.run={root}/teacher"],
        42,
        "SHA-256",
    ),
    "nothing to evaluate": (nothing, ["evaluate", *STUDENT[1:]], 2, "no trained model"),
    "not a memory": (nothing, ["memory-info", "{root}/student.yaml"], 42, "not a prototype memory"),
    "data set unknown": (
        nothing,
        ["shards", "build", "numbrs", "--out", "{root}/x"],
        2,
        "did you mean 'numbers'",
    ),
    "no rank": (
        nothing,
        ["shards", "stream", "{root}/shards", "--rank", "2", "--world-size", "2"],
        2,
        "--rank 2",
    ),
    "remote shards": (nothing, [*STUDENT, "data.shards=pipe://cat"], 2, "s3://, gs://"),
    "fractional option": (
        nothing,
        [*STUDENT, "data.transform.max_bytes=32.5"],
        2,
        "whole number",
    ),
    "state not writable": (
        nothing,
        [
            *("shards", "stream", "{root}/shards", "--rank", "0", "--world-size", "1"),
            *("--save-state", "{root}/no/x"),
        ],
        2,
        "cannot be written",
    ),
    "no recordings": (nothing, ["quickstart", "--fsdd", "{root}/no"], 2, "Free Spoken Digit"),
    "report of nothing": (nothing, ["report", "{root}/no"], 2, "no"),
}


@pytest.mark.parametrize("case", sorted(WRONG))
def test_wrong_input_ends_in_one_paragraph_and_its_exit_code(
    case: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare, arguments, code, words = WRONG[case]
    root = tmp_path / "world"
    shutil.copytree(world, root, symlinks=True)
    (root / "student.yaml").write_text(yaml.safe_dump(student_tree(root, root / "run")))
    (root / "memory.yaml").write_text(yaml.safe_dump({"run": {"dir": str(root / "m")}}))
    prepare(root)
    capsys.readouterr()
    assert run(*(argument.format(root=root) for argument in arguments)) == code
    shown = capsys.readouterr()
    assert words in shown.err
    assert shown.err.startswith("cmkd: ")
    assert "Traceback" not in shown.err
    assert "\n\n" not in shown.err.strip(), "one paragraph"
    assert shown.out == ""


def test_debug_shows_the_traceback_and_keeps_the_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("student", "--config", tmp_path / "no.yaml", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.multirank
def test_a_batch_that_cannot_be_divided(world: Path, tmp_path: Path, launch: Launch) -> None:
    file = tmp_path / "student.yaml"
    file.write_text(yaml.safe_dump(student_tree(world, tmp_path / "run")))
    done = launch(
        "student", "--config", file, "train.global_batch_size=7", processes=2, check=False
    )
    assert "exitcode  : 2" in done.stderr
    assert "use 6 or 8" in done.stderr


@pytest.mark.multirank
def test_a_launch_that_started_one_process_instead_of_two(world: Path, tmp_path: Path) -> None:
    """``accelerate launch --cpu --num_processes 2`` runs one process, silently."""
    file = tmp_path / "student.yaml"
    file.write_text(yaml.safe_dump(student_tree(world, tmp_path / "run")))
    launcher = Path(sys.executable).with_name("accelerate")
    options = "--cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    done = subprocess.run(
        [launcher, "launch", *options.split(), "-m", "cmkd_scale", "student", "--config", file],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "not what it seems" in done.stderr
    assert not (tmp_path / "run").exists()


def test_toy_is_what_a_data_set_is() -> None:
    assert Toy().open("text", "train")[0].label == 0
