"""What lies in ``k8s/`` is what is rendered, and its overlays are what is rendered for them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cmkd_scale import __version__
from tests.conftest import REPOSITORY
from tests.k8s.rendered import BASE, BASE_OPTIONS, Manifest, read, render_again

OVERLAYS: dict[str, dict[str, Any]] = {
    "base": {},
    "overlays/gpu": {"gpus_per_node": 1},
    "overlays/kueue": {"namespace": "research", "queue": "research"},
}


@pytest.fixture(scope="module")
def kubectl() -> Path:
    """The one that is installed with the development tools, else any."""
    found = shutil.which("kubectl", path=str(Path(sys.executable).parent)) or shutil.which(
        "kubectl"
    )
    if found is None:
        pytest.skip("no kubectl on this machine; the extra 'dev' has it")
    return Path(found)


def built(kubectl: Path, directory: str) -> list[Manifest]:
    """What would be applied."""
    done = subprocess.run(
        [kubectl, "kustomize", str(REPOSITORY / "k8s" / directory)],
        env={"HOME": "/nonexistent"},  # no cluster is asked
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return list(yaml.safe_load_all(done.stdout))


def by_name(manifests: list[Manifest]) -> dict[tuple[str, str], Manifest]:
    return {(each["kind"], each["metadata"]["name"]): each for each in manifests}


def test_the_base_is_rendered_and_nothing_else() -> None:
    lying = [each for objects in read(BASE).values() for each in objects]
    assert by_name(lying) == by_name(render_again("jobset", **BASE_OPTIONS))
    listed = yaml.safe_load((BASE / "kustomization.yaml").read_text())["resources"]
    assert sorted(listed) == sorted(read(BASE))
    # The command that a reader is told is the one that was run here.
    told = (BASE / "kustomization.yaml").read_text()
    assert "--config configs/numbers/student.yaml --kind jobset --out k8s/base" in told
    assert "--nodes 2 --pvc-size 20Gi" in told


@pytest.mark.parametrize("directory", OVERLAYS)
def test_an_overlay_gives_what_is_rendered(kubectl: Path, directory: str) -> None:
    wanted = render_again("jobset", **BASE_OPTIONS, **OVERLAYS[directory])
    assert by_name(built(kubectl, directory)) == by_name(wanted)


def test_monitoring_can_be_built(kubectl: Path) -> None:
    kinds = {each["kind"] for each in built(kubectl, "monitoring")}
    assert kinds == {"ConfigMap", "PodMonitor", "PrometheusRule"}


def test_images_are_of_this_version() -> None:
    overlay = yaml.safe_load((REPOSITORY / "k8s/overlays/gpu/kustomization.yaml").read_text())
    assert overlay["images"] == [{"name": "cmkd-scale", "newTag": f"{__version__}-cuda"}]
