"""The life of a run on a cluster: its manifests' commands, run as pods of this machine."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cmkd_scale.errors import EXIT_PREEMPTED
from tests.k8s.rendered import (
    Manifest,
    after,
    container_of,
    job_specs,
    of_kind,
    render_again,
    variables,
)
from tests.namespaces import ADDRESSES, CARD, two_namespaces
from tests.pods import Kubelet, Pod, needs_namespaces
from tests.stages.conftest import Story

ONE_POD: dict[str, Any] = {"nodes": 1, "processes_per_node": 2, "interface": "lo"}
TWO_PODS: dict[str, Any] = {"nodes": 2, "interface": CARD}
STEPS = 100  # so many that a signal finds a run in the middle of them
TRAIN = {"steps": STEPS, "checkpoint_every_steps": 50}


class Cluster:
    """Two trainings of the same student and one of a teacher, their claim a directory."""

    def __init__(self, story: Story, root: Path) -> None:
        self.claim = root / "claim"
        shutil.copytree(story.root, self.claim / "story")
        self._configs = root / "configs"
        self._configs.mkdir()
        own = Story(Path("story"))  # as pods see it
        trees = {name: own.tree(own.root / name, train=TRAIN) for name in ("student", "disturbed")}
        trees["new"] = own.tree(own.root / "new")
        del trees["new"]["memory"], trees["new"]["method"]  # a teacher
        for name, tree in trees.items():
            tree["monitor"] = {"linger_seconds": 0}
            (self._configs / f"{name}.yaml").write_text(yaml.safe_dump(tree))

    def render(self, name: str, kind: str, **options: Any) -> tuple[dict[str, str], Manifest]:
        """The ConfigMap's data, and the spec of the job that comes to be."""
        config = self._configs / f"{name}.yaml"
        manifests = render_again(kind, config, cpus_per_process=1, **options)
        (configs,) = of_kind(manifests, "ConfigMap")
        (job,) = job_specs(manifests).values()
        return configs["data"], job

    def results(self, name: str) -> dict[str, Any]:
        return dict(json.loads((self.claim / "story" / name / "results.json").read_text()))

    def logged(self, name: str) -> list[dict[str, Any]]:
        """The whole lines of a run's log."""
        log = self.claim / "story" / name / "metrics.jsonl"
        text = log.read_text() if log.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]


@pytest.fixture(scope="module")
def cluster(story: Story, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """On it a teacher was trained by a TrainJob, and a student by a JobSet; two ranks each."""
    needs_namespaces()
    root = tmp_path_factory.mktemp("cluster")
    made = Cluster(story, root)
    for name, kind in (("new", "trainjob"), ("student", "jobset")):
        configs, job = made.render(name, kind, **ONE_POD)
        (root / kind).mkdir()
        kubelet = Kubelet(made.claim, configs, root / kind, {first_pod(job): "127.0.0.1"})
        pod = kubelet.start(job)
        try:
            assert pod.ended() == 0, pod.said()
        finally:
            pod.kill()
    return made


def first_pod(job: Manifest) -> str:
    """The name by which pods find the first of them."""
    return variables(container_of(job))["PET_MASTER_ADDR"]


@pytest.fixture
def networks() -> Iterator[tuple[str, str]]:
    with two_namespaces() as names:
        yield names


@pytest.mark.slow
@pytest.mark.multirank
def test_the_command_of_a_manifest_trains(cluster: Cluster) -> None:
    for name, stage, steps in (("new", "teacher", 12), ("student", "student", STEPS)):
        results = cluster.results(name)
        assert (results["stage"], results["steps"]) == (stage, steps)
        assert results["metrics"]["test/accuracy"] > 0.5  # of four classes


@pytest.mark.slow
@pytest.mark.multirank
def test_a_pod_that_must_go_saves_and_the_run_ends_as_if_it_had_stayed(
    cluster: Cluster, networks: tuple[str, str], tmp_path: Path
) -> None:
    configs, job = cluster.render("disturbed", "job", **TWO_PODS)
    kubelet = Kubelet(cluster.claim, configs, tmp_path, {first_pod(job): ADDRESSES[0]})

    def start() -> list[Pod]:
        return [kubelet.start(job, rank, network) for rank, network in enumerate(networks)]

    try:
        pods = start()
        while len(cluster.logged("disturbed")) < 5:
            for pod in pods:
                assert pod.process.poll() is None, pod.said()
            time.sleep(0.02)
        pods[1].terminate()  # its machine is drained; nobody tells the other one
        codes = [pod.ended() for pod in pods]
        assert codes == [EXIT_PREEMPTED, EXIT_PREEMPTED], "\n".join(pod.said() for pod in pods)
        # So the Job replaces both of them, and has nothing to count.
        assert [after(job, code) for code in codes] == ["Ignore", "Ignore"]
        stopped_at = len(cluster.logged("disturbed"))
        assert stopped_at < STEPS
        for pod in start():
            assert pod.ended() == 0, pod.said()
    finally:
        for pod in kubelet.pods:
            pod.kill()
    steps = [line["step"] for line in cluster.logged("disturbed")]
    assert steps == list(range(1, STEPS + 1))  # each once
    assert cluster.results("disturbed")["metrics"] == cluster.results("student")["metrics"]
    models = [
        (cluster.claim / "story" / name / "checkpoints" / "latest" / "model.safetensors")
        for name in ("student", "disturbed")
    ]
    assert models[0].read_bytes() == models[1].read_bytes()
