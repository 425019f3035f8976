"""The launch lines in the comments of configs start what they say, on launchers that are there."""

from __future__ import annotations

import json
import os
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from cmkd_scale import cli
from cmkd_scale.config import load_config
from cmkd_scale.operations.plan import stage_of
from tests.configs.commands import commands_in
from tests.conftest import REPOSITORY

GPUS = 8
LINES = [
    pytest.param(file, words, id=f"{file}-{place}")
    for file in (
        str(path.relative_to(REPOSITORY)) for path in sorted(REPOSITORY.glob("configs/**/*.yaml"))
    )
    for place, words in enumerate(commands_in(REPOSITORY / file))
    if words[:3] != ["cmkd", "shards", "build"]  # run by test_configs.py
]


def test_large_configs_say_how_they_are_launched() -> None:
    launched = {line.values[0] for line in LINES}
    large = REPOSITORY.glob("configs/large/*.yaml")
    assert {str(file.relative_to(REPOSITORY)) for file in large} <= launched


@pytest.mark.parametrize(("file", "words"), LINES)
def test_a_line_starts_the_stage_of_its_file(
    file: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = stage_of(load_config(REPOSITORY / file))
    environment = dict(word.split("=", 1) for word in words if word.split("=")[0].isupper())
    command = words[len(environment) :]
    if command[:3] == ["cmkd", "kubernetes", "render"]:
        renders_the_chain(command[1:], file, tmp_path, capsys)
    elif command[0] == "sbatch":
        script, *arguments = [word for word in command[1:] if not word.startswith("--")]
        assert arguments == [stage, file]
        assert (REPOSITORY / script).is_file()  # sbatch copies it
        backend = environment.get("BACKEND", "ddp")
        assert (REPOSITORY / "launchers" / "accelerate" / f"{backend}.yaml").is_file()
    elif command[:2] == ["accelerate", "launch"]:
        joins_all_ranks(command[2:], file, stage)
    else:
        # In the place of Python, a program that says what it was asked to start.
        environment |= {"PYTHON": "echo", "CUDA_VISIBLE_DEVICES": "", "PROCESSES": str(GPUS)}
        told = subprocess.run(
            command,
            cwd=REPOSITORY,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        joins_all_ranks(told.stdout.split(" launch ", 1)[1].split(), file, stage)


def renders_the_chain(
    command: list[str], file: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Manifests of all stages that the config builds on, and of its own."""
    there = {file: str(REPOSITORY / file), "deploy": str(out)}
    assert cli.main([*(there.get(word, word) for word in command), "--json"]) == 0
    rendered = json.loads(capsys.readouterr().out)
    assert (rendered["stages"], rendered["expects"]) == (["teacher", "memory", "student"], [])


def joins_all_ranks(words: list[str], file: str, stage: str) -> None:
    """Accelerate understands the words, and its files are there; batches divide by all ranks."""
    options = launch_command_parser().parse_args(words)
    assert (options.module, options.training_script) == (True, "cmkd_scale")
    assert options.training_script_args == [stage, "--config", file]
    assert options.num_processes == int(options.num_machines) * GPUS
    assert load_config(REPOSITORY / file).train.global_batch_size % options.num_processes == 0
    zero = deepspeed_file(options)
    if zero is not None:
        assert json.loads((REPOSITORY / zero).read_text())["zero_optimization"]["stage"] in (2, 3)
        assert options.deepspeed_multinode_launcher == "standard"


def deepspeed_file(options: Namespace) -> str | None:
    """The one that is named, or that of the config of Accelerate that is named."""
    if options.config_file is None:
        return str(options.deepspeed_config_file)
    config = REPOSITORY / options.config_file
    load_config_from_file(str(config))  # refuses keys that it does not know
    section = yaml.safe_load(config.read_text()).get("deepspeed_config")
    return section and str(section["deepspeed_config_file"])
