"""What pods may do and what they are given: Pod Security "restricted", resources, places."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.k8s.rendered import (
    Manifest,
    container_of,
    every_job,
    image_variables,
    job_specs,
    of_kind,
    pod_of,
    rendered,
    sources,
)

UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def size(quantity: str) -> int:
    return int(quantity[:-2]) * UNITS[quantity[-2:]]


jobs = pytest.mark.parametrize(("job", "options"), every_job())


@pytest.fixture(params=sources())
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    return sources()[request.param][0]


@jobs
def test_nothing_of_the_host_is_used(job: Manifest, options: Any) -> None:
    pod = pod_of(job)
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers", "hostUsers"} & set(pod)
    assert not any("hostPort" in port for port in container_of(job)["ports"])
    allowed = {"emptyDir", "persistentVolumeClaim", "configMap", "name"}
    assert all(set(volume) <= allowed for volume in pod["volumes"])


@jobs
def test_no_root_and_no_privileges(job: Manifest, options: Any) -> None:
    pod, own = pod_of(job)["securityContext"], container_of(job)["securityContext"]
    assert pod["runAsNonRoot"] is True
    assert pod["runAsUser"] > 0
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    # Exactly these: a container's keys win over the pod's.
    assert own == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }


@jobs
def test_the_user_is_that_of_the_image(job: Manifest, options: Any) -> None:
    (user,) = re.findall(r"^USER (\d+):(\d+)$", (REPOSITORY / "Dockerfile").read_text(), re.M)
    context = pod_of(job)["securityContext"]
    ids = {context[key] for key in ("runAsUser", "runAsGroup", "fsGroup")}
    assert ids == {int(number) for number in user}


@jobs
def test_no_token_and_no_secret_in_plain_sight(job: Manifest, options: Any) -> None:
    pod, container = pod_of(job), container_of(job)
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    given = [{"secretRef": {"name": options["secret"]}}] if "secret" in options else None
    assert container.get("envFrom") == given
    suspicious = re.compile("KEY|TOKEN|SECRET|PASSWORD")
    assert not any(suspicious.search(each["name"]) for each in container["env"])


@jobs
def test_what_is_asked_for_is_what_is_given(job: Manifest, options: Any) -> None:
    container = container_of(job)
    requests, limits = container["resources"]["requests"], container["resources"]["limits"]
    assert requests == limits
    assert {"cpu", "memory"} <= set(limits)
    gpus = options.get("gpus_per_node")
    assert limits.get("nvidia.com/gpu") == (None if gpus is None else str(gpus))


@jobs
def test_every_directory_that_is_written_to_is_a_volume(job: Manifest, options: Any) -> None:
    container, pod = container_of(job), pod_of(job)
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    places = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert {mount["name"] for mount in places.values()} == set(volumes)
    assert {place for place, mount in places.items() if mount.get("readOnly")} == {"/etc/cmkd"}
    told = image_variables()
    assert {told["HOME"], told["CMKD_CACHE"], "/tmp", "/dev/shm", "/data"} <= set(places)
    shm = volumes[places["/dev/shm"]["name"]]["emptyDir"]
    assert shm["medium"] == "Memory"
    assert size(shm["sizeLimit"]) < size(container["resources"]["limits"]["memory"])
    assert all(
        "sizeLimit" in volume["emptyDir"] for volume in volumes.values() if "emptyDir" in volume
    )


@jobs
def test_pods_are_spread_over_machines_of_one_zone(job: Manifest, options: Any) -> None:
    pod, labels = pod_of(job), job["template"]["metadata"]["labels"]
    (spread,) = pod["topologySpreadConstraints"]
    assert (spread["maxSkew"], spread["topologyKey"]) == (1, "kubernetes.io/hostname")
    rules = pod["affinity"]["podAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert [r["podAffinityTerm"]["topologyKey"] for r in rules] == ["topology.kubernetes.io/zone"]
    for selector in (spread["labelSelector"], rules[0]["podAffinityTerm"]["labelSelector"]):
        assert selector["matchLabels"].items() <= labels.items()


@jobs
def test_the_image_has_a_version(job: Manifest, options: Any) -> None:
    container = container_of(job)
    _, _, tag = container["image"].rpartition(":")
    assert tag not in ("", "latest")
    assert tag.endswith("cuda" if "gpus_per_node" in options else "cpu")
    assert container["imagePullPolicy"] == "IfNotPresent"


def test_a_claim_can_be_written_to_by_all(manifests: list[Manifest]) -> None:
    for claim in of_kind(manifests, "PersistentVolumeClaim"):
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    claims = {
        volume["persistentVolumeClaim"]["claimName"]
        for job in job_specs(manifests).values()
        for volume in pod_of(job)["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert claims == {"cmkd-runs"}


def test_everything_that_has_a_namespace_is_in_the_one() -> None:
    for kind in ("jobset", "trainjob", "job"):
        for each in rendered(kind, "gpu"):
            wanted = None if each["kind"] == "ClusterTrainingRuntime" else "ml"
            assert each["metadata"].get("namespace") == wanted


def test_what_kueue_admits_is_queued() -> None:
    for kind, queued in (("jobset", "JobSet"), ("trainjob", "TrainJob"), ("job", "Job")):
        found = [each for each in rendered(kind, "gpu") if "kueue" in str(each["metadata"])]
        assert {each["kind"] for each in found} == {queued}
        for each in found:
            assert each["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
