"""Manifests as they are rendered, and as controllers and kubelets understand them."""

from __future__ import annotations

import copy
import functools
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from cmkd_scale.operations.kubernetes import render
from cmkd_scale.operations.kubernetes_kinds import KINDS
from tests.conftest import REPOSITORY

Manifest = dict[str, Any]

BASE = REPOSITORY / "k8s" / "base"
STUDENT = REPOSITORY / "configs" / "numbers" / "student.yaml"
CLUSTERS: dict[str, dict[str, Any]] = {
    "cpu": {"nodes": 2},
    "gpu": {
        "nodes": 4,
        "gpus_per_node": 8,
        "queue": "research",
        "namespace": "ml",
        "secret": "credentials",
        "pvc_size": "1Ti",
        "memory": "1024Gi",
    },
}
"""Options of two clusters that between them use all that may be left out."""
BASE_OPTIONS: dict[str, Any] = {"nodes": 2, "pvc_size": "20Gi"}
"""Of k8s/base; as its kustomization.yaml tells."""
RENDERED = [(kind, cluster) for kind in KINDS for cluster in CLUSTERS]


def read(directory: Path) -> dict[str, list[Manifest]]:
    """Manifests of a directory by file, less its kustomization."""
    return {
        file.name: list(yaml.safe_load_all(file.read_text()))
        for file in sorted(directory.glob("*.yaml"))
        if file.name != "kustomization.yaml"
    }


def render_again(kind: str, config: Path = STUDENT, **options: Any) -> list[Manifest]:
    """What is rendered for options, in the order of files."""
    with tempfile.TemporaryDirectory() as directory:
        render(config, kind, Path(directory), **options)
        return [each for objects in read(Path(directory)).values() for each in objects]


@functools.cache
def _rendered(kind: str, cluster: str) -> list[Manifest]:
    return render_again(kind, **CLUSTERS[cluster])


def rendered(kind: str, cluster: str) -> list[Manifest]:
    """What is rendered for one of ``CLUSTERS``; the caller's own."""
    return copy.deepcopy(_rendered(kind, cluster))


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [each for each in manifests if each["kind"] == kind]


def job_specs(manifests: list[Manifest]) -> dict[str, Manifest]:
    """The spec of each Job that comes to be, by name, with what its controller adds."""
    specs = {each["metadata"]["name"]: each["spec"] for each in of_kind(manifests, "Job")}
    for each in of_kind(manifests, "JobSet"):
        for replicated in each["spec"]["replicatedJobs"]:
            name = f"{each['metadata']['name']}-{replicated['name']}-0"
            specs[name] = replicated["template"]["spec"]
            specs[name]["template"]["spec"]["subdomain"] = each["metadata"]["name"]
    for each in of_kind(manifests, "TrainJob"):
        (runtime,) = of_kind(manifests, "ClusterTrainingRuntime")
        specs[f"{each['metadata']['name']}-node-0"] = _train(each, copy.deepcopy(runtime))
    return specs


def _train(job: Manifest, runtime: Manifest) -> Manifest:
    """What Kubeflow Trainer makes of a TrainJob and its runtime (its plugins torch and jobset)."""
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    ancestor = node["template"]["metadata"]["labels"]
    assert (node["name"], ancestor) == (
        "node",
        {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"},
    )
    spec: Manifest = node["template"]["spec"]
    trainer, name = job["spec"]["trainer"], job["metadata"]["name"]
    spec["completions"] = spec["parallelism"] = trainer["numNodes"]
    pod = spec["template"]
    (patch,) = job["spec"]["runtimePatches"]
    (patched,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    change = patched["template"]["spec"]["template"]
    pod["metadata"]["labels"] |= change["metadata"]["labels"]
    pod["spec"]["volumes"] += change["spec"]["volumes"]
    pod["spec"]["subdomain"] = name
    (container,), (container_change,) = pod["spec"]["containers"], change["spec"]["containers"]
    assert container["name"] == container_change["name"] == "node"
    container["volumeMounts"] += container_change["volumeMounts"]
    container |= {"image": trainer["image"], "args": trainer["args"]}
    container["resources"] = trainer["resourcesPerNode"]
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    container["env"] += [
        {"name": "PET_NNODES", "value": str(trainer["numNodes"])},
        {"name": "PET_NPROC_PER_NODE", "value": str(trainer["numProcPerNode"])},
        {"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": index}}},
        {"name": "PET_MASTER_ADDR", "value": f"{name}-node-0-0.{name}"},
        {"name": "PET_MASTER_PORT", "value": "29500"},
    ]
    return spec


def pod_of(job: Manifest) -> Manifest:
    """The spec of a job's pods."""
    return dict(job["template"]["spec"])


def container_of(job: Manifest) -> Manifest:
    """The one container of a job's pods."""
    (container,) = job["template"]["spec"]["containers"]
    return dict(container)


def variables(container: Manifest, index: int = 0) -> dict[str, str]:
    """The container's environment in the pod of that index."""
    return {
        each["name"]: each["value"] if "value" in each else str(index) for each in container["env"]
    }


def after(job: Manifest, exit_code: int, *, disrupted: bool = False) -> str:
    """What the Job controller does about a pod that has failed: FailJob, Ignore or Count."""
    for rule in job["podFailurePolicy"]["rules"]:
        codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions")
        if codes is not None and codes["operator"] == "In" and exit_code in codes["values"]:
            return str(rule["action"])
        if disrupted and conditions == [{"type": "DisruptionTarget", "status": "True"}]:
            return str(rule["action"])
    return "Count"


def image_variables(target: str = "cpu") -> dict[str, str]:
    """What the Dockerfile's ENV of the images says."""
    text = (REPOSITORY / "Dockerfile").read_text().replace("\\\n", " ")
    text = text.replace("$PATH", "/usr/local/bin:/usr/bin:/bin")
    found: dict[str, str] = {}
    for stage in re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]:
        if re.match(rf"\S+ AS (runtime|{target})\n", stage):
            for line in re.findall(r"^ENV (.*)$", stage, flags=re.MULTILINE):
                found |= dict(word.split("=", 1) for word in line.split())
    return found


def sources() -> dict[str, tuple[list[Manifest], dict[str, Any]]]:
    """All sets of manifests with the options that they were rendered for."""
    found = {f"{kind}-{c}": (rendered(kind, c), CLUSTERS[c]) for kind, c in RENDERED}
    lying = [each for objects in read(BASE).values() for each in objects]
    return {**found, "base": (lying, BASE_OPTIONS)}


def every_job() -> list[Any]:
    """Parameters of a test: the spec of each job of all sets, and its options."""
    return [
        pytest.param(spec, options, id=f"{source}-{name}")
        for source, (manifests, options) in sources().items()
        for name, spec in job_specs(manifests).items()
    ]
