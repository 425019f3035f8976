"""The kinds of job that a chain can run as: JobSet, Kubeflow's TrainJobs, plain Indexed Jobs.

Whatever the kind, a gang lives and dies together: the pods agree on a last step before they go,
and a pod that is lost takes the others with it.
"""

from __future__ import annotations

from collections.abc import Callable

from cmkd_scale.errors import EXIT_INTEGRITY, EXIT_PREEMPTED, EXIT_USAGE
from cmkd_scale.operations.kubernetes_pod import (
    APP,
    MASTER_PORT,
    Manifest,
    Options,
    Stage,
    arguments,
    base_pod,
    metadata,
    mounts,
    pod_labels,
    queue_labels,
    resources,
    stage_pod,
    volumes,
)

_KEEP_SECONDS = 7 * 24 * 3600  # of a finished job, for its logs
_NODE = "node"  # what Kubeflow Trainer calls the job and the container that train


def jobset(stages: list[Stage], options: Options) -> dict[str, list[Manifest]]:
    """One JobSet: each stage begins when the one before it is complete."""
    replicated: list[Manifest] = []
    for stage in stages:
        master = f"{options.name}-{stage.name}-0-0.{options.name}"
        pod = stage_pod(stage, options, master=master)
        made: Manifest = {"name": stage.name, "replicas": 1}
        if replicated:
            made["dependsOn"] = [{"name": replicated[-1]["name"], "status": "Complete"}]
        # Any failure that counts is one of the whole set, which starts all of its pods again.
        made["template"] = {"spec": _job_spec(pod, options, backoff_limit=0)}
        replicated.append(made)
    spec = {
        **_gang(options),
        "ttlSecondsAfterFinished": _KEEP_SECONDS,
        "replicatedJobs": replicated,
    }
    return {
        "jobset.yaml": [
            {
                "apiVersion": "jobset.x-k8s.io/v1alpha2",
                "kind": "JobSet",
                "metadata": metadata(options.name, options, **queue_labels(options)),
                "spec": spec,
            }
        ]
    }


def _gang(options: Options) -> Manifest:
    """What a JobSet does when a job of it fails, and how its pods are named."""
    return {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "failurePolicy": {
            "maxRestarts": options.max_restarts,
            # No pod of the next attempt meets one of the last.
            "restartStrategy": "BlockingRecreate",
            "rules": [
                {
                    "name": "final",
                    "action": "FailJobSet",
                    "onJobFailureReasons": ["PodFailurePolicy"],
                }
            ],
        },
    }


def train_jobs(stages: list[Stage], options: Options) -> dict[str, list[Manifest]]:
    """A TrainJob a stage, and the runtime that they and others of this size share."""
    runtime = f"{APP}-{options.processes}"
    files = {"runtime.yaml": [_runtime(runtime, options)]}
    for number, stage in enumerate(stages, 1):
        files[f"{number}_{stage.name}.yaml"] = [_train_job(stage, runtime, options)]
    return files


def _runtime(name: str, options: Options) -> Manifest:
    selector = {"app.kubernetes.io/name": APP}
    pod = base_pod(options, container=_NODE, selector=selector)
    pod["metadata"] = {"labels": selector}
    replicated = {
        "name": _NODE,
        "template": {
            "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
            "spec": _job_spec(pod, options, backoff_limit=0),
        },
    }
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "ClusterTrainingRuntime",
        "metadata": {
            "name": name,
            "labels": {**selector, "trainer.kubeflow.org/framework": "torch"},
        },
        "spec": {
            "mlPolicy": {"numNodes": options.nodes, "torch": {}},
            "template": {"spec": {**_gang(options), "replicatedJobs": [replicated]}},
        },
    }


def _train_job(stage: Stage, runtime: str, options: Options) -> Manifest:
    pod = {
        "metadata": {"labels": pod_labels(stage, options)},
        "spec": {
            "volumes": volumes(options),
            "containers": [{"name": _NODE, "volumeMounts": mounts()}],
        },
    }
    patched = {"replicatedJobs": [{"name": _NODE, "template": {"spec": {"template": pod}}}]}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": metadata(options.run(stage), options, **queue_labels(options)),
        "spec": {
            "runtimeRef": {"name": runtime},
            "trainer": {
                "image": options.image,
                "args": arguments(stage),
                "numNodes": options.nodes,
                "numProcPerNode": options.processes,
                "resourcesPerNode": resources(options),
            },
            "runtimePatches": [
                {
                    "manager": "cmkd.dev/render",
                    "trainingRuntimeSpec": {"template": {"spec": patched}},
                }
            ],
        },
    }


def jobs(stages: list[Stage], options: Options) -> dict[str, list[Manifest]]:
    """A plain Job and its headless service a stage, for clusters that have nothing else."""
    return {
        f"{number}_{stage.name}.yaml": [_service(stage, options), _job(stage, options)]
        for number, stage in enumerate(stages, 1)
    }


def _service(stage: Stage, options: Options) -> Manifest:
    name = options.run(stage)
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(name, options),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,  # pods meet before they are ready
            "selector": pod_labels(stage, options),
            "ports": [{"name": "rendezvous", "port": MASTER_PORT}],
        },
    }


def _job(stage: Stage, options: Options) -> Manifest:
    name = options.run(stage)
    pod = stage_pod(stage, options, master=f"{name}-0.{name}", subdomain=name)
    # One that is lost takes the others with it, and each of them counts.
    limit = options.max_restarts * options.nodes
    spec = _job_spec(pod, options, backoff_limit=limit)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata(name, options, **queue_labels(options)),
        "spec": {**spec, "ttlSecondsAfterFinished": _KEEP_SECONDS},
    }


def _job_spec(pod: Manifest, options: Options, *, backoff_limit: int) -> Manifest:
    """Spec of an Indexed Job with a pod on each node.

    What the exit code says decides: after 138, or when the cluster takes a pod away, the pod is
    replaced and nothing counted; after 2 or 42 it would fail again.

    Args:
        pod: template of its pods.
        options: of the cluster.
        backoff_limit: other failures of pods that the job survives.
    """
    return {
        "completionMode": "Indexed",
        "completions": options.nodes,
        "parallelism": options.nodes,
        "backoffLimit": backoff_limit,
        "podReplacementPolicy": "Failed",  # a gang has no two pods of one rank
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": _exit_codes(EXIT_USAGE, EXIT_INTEGRITY)},
                {"action": "Ignore", "onExitCodes": _exit_codes(EXIT_PREEMPTED)},
                {
                    "action": "Ignore",
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                },
            ]
        },
        "template": pod,
    }


def _exit_codes(*codes: int) -> Manifest:
    return {"operator": "In", "values": list(codes)}


KINDS: dict[str, Callable[[list[Stage], Options], dict[str, list[Manifest]]]] = {
    "jobset": jobset,
    "trainjob": train_jobs,
    "job": jobs,
}
"""Kind -> what renders it: manifests by file name."""
