"""What ``cmkd doctor`` asks of the machine of a rank: devices, packages, names, ports, memory."""

from __future__ import annotations

import glob
import os
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

import psutil
import torch

from cmkd_scale.config import Config
from cmkd_scale.operations.doctor_findings import Finding, Severity

FAISS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12")
"""Distributions that all install the module ``faiss``."""

_CONNECT_SECONDS = 10.0
_BATCHES_ON_THE_WAY = 3  # of a decoding worker: two that were asked for, one that is read
_GROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_GROUP_USED = Path("/sys/fs/cgroup/memory.current")

Resolve = Callable[[str], str]


def installed(name: str) -> bool:
    """Whether a distribution is installed here."""
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def packages(is_installed: Callable[[str], bool] = installed) -> list[Finding]:
    """One build of FAISS, no more and no less."""
    found = [name for name in FAISS if is_installed(name)]
    if len(found) == 1:
        return [Finding("packages", "ok", found[0])]
    if found:
        return [
            Finding(
                "packages",
                "blocker",
                f"{' and '.join(found)} are installed together, and each has overwritten files of "
                "the other's module faiss.",
                f"pip uninstall -y {' '.join(found)}, then install one of the extras cpu and gpu.",
            )
        ]
    return [
        Finding(
            "packages",
            "blocker",
            "FAISS is not installed, and memories are built and read with it.",
            "pip install 'cmkd_scale[cpu]' (or [gpu]).",
        )
    ]


def devices(
    config: Config,
    environment: Mapping[str, str],
    *,
    cuda: bool,
    count: int,
    there: bool,
    bf16: bool,
) -> list[Finding]:
    """GPUs that are there are used, and each local rank has one.

    Args:
        config: of the run.
        environment: of the launcher.
        cuda: whether torch can use a GPU.
        count: GPUs that it sees.
        there: whether the system has one.
        bf16: whether it computes in bfloat16.
    """
    hidden = environment.get("CUDA_VISIBLE_DEVICES") == ""
    wants_cpu = environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if there and not cuda and not hidden and not wants_cpu:
        return [
            Finding(
                "devices",
                "blocker",
                f"This machine has a GPU, and torch {torch.__version__} cannot use it: the run "
                "would train on the CPU.",
                "Install the build of torch for its CUDA version and a driver that is new enough; "
                "or set ACCELERATE_USE_CPU=true to train on the CPU.",
            )
        ]
    local = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if cuda and not wants_cpu and local > count:
        return [
            Finding(
                "devices",
                "blocker",
                f"{local} processes of this machine share {count} GPUs, and NCCL refuses two on "
                "one.",
                f"Start {count} processes on each machine.",
            )
        ]
    if cuda and config.train.mixed_precision == "bf16" and not bf16:
        return [
            Finding(
                "devices",
                "warning",
                "train.mixed_precision=bf16 is emulated on this GPU, slower than float32.",
                "Set train.mixed_precision=no.",
            )
        ]
    return [Finding("devices", "ok", f"{count} GPUs" if cuda else "CPU")]


def seen_devices(config: Config) -> list[Finding]:
    """``devices`` of this machine."""
    cuda = torch.cuda.is_available()
    return devices(
        config,
        os.environ,
        cuda=cuda,
        count=torch.cuda.device_count(),
        there=bool(glob.glob("/dev/nvidia[0-9]*")),
        bf16=cuda and torch.cuda.is_bf16_supported(including_emulation=False),
    )


def names(
    environment: Mapping[str, str],
    *,
    own: str | None = None,
    resolve: Resolve = socket.gethostbyname,
) -> list[Finding]:
    """The names by which ranks find each other have addresses.

    Args:
        environment: of the launcher.
        own: name of this machine.
        resolve: from a name to an address; OSError if it has none.
    """
    own = own or socket.gethostname()
    findings = []
    ranks = int(environment.get("WORLD_SIZE", "1"))
    several = ranks > int(environment.get("LOCAL_WORLD_SIZE", str(ranks)))
    remedy = (
        "Put its address on the network into the DNS or /etc/hosts, or name the interface with "
        "GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME)."
    )
    try:
        address = resolve(own)
    except OSError as error:
        severity: Severity = "blocker" if several else "warning"
        text = f"The own name of this machine, {own}, has no address ({error})."
        findings.append(Finding("names", severity, text, remedy))
    else:
        named = "GLOO_SOCKET_IFNAME" in environment or "NCCL_SOCKET_IFNAME" in environment
        if several and address.startswith("127.") and not named:
            text = (
                f"The own name of this machine, {own}, means {address}: other machines are told "
                "to look for its ranks on themselves."
            )
            findings.append(Finding("names", "blocker", text, remedy))
    master = environment.get("MASTER_ADDR")
    if master is not None:
        try:
            resolve(master)
        except OSError as error:
            findings.append(
                Finding(
                    "names",
                    "blocker",
                    f"MASTER_ADDR={master} has no address here ({error}).",
                    "Give the launcher the name or address of the first machine as the others "
                    "see it; on Kubernetes, that of its headless service.",
                )
            )
    return findings or [Finding("names", "ok", f"{own} has an address")]


def master_port(
    environment: Mapping[str, str], *, seconds: float = _CONNECT_SECONDS
) -> list[Finding]:
    """Ranks other than 0 reach the port at which all meet."""
    address, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    if address is None or port is None or environment.get("RANK", "0") == "0":
        return []
    ends = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, int(port)), timeout=max(1.0, seconds)).close()
            return [Finding("master port", "ok", f"{address}:{port} answers")]
        except OSError as error:
            if time.monotonic() >= ends:
                return [
                    Finding(
                        "master port",
                        "blocker",
                        f"The port at which all ranks meet, {address}:{port}, does not answer "
                        f"({error}).",
                        "Start rank 0, open the port between the machines, or choose another with "
                        "MASTER_PORT.",
                    )
                ]
            time.sleep(0.5)


def metrics_port(config: Config, environment: Mapping[str, str]) -> list[Finding]:
    """The port of this rank's metrics is free."""
    first = config.monitor.prometheus_port
    if not first:
        return []
    port = first + int(environment.get("LOCAL_RANK", "0"))
    address = config.monitor.prometheus_address
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
    except (OSError, OverflowError) as error:
        return [
            Finding(
                "metrics port",
                "warning",
                f"{address}:{port} cannot be listened on ({error}): metrics would be served at "
                "another port or not at all.",
                "Choose a free range with monitor.prometheus_port, one port for each local rank.",
            )
        ]
    return [Finding("metrics port", "ok", f"{address}:{port} is free")]


def shared_memory(
    config: Config, batch_bytes: int, local_ranks: int, *, directory: Path = Path("/dev/shm")
) -> list[Finding]:
    """The batches that decoding workers hand over fit into shared memory.

    Args:
        config: of the run.
        batch_bytes: of a rank's decoded batch.
        local_ranks: of this machine.
        directory: where shared memory is mounted.
    """
    workers = config.data.workers
    if not workers or not directory.is_dir():
        return []
    needed = local_ranks * workers * _BATCHES_ON_THE_WAY * batch_bytes
    free = shutil.disk_usage(directory).free
    if needed > free:
        return [
            Finding(
                "shared memory",
                "blocker",
                f"{workers} workers of {local_ranks} ranks hand over up to {in_units(needed)} at a "
                f"time through {directory}, which has {in_units(free)}: they would be killed "
                "(signal 7).",
                "Give the container more (docker run --shm-size; on Kubernetes an emptyDir with "
                "medium: Memory at /dev/shm), or set fewer data.workers.",
            )
        ]
    return [Finding("shared memory", "ok", f"{in_units(needed)} of {in_units(free)}")]


def available_memory(group_limit: Path = _GROUP_LIMIT, group_used: Path = _GROUP_USED) -> int:
    """Bytes that programs may still take here: of the machine, and of the container's limit."""
    available = int(psutil.virtual_memory().available)
    try:
        return min(available, int(group_limit.read_text()) - int(group_used.read_text()))
    except (OSError, ValueError):  # no such limit
        return available


def in_units(size: float) -> str:
    """Bytes in words."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
