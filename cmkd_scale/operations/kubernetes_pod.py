"""The pod that runs one process group's share of a stage, the same in every kind of job.

It keeps to the Pod Security level "restricted" and has a read-only root file system: it writes
to the claim, where shards and runs are, and to three directories of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cmkd_scale.config import Config

Manifest = dict[str, Any]

DATA = "/data"
"""Where the claim is mounted, and the working directory: relative paths of a config are its."""
CONFIGS = "/etc/cmkd"
"""Where the ConfigMap is mounted."""
ENTRYPOINT = "/opt/cmkd/launchers/entrypoint.sh"
"""In the image."""
METRICS_PORT = 9400
MASTER_PORT = 29500
APP = "cmkd-scale"
USER = 10001
"""Of the image; owns what is written to the claim."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of a chain."""

    name: str
    """Its own in the chain: the verb, numbered where several stages have it."""
    verb: str
    config: Config
    """As the pods see it."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a config does not say: the cluster."""

    name: str
    """Of the chain: all objects are called after it."""
    image: str
    namespace: str | None = None
    """None leaves it to ``kubectl``."""
    nodes: int = 1
    """Pods of a stage."""
    gpus_per_node: int = 0
    processes_per_node: int = 1
    """Without GPUs; with them there is one process a GPU."""
    queue: str | None = None
    """Kueue's local queue."""
    pvc: str = "cmkd-runs"
    """Claim that holds shards and runs; all nodes write to it."""
    pvc_size: str | None = None
    """Render the claim, too, of this size; None: it exists."""
    secret: str | None = None
    """Secret whose keys become environment variables: credentials of object stores, trackers."""
    cpus_per_process: int = 4
    memory: str = "32Gi"
    """Of a pod, with its shared memory."""
    shm: str = "8Gi"
    """Size of /dev/shm, through which decoding workers and NCCL talk."""
    scratch: str = "100Gi"
    """Of a pod's disk: the cache of remote shards, temporary files."""
    grace_seconds: int = 600
    """That a pod has to finish its step and save, once it is told to go."""
    max_restarts: int = 10
    """Of a stage, for reasons that count: not those of preemption."""
    interface: str = "eth0"
    """Network interface between pods."""

    @property
    def processes(self) -> int:
        """On each node."""
        return self.gpus_per_node or self.processes_per_node

    @property
    def config_map(self) -> str:
        """Name of the ConfigMap."""
        return f"{self.name}-config"

    def run(self, stage: Stage) -> str:
        """What Prometheus calls the run of a stage."""
        return f"{self.name}-{stage.name}"


def metadata(name: str, options: Options, **labels: str) -> Manifest:
    """Of an object that belongs to the chain."""
    found: Manifest = {"name": name}
    if options.namespace is not None:
        found["namespace"] = options.namespace
    return {**found, "labels": {**chain_labels(options), **labels}}


def chain_labels(options: Options) -> dict[str, str]:
    """Labels of everything that belongs to the chain."""
    return {"app.kubernetes.io/name": APP, "app.kubernetes.io/part-of": options.name}


def pod_labels(stage: Stage, options: Options) -> dict[str, str]:
    """Labels of a stage's pods; the last one is the job of k8s/monitoring."""
    return {**chain_labels(options), "cmkd.dev/run": options.run(stage)}


def queue_labels(options: Options) -> dict[str, str]:
    """The label by which Kueue queues an object."""
    return {"kueue.x-k8s.io/queue-name": options.queue} if options.queue is not None else {}


def arguments(stage: Stage) -> list[str]:
    """Of the entry point."""
    return [stage.verb, f"{CONFIGS}/{stage.name}.yaml"]


def torchrun_variables(master: str, options: Options) -> list[Manifest]:
    """What Kubeflow Trainer sets by itself: how the pods of a stage find each other.

    Args:
        master: host name of the first pod.
        options: of the cluster.
    """
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    return [
        {"name": "PET_NNODES", "value": str(options.nodes)},
        {"name": "PET_NPROC_PER_NODE", "value": str(options.processes)},
        {"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": index}}},
        {"name": "PET_MASTER_ADDR", "value": master},
        {"name": "PET_MASTER_PORT", "value": str(MASTER_PORT)},
    ]


def stage_pod(
    stage: Stage, options: Options, *, master: str, subdomain: str | None = None
) -> Manifest:
    """Template of a stage's pods.

    Args:
        stage: what they run.
        options: of the cluster.
        master: host name of the first of them.
        subdomain: name of their headless service, where the job's controller does not set it.
    """
    template = base_pod(options, container="cmkd", selector=pod_labels(stage, options))
    template["metadata"] = {"labels": pod_labels(stage, options)}
    spec = template["spec"]
    (container,) = spec["containers"]
    container["args"] = arguments(stage)
    container["env"] = [*torchrun_variables(master, options), *container["env"]]
    container["volumeMounts"] += mounts()
    spec["volumes"] += volumes(options)
    if subdomain is not None:
        spec["subdomain"] = subdomain
    return template


def base_pod(options: Options, *, container: str, selector: dict[str, str]) -> Manifest:
    """What pods of all chains have in common.

    Args:
        options: of the cluster.
        container: its name.
        selector: labels of the pods that belong together: each on a machine of its own, all of
            them in one zone, where that can be had.
    """
    matching = {"labelSelector": {"matchLabels": selector}}
    return {
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": options.grace_seconds,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "topologySpreadConstraints": [
                {
                    "maxSkew": 1,
                    "topologyKey": "kubernetes.io/hostname",
                    "whenUnsatisfiable": "ScheduleAnyway",
                    **matching,
                }
            ],
            "affinity": {
                "podAffinity": {
                    "preferredDuringSchedulingIgnoredDuringExecution": [
                        {
                            "weight": 100,
                            "podAffinityTerm": {
                                "topologyKey": "topology.kubernetes.io/zone",
                                **matching,
                            },
                        }
                    ]
                }
            },
            "containers": [_container(container, options)],
            "volumes": [
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": options.shm}},
                {"name": "cache", "emptyDir": {"sizeLimit": options.scratch}},
                {"name": "tmp", "emptyDir": {"sizeLimit": "10Gi"}},
            ],
        }
    }


def volumes(options: Options) -> list[Manifest]:
    """Volumes that are the chain's own."""
    return [
        {"name": "data", "persistentVolumeClaim": {"claimName": options.pvc}},
        {"name": "config", "configMap": {"name": options.config_map}},
    ]


def mounts() -> list[Manifest]:
    """Where these are."""
    return [
        {"name": "data", "mountPath": DATA},
        {"name": "config", "mountPath": CONFIGS, "readOnly": True},
    ]


def resources(options: Options) -> Manifest:
    """What a pod is given: as much as it asks for, so that it is not the first to be evicted."""
    amounts = {
        "cpu": str(options.cpus_per_process * options.processes),
        "memory": options.memory,
    }
    if options.gpus_per_node:
        amounts["nvidia.com/gpu"] = str(options.gpus_per_node)
    return {"requests": amounts, "limits": dict(amounts)}


def _container(name: str, options: Options) -> Manifest:
    variables = {
        "NCCL_SOCKET_IFNAME": options.interface,
        "GLOO_SOCKET_IFNAME": options.interface,
        "OMP_NUM_THREADS": str(options.cpus_per_process),
    }
    made: Manifest = {
        "name": name,
        "image": options.image,
        "imagePullPolicy": "IfNotPresent",
        "command": [ENTRYPOINT],
        "workingDir": DATA,
        "env": [{"name": key, "value": value} for key, value in variables.items()],
        "ports": [
            {"name": "rendezvous", "containerPort": MASTER_PORT},
            *(
                {
                    "name": f"metrics-{process}" if process else "metrics",
                    "containerPort": METRICS_PORT + process,
                }
                for process in range(options.processes)
            ),
        ],
        # For people. Nothing is killed by it: the watchdog ends a run that hangs, with stacks.
        "readinessProbe": {
            "httpGet": {"path": "/healthz", "port": "metrics"},
            "periodSeconds": 15,
            "timeoutSeconds": 5,
        },
        "resources": resources(options),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "cache", "mountPath": "/cache"},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }
    if options.secret is not None:
        made["envFrom"] = [{"secretRef": {"name": options.secret}}]
    return made
