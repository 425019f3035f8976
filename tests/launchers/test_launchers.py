"""The launchers start ranks that know each other, and hand every word over unchanged."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCHERS = Path(__file__).resolve().parents[2] / "launchers"
ARGUMENTS = ["student", "a b.yaml", "run.dir=c d"]
EXPECTED = ["student", "--config", "a b.yaml", "run.dir=c d"]

# Stands where cmkd_scale would be found: the launchers are under test, not the stages.
STAND_IN = """\
import json, os, sys
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
if os.environ.get("DIES") == os.environ["RANK"] and restarts == "0":
    os._exit(3)
# As the program does on CPUs.
me = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
backend = me.distributed_type.value
if me.state.deepspeed_plugin is not None:
    zero = me.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    places = {zero[key]["device"] for key in ("offload_optimizer", "offload_param") if key in zero}
    backend += " ".join([str(zero["stage"]), *places])
if os.environ.get("ACCELERATE_USE_FSDP") == "true":  # what the program asks for
    backend += f" FSDP{os.environ['FSDP_VERSION']}"
found = {"world": me.num_processes, "backend": backend, "arguments": sys.argv[1:]}
with open(f"rank{me.process_index}.json", "x") as file:
    json.dump({**found, "restarts": restarts}, file)
"""
BACKENDS = {
    "ddp": "MULTI_CPU",
    "fsdp2": "MULTI_CPU FSDP2",
    "zero2": "DEEPSPEED2",
    "zero3_offload": "DEEPSPEED3 cpu",
}


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    package = tmp_path / "cmkd_scale"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(STAND_IN)
    return tmp_path


def run(command: list[str], cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a launcher with this interpreter and no GPU, in ``cwd``."""
    return subprocess.run(
        command,
        cwd=cwd,
        env={
            # Tests that ran in this process before have told Accelerate to use CPUs.
            **{name: value for name, value in os.environ.items() if "ACCELERATE" not in name},
            "PYTHON": sys.executable,
            "PYTHONPATH": str(cwd),
            "CUDA_VISIBLE_DEVICES": "",
            **env,
        },
        capture_output=True,
        text=True,
        timeout=270,  # DeepSpeed compiles an extension when it is first used
    )


def ranks(directory: Path) -> dict[str, object]:
    """What each rank wrote, by file name."""
    return {file.name: json.loads(file.read_text()) for file in directory.glob("rank*.json")}


def joined(directory: Path, backend: str = "MULTI_CPU", restarts: str = "0") -> None:
    """Assert that two ranks know each other and were given every word."""
    rank = {"world": 2, "backend": backend, "arguments": EXPECTED, "restarts": restarts}
    assert ranks(directory) == {"rank0.json": rank, "rank1.json": rank}


def needs(backend: str) -> None:
    if backend.startswith("zero"):
        pytest.importorskip("deepspeed", reason="needs the extra 'deepspeed'")


@pytest.mark.multirank
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_node_starts_two_joined_cpu_ranks(backend: str, stand_in: Path) -> None:
    needs(backend)
    done = run([str(LAUNCHERS / "one_node.sh"), *ARGUMENTS], stand_in, BACKEND=backend)
    assert done.returncode == 0, done.stderr
    joined(stand_in, BACKENDS[backend])


@pytest.mark.multirank
def test_torchrun_starts_all_ranks_again_when_one_has_died(stand_in: Path) -> None:
    launcher = [str(LAUNCHERS / "torchrun.sh"), *ARGUMENTS]
    done = run(launcher, stand_in, DIES="1", MAX_RESTARTS="1")
    assert done.returncode == 0, done.stderr
    joined(stand_in, restarts="1")


@pytest.mark.multirank
def test_many_nodes_may_be_one(stand_in: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    done = run(
        [str(LAUNCHERS / "multi_node.sh"), *ARGUMENTS],
        stand_in,
        NODES="1",
        NODE_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
    )
    assert done.returncode == 0, done.stderr
    joined(stand_in)


@pytest.mark.multirank
@pytest.mark.parametrize(
    ("config", "backend"), [("ddp_cpu_2", "ddp"), ("fsdp2", "fsdp2"), ("zero2", "zero2")]
)
def test_the_configs_serve_accelerate_itself(config: str, backend: str, stand_in: Path) -> None:
    needs(backend)
    (stand_in / "launchers").symlink_to(LAUNCHERS)  # their paths are seen from the repository
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    file = f"launchers/accelerate/{config}.yaml"
    on_cpu = "DS_ACCELERATOR=cpu" if backend.startswith("zero") else "ACCELERATE_USE_CPU=true"
    done = run(
        [*launch, "--config_file", file, "--num_processes", "2", "-m", "cmkd_scale", *EXPECTED],
        stand_in,
        **dict([on_cpu.split("=")]),
    )
    assert done.returncode == 0, done.stderr
    joined(stand_in, BACKENDS[backend])


@pytest.mark.parametrize("file", sorted((LAUNCHERS / "deepspeed").iterdir()), ids=lambda p: p.stem)
def test_deepspeed_configs_leave_the_optimizer_and_the_precision_to_the_program(file: Path) -> None:
    config = json.loads(file.read_text())
    assert config["zero_optimization"]["stage"] == int(file.stem.removesuffix("_offload")[-1])
    assert config["zero_allow_untested_optimizer"] is True
    assert config["zero_force_ds_cpu_optimizer"] is False
    assert not {"bf16", "fp16", "optimizer", "scheduler", "gradient_clipping"} & set(config)


def test_what_is_missing_or_unknown_is_named(tmp_path: Path) -> None:
    unknown = run([str(LAUNCHERS / "one_node.sh"), *ARGUMENTS], tmp_path, BACKEND="zero4")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "BACKEND=zero4 is unknown: ddp, fsdp2, zero1" in unknown.stderr
    missing = run(
        [str(LAUNCHERS / "multi_node.sh"), *ARGUMENTS], tmp_path, NODES="2", NODE_RANK="0"
    )
    assert missing.returncode == 2
    assert missing.stderr.startswith("MASTER_ADDR is not set\nusage:")


@pytest.mark.parametrize("launcher", ["one_node.sh", "multi_node.sh", "torchrun.sh"])
def test_usage_is_told(launcher: str, tmp_path: Path) -> None:
    asked = run([str(LAUNCHERS / launcher), "--help"], tmp_path)
    forgotten = run([str(LAUNCHERS / launcher), "student"], tmp_path)
    assert (asked.returncode, forgotten.returncode) == (0, 2)
    assert "usage:" in asked.stdout
    assert forgotten.stderr == asked.stdout
