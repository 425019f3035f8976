"""Manifests fit the schemas of the cluster's objects, unknown keys included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import kubernetes_validate
import pytest
from kubeflow_trainer_api import models

from tests.k8s.rendered import RENDERED, Manifest, job_specs, rendered, sources

# The oldest and the newest release that the features in use are stable in.
VERSIONS = ("1.31", "1.37")
MODELS: dict[str, Any] = {
    "JobSet": models.JobsetV1alpha2JobSet,
    "TrainJob": models.TrainerV1alpha1TrainJob,
    "ClusterTrainingRuntime": models.TrainerV1alpha1ClusterTrainingRuntime,
}


def every_manifest() -> list[Any]:
    """All that is rendered and all that lies in k8s/base, each with a name for people."""
    return [
        pytest.param(each, id=f"{source}-{each['kind']}-{each['metadata']['name']}")
        for source, (manifests, _) in sources().items()
        for each in manifests
    ]


def keys(value: Any, path: str = "") -> Iterator[str]:
    """The path of every key and of every entry of a list."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in pairs:
        yield f"{path}.{key}"
        if isinstance(part, dict | list):
            yield from keys(part, f"{path}.{key}")


def check_custom(manifest: Manifest) -> None:
    """Fail on a wrong type, a missing key, or one that the models do not know and drop."""
    model = MODELS[manifest["kind"]].from_dict(manifest)
    unknown = set(keys(manifest)) - set(keys(model.to_dict()))
    assert not unknown, unknown


@pytest.mark.parametrize("manifest", every_manifest())
def test_a_manifest_fits_its_schema(manifest: Manifest) -> None:
    if manifest["kind"] in MODELS:
        check_custom(manifest)
    else:
        for version in VERSIONS:
            kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize(("kind", "cluster"), RENDERED)
def test_the_jobs_that_come_to_be_fit_theirs(kind: str, cluster: str) -> None:
    for name, spec in job_specs(rendered(kind, cluster)).items():
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec}
        kubernetes_validate.validate(job, VERSIONS[0], strict=True)


def test_a_misspelt_key_is_seen() -> None:
    (jobset,) = (each for each in rendered("jobset", "cpu") if each["kind"] == "JobSet")
    jobset["spec"]["failurePolicy"]["maxRestart"] = 1
    with pytest.raises(AssertionError, match="maxRestart"):
        check_custom(jobset)
    policy = next(each for each in rendered("jobset", "cpu") if each["kind"] == "NetworkPolicy")
    policy["spec"]["podSelectors"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="podSelectors"):
        kubernetes_validate.validate(policy, VERSIONS[0], strict=True)
