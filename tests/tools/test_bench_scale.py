from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cmkd_scale.training.alignment_options import AlignmentOptions
from tests.conftest import REPOSITORY, Launch
from tools.bench import _scale_alignment as alignment
from tools.bench import scale
from tools.bench._bench import Rows
from tools.bench._scale_memory import Features, soft_labels, synthetic_memory
from tools.bench._scale_plot import plot
from tools.bench._step_variants import Setting

TINY = Setting(
    classes=4,
    dim=8,
    batch=8,
    width=8,
    depth=1,
    student_shape=(1, 8, 12),
    sizes=(8, 8000),
)
WORKER = """
from pathlib import Path
from tests.tools.test_bench_scale import TINY
from tools.bench._scale_ranks import work
work(TINY, 1, Path({file!r}))
"""


@pytest.mark.parametrize("classes", [5, 300])
def test_soft_labels_are_probabilities_that_expect_the_own_class(classes: int) -> None:
    soft = soft_labels(classes, per_class=3)
    own = torch.arange(classes).repeat_interleave(3)
    table = soft.dense(torch.ones(classes, dtype=torch.bool))
    torch.testing.assert_close(table.sum(1), torch.ones(len(own)))
    assert torch.equal(table.argmax(1), own)
    assert soft.values.shape == (3 * classes, min(classes, 256))
    if classes == 5:  # uncut tables are read without their classes
        assert torch.equal(soft.values, table)


def test_the_unit_of_cost_is_the_distance_within_a_class() -> None:
    features = Features.of(20, 16)
    memory = synthetic_memory(features, per_class=40)
    batch, labels = features.student(500, seed=9)
    rows = memory.prototypes.double().numpy().reshape(20, 40, 16)[labels]
    distances = np.linalg.norm(rows - batch.double().numpy()[:, None], axis=2)
    assert float(memory.cost_scale) == pytest.approx(np.median(distances.mean(1)), rel=0.2)
    # Prototypes are the nearest to samples of their own class.
    nearest = torch.cdist(batch, memory.prototypes).argmin(1)
    assert (memory.prototype_class[nearest] == labels).double().mean() > 0.9
    assert float(memory.prototypes.square().mean()) == pytest.approx(1.0, rel=0.15)


def test_the_dense_gradient_is_that_of_the_semi_dual() -> None:
    features = Features.of(3, 6)
    memory = synthetic_memory(features, per_class=5)
    batch = features.student(11, seed=1)[0].double().requires_grad_()
    potentials, mass = 0.2 * torch.randn(15), torch.rand(15)
    cost = (batch.unsqueeze(1) - memory.prototypes.double()).square().sum(2)
    cost = cost / memory.cost_scale.double() ** 2
    scores = (potentials.double() - cost) / 0.3 + mass.double().log()
    (-0.3 * torch.logsumexp(scores, dim=1)).sum().backward()
    found = alignment.dense_gradient(batch.detach(), memory, potentials, mass, 0.3)
    torch.testing.assert_close(found, batch.grad)


def test_a_search_keeps_the_gradient_where_the_mass_is_concentrated() -> None:
    features = Features.of(10, 16)
    memory = synthetic_memory(features, per_class=40)
    searched = alignment.Alignment(features, memory, alignment.SEARCHED, batch=8)
    sharp = alignment.search_quality(searched, memory, 0.005)
    flat = alignment.search_quality(searched, memory, 100.0)
    assert sharp["captured"] > 0.999
    assert sharp["cosine"] > 0.9999
    # Distance plays no part: what is held are the 64 heaviest, of the classes that came.
    heaviest = searched.targets.potentials.target().topk(64).values.sum()
    assert flat["captured"] == pytest.approx(float(heaviest), rel=0.05)
    assert heaviest < 0.5
    assert flat["cosine"] < 0.99


@pytest.mark.parametrize("options", [alignment.MASKED, alignment.ALL, alignment.SEARCHED])
def test_what_is_timed_moves_the_potentials(options: AlignmentOptions) -> None:
    features = Features.of(4, 8)
    memory = synthetic_memory(features, per_class=20)
    step = alignment.Alignment(features, memory, options, batch=8)
    before = step.targets.potentials.value.clone()
    written = int(step.targets.state_dict()["statistics.written"])
    step()
    assert not torch.equal(step.targets.potentials.value, before)
    assert int(step.targets.state_dict()["statistics.written"]) == written + 8
    assert step.bytes_on_wire == 0.0


def test_every_term_of_the_memory_is_timed_and_no_other() -> None:
    assert set(alignment.WEIGHTS) == {
        "transport_cost",
        "teacher_head",
        "transported_soft_label",
        "teacher_head_soft_label",
        "head_pull",
    }


def test_times_are_of_single_steps() -> None:
    calls = {"a": 0, "b": 0}

    def step(name: str) -> None:
        calls[name] += 1
        if name == "b":
            alignment.head_step(64, 64, 64)()

    rows = alignment.in_units(TINY, {"a": lambda: step("a"), "b": lambda: step("b")}, rounds=3)
    assert list(rows) == ["ce_ls", "ce_ls again", "a", "a again", "b"]
    # Of a warming round and three others: ``a`` is timed twice and warms the caches once.
    assert calls == {"a": 3 * 4 * alignment.REPEATS, "b": 4 * alignment.REPEATS}
    assert rows["a"]["growth"] == 1.0
    assert rows["b"]["growth"] > 1.0
    assert rows["ce_ls"]["cpu_ratio"] == 1.0


def test_tables_of_classes_and_prototypes(capsys: pytest.CaptureFixture[str]) -> None:
    classes = scale.by_classes(TINY, [4, 6], rounds=1)
    prototypes = scale.by_prototypes(TINY, 400, rounds=1)
    scale.show("classes", classes)
    scale.show("400 prototypes", prototypes)
    assert {"6 classes", "6 classes, transport alone", "6 classes, cross-entropy head"} < set(
        classes
    )
    found = prototypes["label-free, search"]
    assert 0.0 < found["captured_at_0.02"] <= 1.0 + 1e-5
    assert {"cosine_at_0.1", "seconds_to_build", "amortised_cpu_milliseconds"} < set(found)
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*classes, *prototypes])


def made_up() -> dict[str, Rows]:
    """Tables of the form that the benchmark makes."""

    def row(milliseconds: float, **others: float) -> dict[str, float]:
        return {"cpu_milliseconds": milliseconds, "growth": milliseconds, **others}

    tables = {"classes": {"ce_ls": row(100.0)}}
    for classes in (100, 1000):
        for end in ("", ", transport alone", ", cross-entropy head"):
            tables["classes"][f"{classes:,} classes{end}"] = row(classes / 50)
    search = row(5.0, amortised_cpu_milliseconds=6.0, **{"cosine_at_0.02": 0.98})
    ways = {"class-masked": row(2.0), "label-free, all": row(9.0), "label-free, search": search}
    tables["1,000 prototypes"] = {"ce_ls": row(100.0), **ways}
    for ranks in (1, 2):
        sent = row(3.0, bytes_of_gradients=0.01 * (ranks - 1))
        table = {"ce_ls": row(100.0 / ranks, apart=2e-5 * (ranks - 1)), "8,000 prototypes": sent}
        tables[f"{ranks} ranks"] = table
    return tables


def test_goals_name_what_grows() -> None:
    goals = {goal.name: goal for goal in scale.goals_of(made_up())}
    assert goals["transport alone, growth with classes"].value == pytest.approx(10.0)
    assert not goals["cosine of a search, 1,000 prototypes"].met
    assert not goals["potentials apart, 2 ranks"].met
    assert goals["bytes of gradients', 8,000 prototypes, 2 ranks"].met
    assert len(goals) == 4


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    build = {"100 classes": {"seconds": 1.0}, "100 classes again": {"seconds": 1.0}}
    plot(tmp_path / "scale.png", made_up(), build)
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.multirank
@pytest.mark.slow
def test_two_ranks_end_with_the_potentials_of_one(tmp_path: Path, launch: Launch) -> None:
    found = {}
    for ranks in (1, 2):
        file, script = tmp_path / f"{ranks}.json", tmp_path / f"{ranks}.py"
        script.write_text(WORKER.format(file=str(file)))
        rendezvous = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        alone = {**rendezvous, "MASTER_PORT": "0"} if ranks == 1 else {}
        launch(script, processes=ranks, env=alone, cwd=REPOSITORY)
        found[ranks] = json.loads(file.read_text())
    one, two = (np.array(found[ranks]["potentials"]) for ranks in (1, 2))
    assert np.abs(one).max() > 0.05
    np.testing.assert_allclose(two, one, atol=1e-5)
    rows = found[2]["rows"]
    # Of 8,000 prototypes, 4 classes and 3 sums; then 4 rows of 8 features and a label.
    assert rows["8,000 prototypes"]["bytes"] == 4 * 8007 + 4 * 4 * 9
    parameters = sum(p.numel() for p in TINY.model(TINY.student_shape).parameters())
    assert rows["ce_ls"]["gradient_bytes"] == 4 * parameters
    assert found[1]["rows"]["8,000 prototypes"]["bytes_of_gradients"] == 0.0
