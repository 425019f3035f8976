"""Prometheus and its promtool, which are programs of the system."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.k8s.files import rules
from tests.k8s.server import Server, serve


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} on this machine; Debian's package prometheus has it")
    return found


@pytest.fixture(scope="session")
def promtool() -> str:
    """Path of promtool, or skip."""
    return _program("promtool")


@pytest.fixture(scope="session")
def prometheus() -> str:
    """Path of the server, or skip."""
    return _program("prometheus")


@pytest.fixture
def rule_directory(tmp_path: Path) -> Path:
    """Holds ``rules.yaml`` as the operator would write it."""
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules(), width=1000))
    return tmp_path


@pytest.fixture(scope="module")
def empty_server(prometheus: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that scrapes nothing."""
    with serve(prometheus, tmp_path_factory.mktemp("prometheus"), {}) as server:
        yield server


def run(*command: str | Path, cwd: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run a tool to its end."""
    return subprocess.run(
        command, cwd=cwd, input=stdin, capture_output=True, text=True, timeout=60, check=False
    )
