"""The Dockerfile: linted, pinned, without a compiler or root in what runs; its health check."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cmkd_scale.monitoring.exporter import PrometheusSink
from tests.conftest import REPOSITORY

DOCKERFILE = REPOSITORY / "Dockerfile"
HEALTH = REPOSITORY / "launchers" / "health.py"


def instructions(stage: str) -> list[tuple[str, str]]:
    """Name and arguments of each instruction of a stage, the lines of it joined."""
    text = DOCKERFILE.read_text()
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    (body,) = re.findall(rf"^FROM \S+ AS {stage}\n(.*?)(?=^FROM |\Z)", text, re.M | re.S)
    lines = [line.partition(" ") for line in body.splitlines() if line]
    return [(name, words) for name, _, words in lines]


def test_hadolint_has_nothing_to_say() -> None:
    found = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip("no hadolint here; the extra 'dev' has it")
    done = subprocess.run([found, DOCKERFILE], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_bases_are_pinned_by_their_digest() -> None:
    text = DOCKERFILE.read_text()
    outer = text[: text.index("\nFROM ")]
    images = dict(re.findall(r"^ARG (\w+_IMAGE)=(\S+)$", outer, re.M))
    assert images
    assert all(re.fullmatch(r"[\w./:-]+@sha256:[0-9a-f]{64}", image) for image in images.values())
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", text, re.M)
    known = {f"${{{name}}}" for name in images}
    for base, stage in stages:
        assert base in known, stage
        known.add(stage)
    assert {"cpu", "cuda"} <= known


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_what_runs_has_nothing_of_what_builds_but_the_environment(target: str) -> None:
    own, shared = instructions(target), instructions("runtime")
    copied = [words for name, words in own if name == "COPY"]
    assert copied == [f"--from=build-{target} /opt/venv /opt/venv"]
    assert [words for name, words in shared if name == "COPY"] == ["launchers /opt/cmkd/launchers"]
    # Nothing is installed, so there is no compiler but in the base, a slim one, which has none.
    assert "slim" in DOCKERFILE.read_text().split("PYTHON_IMAGE=")[1].splitlines()[0]
    commands = " ".join(words for name, words in [*own, *shared] if name == "RUN")
    assert not re.search(r"\b(apt|apt-get|dpkg|curl|wget|pip)\b", commands)


def test_it_runs_as_a_user_without_a_name_to_look_up() -> None:
    shared = dict(instructions("runtime"))
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", shared["USER"])
    assert shared["ENTRYPOINT"] == '["cmkd"]'
    assert "health.py" in shared["HEALTHCHECK"]
    # Also none of the targets goes back to root.
    assert not any(name == "USER" for target in ("cpu", "cuda") for name, _ in instructions(target))


def test_what_is_installed_is_what_is_tested() -> None:
    for stage in ("build", "build-cpu", "build-cuda"):
        for name, words in instructions(stage):
            for command in words.split("&&") if name == "RUN" else []:
                if "pip install" in command and "--no-deps --force" not in command:
                    assert "-c constraints.txt" in command


def test_nothing_reaches_the_builder_but_what_is_copied() -> None:
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    let = {line[1:] for line in ignored if line.startswith("!")}
    stages = ("build", "build-cpu", "build-cuda", "runtime")
    words = [w for stage in stages for name, w in instructions(stage) if name == "COPY"]
    sources = {source.split("/")[0] for each in words for source in each.split()[:-1]}
    assert let == sources


def health(**variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", str(HEALTH)]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("well", [True, False])
def test_the_health_check_asks_the_first_process(well: bool) -> None:
    sink = PrometheusSink(0, health=lambda: (well, "at step 7"))
    try:
        done = health(CMKD_HEALTH_PORT=str(sink.port))
    finally:
        sink.close()
    assert done.returncode == (0 if well else 1)
    assert well or "at step 7" in done.stderr


def test_without_an_endpoint_a_container_that_runs_is_healthy() -> None:
    assert health().returncode == 0


def test_a_process_that_does_not_answer_is_not_healthy() -> None:
    sink = PrometheusSink(0)
    port = str(sink.port)
    sink.close()
    assert health(CMKD_HEALTH_PORT=port).returncode == 1
