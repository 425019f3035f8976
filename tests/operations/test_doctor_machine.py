from __future__ import annotations

import socket
from pathlib import Path

import pytest

from cmkd_scale.config import Config, make_config
from cmkd_scale.operations import doctor_machine as machine
from cmkd_scale.operations.doctor_findings import Finding

SEVERAL = {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}


def severities(findings: list[Finding]) -> list[str]:
    return [finding.severity for finding in findings]


def test_one_build_of_faiss() -> None:
    assert severities(machine.packages(lambda name: name == "faiss-cpu")) == ["ok"]
    two = machine.packages(lambda name: name in ("faiss-cpu", "faiss-gpu-cu12"))
    assert severities(two) == ["blocker"]
    assert "faiss-cpu and faiss-gpu-cu12" in two[0].found
    assert severities(machine.packages(lambda name: False)) == ["blocker"]


def gpus(
    environment: dict[str, str],
    *,
    cuda: bool,
    count: int = 8,
    there: bool = True,
    bf16: bool = True,
    precision: str = "no",
) -> Finding:
    config = make_config({"train": {"mixed_precision": precision}})
    (found,) = machine.devices(config, environment, cuda=cuda, count=count, there=there, bf16=bf16)
    return found


def test_a_gpu_that_torch_cannot_use() -> None:
    assert gpus({}, cuda=False).severity == "blocker"
    assert gpus({}, cuda=False, there=False).severity == "ok"
    assert gpus({"ACCELERATE_USE_CPU": "true"}, cuda=False).severity == "ok"
    assert gpus({"CUDA_VISIBLE_DEVICES": ""}, cuda=False).severity == "ok"


def test_more_local_ranks_than_gpus() -> None:
    assert gpus({"LOCAL_WORLD_SIZE": "8"}, cuda=True).severity == "ok"
    found = gpus({"LOCAL_WORLD_SIZE": "8"}, cuda=True, count=4)
    assert (found.severity, found.remedy) == ("blocker", "Start 4 processes on each machine.")


def test_bfloat16_that_is_emulated() -> None:
    assert gpus({}, cuda=True, precision="bf16").severity == "ok"
    assert gpus({}, cuda=True, precision="bf16", bf16=False).severity == "warning"


def nowhere(name: str) -> str:
    raise socket.gaierror(-2, "Name or service not known")


def test_own_name_without_an_address() -> None:
    assert severities(machine.names({}, own="node7", resolve=nowhere)) == ["warning"]
    assert severities(machine.names(SEVERAL, own="node7", resolve=nowhere)) == ["blocker"]


def test_own_name_that_means_the_loopback_device() -> None:
    def loopback(name: str) -> str:
        return "127.0.1.1"

    assert severities(machine.names({}, own="node7", resolve=loopback)) == ["ok"]
    (found,) = machine.names(SEVERAL, own="node7", resolve=loopback)
    assert found.severity == "blocker"
    assert "GLOO_SOCKET_IFNAME" in found.remedy
    named = {**SEVERAL, "GLOO_SOCKET_IFNAME": "eth0"}
    assert severities(machine.names(named, own="node7", resolve=loopback)) == ["ok"]


def test_master_without_an_address() -> None:
    def resolve(name: str) -> str:
        return "10.0.0.7" if name == "node7" else nowhere(name)

    environment = {**SEVERAL, "MASTER_ADDR": "job-0.job"}
    (found,) = machine.names(environment, own="node7", resolve=resolve)
    assert found.severity == "blocker"
    assert "MASTER_ADDR=job-0.job" in found.found
    assert severities(machine.names(SEVERAL, own="node7", resolve=resolve)) == ["ok"]


def test_master_port_that_does_not_answer() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "1"}
        assert severities(machine.master_port(environment, seconds=0.0)) == ["ok"]
    assert severities(machine.master_port(environment, seconds=0.0)) == ["blocker"]
    assert machine.master_port({**environment, "RANK": "0"}, seconds=0.0) == []
    assert machine.master_port({}, seconds=0.0) == []


def with_workers(workers: int) -> Config:
    return make_config({"data": {"workers": workers}})


def test_shared_memory_that_workers_fill(tmp_path: Path) -> None:
    assert machine.shared_memory(with_workers(0), 2**60, 8, directory=tmp_path) == []
    assert severities(machine.shared_memory(with_workers(4), 2**10, 8, directory=tmp_path)) == [
        "ok"
    ]
    (found,) = machine.shared_memory(with_workers(4), 2**60, 8, directory=tmp_path)
    assert found.severity == "blocker"
    assert "--shm-size" in found.remedy


def test_memory_is_that_of_the_container(tmp_path: Path) -> None:
    limit, used = tmp_path / "max", tmp_path / "current"
    limit.write_text("1000\n")
    used.write_text("400\n")
    assert machine.available_memory(limit, used) == 600
    limit.write_text("max\n")
    assert machine.available_memory(limit, used) > 2**20


@pytest.mark.parametrize(
    ("size", "text"), [(12, "12 bytes"), (1536, "1.5 KiB"), (3 * 2**40, "3072.0 GiB")]
)
def test_sizes_in_words(size: int, text: str) -> None:
    assert machine.in_units(size) == text
