"""Rules that all jobs keep so that a gang of ranks can live: failures, network, monitoring."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from cmkd_scale.config import make_config
from cmkd_scale.errors import EXIT_FAULT, EXIT_INTEGRITY, EXIT_PREEMPTED, EXIT_USAGE
from tests.k8s.files import read_yaml
from tests.k8s.rendered import (
    CLUSTERS,
    Manifest,
    after,
    container_of,
    every_job,
    job_specs,
    of_kind,
    pod_of,
    rendered,
    sources,
    variables,
)

jobs = pytest.mark.parametrize(("job", "options"), every_job())


@pytest.fixture(params=sources())
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    return sources()[request.param][0]


# ------------------------------------------------------------------------------- failure and ends


@jobs
@pytest.mark.parametrize(
    ("code", "disrupted", "action"),
    [
        (EXIT_PREEMPTED, False, "Ignore"),
        (EXIT_PREEMPTED, True, "Ignore"),
        (137, True, "Ignore"),
        (137, False, "Count"),
        (EXIT_FAULT, False, "Count"),
        (EXIT_USAGE, False, "FailJob"),
        (EXIT_INTEGRITY, True, "FailJob"),
    ],
)
def test_the_exit_code_decides(
    job: Manifest, options: Any, code: int, disrupted: bool, action: str
) -> None:
    assert pod_of(job)["restartPolicy"] == "Never"  # without it there is no such policy
    assert after(job, code, disrupted=disrupted) == action


def test_a_failure_that_counts_starts_the_whole_gang_again(manifests: list[Manifest]) -> None:
    sets = [each["spec"] for each in of_kind(manifests, "JobSet")]
    runtimes = of_kind(manifests, "ClusterTrainingRuntime")
    sets += [each["spec"]["template"]["spec"] for each in runtimes]
    for each in sets:
        policy = each["failurePolicy"]
        assert policy["maxRestarts"] > 0
        assert policy["restartStrategy"] == "BlockingRecreate"
        # A job fails by its pod policy for codes that are final only; all else is the default,
        # which restarts the set.
        (rule,) = policy["rules"]
        assert rule["action"] == "FailJobSet"
        assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
        for replicated in each["replicatedJobs"]:
            assert replicated["template"]["spec"]["backoffLimit"] == 0
    for job in of_kind(manifests, "Job"):  # each pod of the gang fails, and counts
        assert job["spec"]["backoffLimit"] >= job["spec"]["parallelism"]


@jobs
def test_a_rank_is_replaced_when_it_has_ended_only(job: Manifest, options: Any) -> None:
    assert job["podReplacementPolicy"] == "Failed"
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"] == options["nodes"]


@jobs
def test_there_is_time_to_save(job: Manifest, options: Any) -> None:
    # Kubernetes' 30 seconds are what launchers give; a step and a checkpoint take longer.
    assert pod_of(job)["terminationGracePeriodSeconds"] >= 300


@jobs
def test_nothing_but_the_watchdog_ends_a_run_that_hangs(job: Manifest, options: Any) -> None:
    container = container_of(job)
    assert not {"livenessProbe", "startupProbe", "lifecycle"} & set(container)
    assert container["readinessProbe"]["httpGet"] == {"path": "/healthz", "port": "metrics"}


# ---------------------------------------------------------------------- how pods find each other


@jobs
def test_ranks_are_told_who_they_are(job: Manifest, options: Any) -> None:
    container = container_of(job)
    names = [each["name"] for each in container["env"]]
    assert len(names) == len(set(names))
    told = variables(container)
    assert told["PET_NNODES"] == str(options["nodes"])
    assert told["PET_NPROC_PER_NODE"] == str(options.get("gpus_per_node", 1))
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert told["PET_MASTER_PORT"] == str(ports["rendezvous"])
    (rank,) = (each for each in container["env"] if each["name"] == "PET_NODE_RANK")
    field = rank["valueFrom"]["fieldRef"]["fieldPath"]
    assert field == "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def test_the_first_pod_has_the_name_that_all_wait_for(manifests: list[Manifest]) -> None:
    for name, job in job_specs(manifests).items():
        subdomain = pod_of(job)["subdomain"]
        assert variables(container_of(job))["PET_MASTER_ADDR"] == f"{name}-0.{subdomain}"
        assert len(f"{name}-{job['completions']}") <= 63


def test_names_are_known_before_pods_are_ready(manifests: list[Manifest]) -> None:
    sets = [each["spec"] for each in of_kind(manifests, "JobSet")]
    runtimes = of_kind(manifests, "ClusterTrainingRuntime")
    sets += [each["spec"]["template"]["spec"] for each in runtimes]
    for each in sets:
        assert each["network"] == {"enableDNSHostnames": True, "publishNotReadyAddresses": True}
    services = {each["metadata"]["name"]: each["spec"] for each in of_kind(manifests, "Service")}
    plain = {each["metadata"]["name"]: each["spec"] for each in of_kind(manifests, "Job")}
    assert set(services) == set(plain)
    for name, service in services.items():
        assert service["clusterIP"] == "None"
        assert service["publishNotReadyAddresses"] is True
        labels = plain[name]["template"]["metadata"]["labels"]
        assert service["selector"].items() <= labels.items()
        assert plain[name]["template"]["spec"]["subdomain"] == name


@jobs
def test_the_network_between_pods_is_named(job: Manifest, options: Any) -> None:
    told = variables(container_of(job))
    assert told["NCCL_SOCKET_IFNAME"] == told["GLOO_SOCKET_IFNAME"] == "eth0"


def test_pods_talk_among_themselves_and_are_scraped_and_no_more(manifests: list[Manifest]) -> None:
    (policy,) = of_kind(manifests, "NetworkPolicy")
    spec = policy["spec"]
    assert set(spec["policyTypes"]) == {"Ingress", "Egress"}
    chosen = spec["podSelector"]["matchLabels"]
    for job in job_specs(manifests).values():
        assert chosen.items() <= job["template"]["metadata"]["labels"].items()
        ports = {port["containerPort"] for port in container_of(job)["ports"]} - {29500}
        inner, scraped = spec["ingress"]
        assert inner == {"from": [{"podSelector": spec["podSelector"]}]}
        (window,) = scraped["ports"]
        assert set(range(window["port"], window["endPort"] + 1)) == ports
    assert {"to": [{"podSelector": spec["podSelector"]}]} in spec["egress"]
    out = [port["port"] for rule in spec["egress"] for port in rule.get("ports", [])]
    progress = [10443] if of_kind(manifests, "TrainJob") else []
    assert out == [53, 53, 443, *progress]


# ---------------------------------------------------------- what k8s/monitoring wants, and configs


@jobs
def test_prometheus_finds_every_rank(job: Manifest, options: Any) -> None:
    monitor = read_yaml("pod_monitor.yaml")["spec"]
    labels = job["template"]["metadata"]["labels"]
    assert monitor["selector"]["matchLabels"].items() <= labels.items()
    assert labels[monitor["jobLabel"]]
    (endpoint,) = monitor["podMetricsEndpoints"]
    pattern = re.compile(endpoint["relabelings"][0]["regex"])
    found = {
        port["name"]: port["containerPort"]
        for port in container_of(job)["ports"]
        if pattern.fullmatch(port["name"])
    }
    names = [f"metrics-{n}" if n else "metrics" for n in range(options.get("gpus_per_node", 1))]
    assert found == {name: 9400 + number for number, name in enumerate(names)}


def test_runs_are_told_apart(manifests: list[Manifest]) -> None:
    specs = job_specs(manifests).values()
    runs = [spec["template"]["metadata"]["labels"]["cmkd.dev/run"] for spec in specs]
    assert runs == ["numbers-teacher", "numbers-memory", "numbers-student"]


def test_configs_are_valid_and_are_those_that_are_run(manifests: list[Manifest]) -> None:
    (configs,) = of_kind(manifests, "ConfigMap")
    used = set()
    for job in job_specs(manifests).values():
        container, pod = container_of(job), pod_of(job)
        verb, path = container["args"]
        assert container["command"] == ["/opt/cmkd/launchers/entrypoint.sh"]
        assert verb in path
        used.add(path.removeprefix("/etc/cmkd/"))
        (volume,) = (each for each in pod["volumes"] if "configMap" in each)
        assert volume["configMap"]["name"] == configs["metadata"]["name"]
        assert container["workingDir"] == "/data"
    assert used == set(configs["data"])
    for text in configs["data"].values():
        config = make_config(yaml.safe_load(text))
        assert config.monitor.prometheus_port == 9400
        assert config.monitor.prometheus_address == "0.0.0.0"


def test_a_stage_begins_when_the_one_before_is_complete() -> None:
    (jobset,) = of_kind(rendered("jobset", "gpu"), "JobSet")
    order = [(each["name"], each.get("dependsOn")) for each in jobset["spec"]["replicatedJobs"]]
    assert order == [
        ("teacher", None),
        ("memory", [{"name": "teacher", "status": "Complete"}]),
        ("student", [{"name": "memory", "status": "Complete"}]),
    ]


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_every_kind_runs_the_same_containers(cluster: str) -> None:
    containers = []
    for kind in ("jobset", "trainjob", "job"):
        made = [container_of(job) for job in job_specs(rendered(kind, cluster)).values()]
        for container in made:
            container["env"] = {**variables(container), "PET_MASTER_ADDR": ""}
            del container["name"]
        containers.append(made)
    assert containers[0] == containers[1] == containers[2]
