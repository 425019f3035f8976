from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy import stats
from sklearn.datasets import load_digits

from cmkd_scale.config import make_config, with_changes
from cmkd_scale.data.audio import read_sound, wav_bytes
from cmkd_scale.data.manifest import load_manifest
from cmkd_scale.errors import PreemptedError, UsageError
from cmkd_scale.monitoring.jsonl import read_jsonl
from cmkd_scale.records import Sample
from cmkd_scale.stages.quickstart import COUNTS
from cmkd_scale.stages.quickstart import _config as quickstart_config
from cmkd_scale.training.methods import METHODS
from cmkd_scale.training.step_log import Clock
from tests.data.examples import ToySplit, build_toy
from tools.bench import _accuracy_challenge as challenge
from tools.bench import _accuracy_runs as runs
from tools.bench import _accuracy_statistics as statistics
from tools.bench import accuracy, forecast
from tools.bench._accuracy_digits import build_digits
from tools.bench._accuracy_plot import write_plot
from tools.bench._accuracy_setting import BUDGET, Item, Setting, Teachers, locked, row_config
from tools.bench._accuracy_tables import Table, curve_of, markdown, reading_text
from tools.bench._accuracy_tasks import (
    DIRECTIONS,
    OURS,
    SEMI,
    Row,
    Task,
    chosen_rows,
    controls,
    every_row,
    make_tasks,
)

# ---------------------------------------------------------------------------- statistics


@settings(max_examples=30)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closed_test_of_bonferroni(values: list[float]) -> None:
    p_values = {str(place): p for place, p in enumerate(values)}
    subsets = [
        chosen
        for size in range(1, len(values) + 1)
        for chosen in itertools.combinations(p_values, size)
    ]
    found = statistics.holm(p_values)
    assert list(found) == list(p_values)
    for name in p_values:
        # A hypothesis falls with all intersections that it is part of.
        level = [len(s) * min(p_values[other] for other in s) for s in subsets if name in s]
        assert found[name] == pytest.approx(min(1.0, max(level)))


def test_holm_of_known_values() -> None:
    found = statistics.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})


def clips(share: float, size: int, seed: int) -> NDArray[np.bool_]:
    return np.random.default_rng(seed).random(size) < share


def test_rows_are_compared_with_the_baseline_and_with_ours() -> None:
    found = {
        "ce_ls": {0: clips(0.40, 300, 0)},
        "kd": {0: clips(0.45, 300, 1)},
        OURS: {0: clips(0.50, 300, 2)},
        "elsewhere": {7: clips(0.5, 300, 3)},
    }
    table = statistics.compare_all(found)
    assert set(table["ce_ls"]) == {"ours_over"}
    assert set(table[OURS]) == {"to_baseline"}
    both = statistics.compare_all({**found, SEMI: {0: clips(0.6, 300, 4)}})
    assert set(both["ce_ls"]) == {"ours_over", "semi_over"}
    assert both[OURS]["semi_over"]["difference"] == pytest.approx(
        both[SEMI]["ours_over"]["difference"] * -1
    )
    assert table["elsewhere"] == {}
    kd, ours, base = (found[name][0] for name in ("kd", OURS, "ce_ls"))
    row = table["kd"]
    assert row["to_baseline"]["difference"] == pytest.approx(kd.mean() - base.mean())
    assert row["ours_over"]["difference"] == pytest.approx(ours.mean() - kd.mean())
    exact = []  # the sign flip of one seed is McNemar's exact test
    for other in (kd, base):
        better, worse = int((ours & ~other).sum()), int((~ours & other).sum())
        exact.append(stats.binomtest(better, better + worse).pvalue)
    wanted = np.maximum.accumulate(np.sort(exact) * [2, 1]).clip(max=1)
    seen = sorted(table[name]["ours_over"]["p_holm"] for name in ("kd", "ce_ls"))
    np.testing.assert_allclose(seen, wanted, atol=0.02)


def test_cost_is_the_median_over_seeds_of_the_ratio_to_ce() -> None:
    seconds = {
        "ce": {0: 1.0, 1: 2.0, 2: 4.0},
        "ce_ls": {0: 1.0, 1: 2.0, 2: 6.0},
        "kd": {0: 3.0, 1: 3.0, 2: 5.0, 3: 99.0},
        "new": {9: 1.0},
    }
    assert statistics.costs(seconds) == pytest.approx({"ce": 1.0, "ce_ls": 1.0, "kd": 1.5})
    del seconds["ce"]
    assert statistics.costs(seconds)["kd"] == pytest.approx(1.5)
    assert statistics.costs({"kd": {0: 1.0}}) == {}


def test_the_cpu_of_a_step_is_a_median_without_the_start(tmp_path: Path) -> None:
    lines: list[dict[str, float]] = [{"step": n, statistics.CPU: s} for n, s in ((1, 99), (2, 3))]
    lines += [{"step": 3}, {"step": 4, statistics.CPU: 5.0}, {"step": 5, statistics.CPU: 40.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert statistics.step_cpu(tmp_path) == 5.0
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    assert statistics.step_cpu(tmp_path) is None


def test_the_worst_of_the_bound_reports_counts() -> None:
    good = {
        "risk": {"value": 1.0},
        "teacher_term": 0.25,
        "label_gap": {"value": 0.5},
        "transfer_gap": {"value": 0.25, "low": 0.1},
        "bounds": {"U1": {"value": 3.0}, "U2": 0.5, "U3": 0.25, "U4": None},
    }
    bad = {**good, "label_gap": 0.4, "transfer_gap": -0.4}
    assert statistics.check_bound([good]) == pytest.approx({"identity": 0.0, "excess": 0.0})
    found = statistics.check_bound([good, bad])
    assert found == pytest.approx({"identity": 0.75, "excess": 0.15})
    assert statistics.check_bound([]) == {}


@settings(max_examples=30)
@given(st.lists(st.floats(0.01, 0.2), min_size=3, max_size=3), st.floats(0.05, 0.95))
def test_labels_needed_is_the_inverse_of_the_curve(steps: list[float], share: float) -> None:
    shots, heights = [1, 3, 10, 50], np.cumsum([0.1, *steps])
    curve = dict(zip(shots, heights.tolist(), strict=True))
    wanted = float(heights[0] + share * (heights[-1] - heights[0]))
    found = statistics.labels_needed(curve, wanted)
    assert found is not None
    assert np.interp(np.log(found), np.log(shots), heights) == pytest.approx(wanted)


def test_labels_needed_beyond_the_ends_of_the_curve() -> None:
    curve = {50: 0.5, 3: 0.2}
    assert statistics.labels_needed(curve, 0.51) is None
    assert statistics.labels_needed(curve, 0.1) == 3.0
    assert statistics.labels_needed(curve, 0.5) == pytest.approx(50.0)
    assert statistics.labels_needed({}, 0.5) is None


# --------------------------------------------------------------------------------- tasks


def test_the_usual_tasks_are_those_that_the_tool_promises() -> None:
    tasks = {task.name: task for task in make_tasks("all")}
    assert len(tasks) == 4 + 5 + 6 + 7
    main = tasks["numbers-image-audio-3"]
    assert main.teachers == ("image", "text")
    assert {row.name for row in main.rows} >= {*METHODS, f"{OURS}/permuted", f"{OURS}/random"}
    assert [row.name for row in tasks["numbers-image-audio-50"].rows] == ["ce_ls", OURS]
    names = [row.name for row in tasks["numbers-text-image-3"].rows]
    assert names == ["ce_ls", OURS, f"{OURS}/permuted"]
    assert tasks["numbers-text-image-3"].teachers == ("text", "audio")
    assert tasks["digits-mnist-spoken-2"].teachers == ("mnist", "digits8")
    for task in tasks.values():
        assert Row("ce_ls") in task.rows
        if task.suite in ("digits", "challenge"):
            assert set(controls()) <= set(task.rows)
    assert [tasks[f"challenge-{name}-10"].teachers[0] for name in challenge.PRESETS] == [
        *("image", "image18", "image30", "image42", "image30", "image", "image")
    ]
    quiet = {task.name for task in make_tasks("digits", speech=False)}
    assert quiet == {name for name in tasks if name.startswith("digits") and "spoken" not in name}


def test_what_is_asked_for_is_what_is_made() -> None:
    tasks = make_tasks(
        "numbers", methods=["kd_memory"], shots=[10], directions=["text-audio", "audio-text"]
    )
    assert [task.name for task in tasks] == ["numbers-text-audio-10", "numbers-audio-text-10"]
    assert all(task.rows == (Row("ce_ls"), Row("kd_memory")) for task in tasks)
    assert set(chosen_rows(["all"])) == set(every_row())
    assert chosen_rows([OURS]) == [Row("ce_ls"), Row(OURS), *controls()]
    assert chosen_rows(["ce", f"{OURS}/random"])[1:] == [Row("ce"), Row(OURS, "random")]
    with pytest.raises(UsageError, match="did you mean 'kd_memory'"):
        chosen_rows(["kd_memry"])


@settings(max_examples=20)
@given(st.integers(1, 7), st.integers(0, 3), st.sampled_from(["numbers", "challenge"]))
def test_parts_of_the_work_are_a_partition(parts: int, seeds: int, suite: str) -> None:
    items = runs.items_of(make_tasks(suite), range(seeds))
    shared = [runs.shard_of(items, part, parts) for part in range(1, parts + 1)]
    assert Counter(itertools.chain(*shared)) == Counter(items)
    assert max(map(len, shared)) - min(map(len, shared)) <= 1
    assert len({item.name for item in items}) == len(items)


def test_parts_are_written_as_one_of_several() -> None:
    assert accuracy.parse_part("2/3") == (2, 3)
    for wrong in ("0/2", "3/2", "1", "a/b", "1/2/3", ""):
        with pytest.raises(argparse.ArgumentTypeError):
            accuracy.parse_part(wrong)


# ------------------------------------------------------------------------ configurations


@pytest.mark.parametrize("fsdd", [None, Path("recordings")])
def test_students_and_teacher_are_those_of_the_quickstart_with_more_steps(
    tmp_path: Path, fsdd: Path | None
) -> None:
    setting = Setting(tmp_path, fsdd)
    (task,) = make_tasks("numbers", shots=[3], directions=["image-audio"])
    for row in (Row("ce_ls"), Row(OURS, "permuted")):
        item = Item(task, row, 4)
        memory_run = tmp_path / "memories" / "image"
        usual = with_changes(
            quickstart_config(
                tmp_path, 4, "audio", memory_run, row.method, row.control, fsdd, n_per_class=3
            ),
            {**BUDGET, "method.guard": None},  # the quickstart shows what its control would do
        )
        assert setting.config(item, runs.teachers_of(setting, item)).digest() == usual.digest()
    teacher = quickstart_config(tmp_path, 0, "image")
    assert setting.teacher_config("image").digest() == teacher.digest()


def test_more_labels_come_from_larger_shards_of_the_same_test_clips(tmp_path: Path) -> None:
    setting = Setting(tmp_path, tmp_path)
    few, many = (setting.data("audio", shots=shots, seed=2)["options"] for shots in (3, 10))
    assert (few["train_per_class"], many["train_per_class"]) == (9, 60)
    assert few["test_per_class"] == many["test_per_class"]
    assert few["fold"] == many["fold"] == 2
    assert setting.data("audio")["options"]["train_per_class"] == 60
    assert setting.data("image18")["options"] == {**COUNTS["image"], "train_per_class": 18}
    assert setting.data("image18")["shards"] == "builtin:numbers/image"
    with pytest.raises(UsageError, match="--fsdd"):
        Setting(tmp_path, None).data("spoken")


def test_every_direction_has_students_and_teachers_of_its_own(tmp_path: Path) -> None:
    setting = Setting(tmp_path, tmp_path)
    digests = set()
    for task in make_tasks("numbers", methods=["kd_memory"], shots=[3, 50]):
        item = Item(task, Row("kd_memory"), 0)
        config = setting.config(item, runs.teachers_of(setting, item))
        assert config.data.shards == f"builtin:numbers/{task.student}"
        assert config.memory.run == tmp_path / "memories" / task.teachers[0]
        digests.add(config.digest())
    assert len(digests) == 2 * len(DIRECTIONS)


def test_a_row_gets_what_its_method_declares(monkeypatch: pytest.MonkeyPatch) -> None:
    teachers = Teachers(Path("taught"), (Path("one"), Path("two")))
    table: dict[str, Any] = METHODS
    declared = SimpleNamespace(mode="unpaired", live=True, memories=2, unlabelled=True)
    monkeypatch.setitem(table, "rich", declared)
    plain = SimpleNamespace(mode="", live=False, memories=0, unlabelled=False)
    monkeypatch.setitem(table, "plain", plain)
    assert row_config(Row("rich"), teachers) == {
        "memory.run": ["one", "two"],
        "data.mode": "unpaired",
        "teacher.run": "taught",
        "data.unlabelled": "rest",
    }
    # The memory is there for its width alone.
    assert row_config(Row("plain"), teachers) == {"memory.run": "one"}


# ----------------------------------------------------------------------------- challenge


def test_clips_are_taken_away_as_the_presets_say() -> None:
    kept = {name: challenge.clips_kept(p, 100, 0) for name, p in challenge.PRESETS.items()}
    assert kept["clean"] == kept["domain_only"] == [10] * 100
    assert kept["marginal_only"] == [5] * 100
    assert sorted(kept["imbalance_only"]) == sorted(
        max(1, round(10 * 10 ** (-rank / 99))) for rank in range(100)
    )
    assert (max(kept["hard"]), min(kept["hard"])) == (3, 1)
    assert kept["mild"] != challenge.clips_kept(challenge.PRESETS["mild"], 100, 1)
    assert challenge.clips_kept(challenge.PRESETS["hard"], 1, 0) == [3]
    assert challenge.pictures_kept(challenge.PRESETS["mild"], 60) == 18
    levels = [challenge.snr_db(challenge.PRESETS[name]) for name in ("mild", "hard", "clean")]
    assert levels[2] is None
    assert levels[:2] == pytest.approx([9.0, -1.0])


class SpokenToy(ToySplit):
    """Tones of 8000 samples."""

    def __getitem__(self, index: int) -> Sample:
        label = index % len(self.label_names)
        tone = 0.1 * np.sin(np.arange(8000) * 0.1 * (label + 1), dtype=np.float64)
        members = {"wav": wav_bytes(tone.astype(np.float32), 8000), "cls": str(label).encode()}
        return Sample(key=f"toy-{self.split}-{index:06d}", label=label, members=members)


class ToyNumbers:
    def __init__(self, source: Path | None, options: Mapping[str, str]) -> None:
        assert options["train_per_class"] == "10"

    def open(self, modality: str, split: str) -> SpokenToy:
        return SpokenToy(split, 60, 4)


def test_training_alone_gets_fewer_and_noisier_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(challenge, "Numbers", ToyNumbers)
    preset = challenge.Preset(marginal=0.5, domain=0.5, imbalance=5.0)
    dataset = challenge.ChallengeNumbers(None, {"train_per_class": 10}, preset, 3)
    train = dataset.open("audio", "train")
    samples = [train[i] for i in range(len(train))]
    counts = Counter(sample.label for sample in samples)
    assert [counts[label] for label in range(4)] == challenge.clips_kept(preset, 4, 3)
    whole = SpokenToy("train", 60, 4)
    by_key = {sample.key: sample for sample in (whole[i] for i in range(60))}
    for sample in samples:
        noisy, _ = read_sound(sample.members["wav"], 10)
        clean, _ = read_sound(by_key[sample.key].members["wav"], 10)
        noise = noisy.astype(float) - clean.astype(float)
        ratio = 10 * np.log10(np.mean(clean.astype(float) ** 2) / np.mean(noise**2))
        assert ratio == pytest.approx(5.0, abs=0.1)
    assert samples[0].members == train[0].members  # the noise is the clip's own
    assert len({sample.members["wav"] for sample in samples}) == len(samples)
    test = dataset.open("audio", "test")
    assert [test[i] for i in range(60)] == [SpokenToy("test", 60, 4)[i] for i in range(60)]
    quiet = challenge.ChallengeNumbers(None, {"train_per_class": 10}, challenge.Preset(), 3)
    assert quiet.open("audio", "train")[0] == by_key[quiet.open("audio", "train")[0].key]


# -------------------------------------------------------------------------------- digits


def test_the_small_digits_become_shards_without_a_shared_picture(tmp_path: Path) -> None:
    shards = build_digits("digits8", tmp_path)
    manifests = [load_manifest(shards / split) for split in ("train", "validation", "test")]
    assert all(manifest.label_names == tuple("0123456789") for manifest in manifests)
    labels = load_digits().target
    counts = np.sum([list(manifest.class_counts) for manifest in manifests], axis=0)
    np.testing.assert_array_equal(counts, np.bincount(labels))
    assert 0.55 < manifests[0].samples / len(labels) < 0.65
    files = list((tmp_path / "digits8-pictures").rglob("*.png"))
    assert len({file.name for file in files}) == len(files) == len(labels)
    with Image.open(files[0]) as image:
        place, grey = int(files[0].stem), np.asarray(image, dtype=np.float64)
    np.testing.assert_allclose(grey * 16 / 255, load_digits().images[place], atol=0.04)
    assert labels[place] == int(files[0].parent.name)
    before = {file: file.stat().st_mtime_ns for file in files}
    build_digits("digits8", tmp_path)
    assert {file: file.stat().st_mtime_ns for file in before} == before


# ---------------------------------------------------------------------------------- runs


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    """Eight steps on a few texts, whatever the source."""
    for split in ("train", "validation", "test"):
        build_toy(tmp_path / "shards", split)

    def data(self: Setting, source: str, *, shots: int | None = None, seed: int = 0) -> Any:
        return {"shards": str(tmp_path / "shards")}

    monkeypatch.setattr(Setting, "data", data)
    changes = {
        **{"model.width": 16, "model.feature_dim": 8, "train.steps": 8},
        **{"train.global_batch_size": 12, "train.warmup_steps": 2, "train.log_every_steps": 2},
    }
    return Setting(tmp_path / "out", None, changes)


ROWS = (Row("ce"), Row("ce_ls"), Row(OURS), Row(OURS, "permuted"))
TASK = Task("numbers", "audio", ("image", "text"), 3, ROWS)


def test_it_runs_and_starts_again_where_it_stopped(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: Counter[str] = Counter()
    for stage in ("teacher", "memory", "student"):
        real = getattr(runs, stage)

        def counted(*given: Any, stage: str = stage, real: Any = real, **named: Any) -> Any:
            calls[stage] += 1
            return real(*given, **named)

        monkeypatch.setattr(runs, stage, counted)
    half = accuracy.run(setting, [TASK], [1], part=(1, 2))[TASK.name]
    assert calls == {"teacher": 1, "memory": 1, "student": 2}
    assert list(half["rows"]) == ["ce", OURS]
    tables = accuracy.run(setting, [TASK], [1], part=(1, 1))
    assert calls == {"teacher": 1, "memory": 1, "student": 4}
    assert accuracy.run(setting, [TASK], [1], part=(1, 1)) == tables
    assert calls == {"teacher": 1, "memory": 1, "student": 4}
    rows = tables[TASK.name]["rows"]
    assert list(rows) == [row.name for row in ROWS]
    assert rows["ce"]["cost"] == 1.0
    assert [row["control"] for row in rows.values()] == [True, True, False, True]
    run = setting.out / "students" / TASK.name / "ucmkd_global-permuted-seed1"
    results = json.loads((run / "results.json").read_text())
    assert rows[f"{OURS}/permuted"]["seeds"][1] == results["metrics"]["test/accuracy"]
    logged = read_jsonl(run / "metrics.jsonl")
    assert all(0 < line[statistics.CPU] < 60 for line in logged)
    other = Setting(setting.out, None, {**setting.changes, "train.steps": 9})
    assert runs.finished_run(other, Item(TASK, Row("ce"), 1)) is None
    write_plot(tables, tmp_path / "accuracy.png")
    assert OURS in markdown(tables)


def test_a_row_that_fails_does_not_end_the_others(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []

    def faulty(config: Any, **named: Any) -> Any:
        begun.append(config.method.name)
        if config.method.name == OURS:
            raise ValueError("no such\n   thing")
        return {"metrics": {"test/accuracy": 0.5}}

    monkeypatch.setattr(runs, "remember", lambda setting, source: None)
    monkeypatch.setattr(runs, "student", faulty)
    table = accuracy.run(setting, [TASK], [0], part=(1, 1))[TASK.name]
    assert begun == ["ce", "ce_ls", OURS, OURS]
    assert table["failed"] == dict.fromkeys([OURS, f"{OURS}/permuted"], "ValueError: no such thing")
    assert "no such thing" in markdown({TASK.name: table})

    def stopped(config: Any, **named: Any) -> Any:
        raise PreemptedError("a signal")

    monkeypatch.setattr(runs, "student", stopped)
    with pytest.raises(PreemptedError):
        accuracy.run(setting, [TASK], [0], part=(1, 1))


def test_what_another_process_is_at_is_left_for_last(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = runs.items_of([TASK], [0])
    begun: list[str] = []
    lock = setting.out / "locks" / f"{items[0].name.replace('/', '-')}.lock"
    held = locked(lock)
    held.__enter__()

    def one(setting: Setting, item: Item) -> dict[str, str]:
        begun.append(item.row.name)
        if len(begun) == 3:
            held.__exit__(None, None, None)
        return {}

    monkeypatch.setattr(runs, "_train_one", one)
    runs.train_all(setting, items)
    assert begun == [row.name for row in (*ROWS[1:], ROWS[0])]


def test_a_lock_is_one_processes_alone(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "lock"
    with locked(file) as first, locked(file, wait=False) as second:
        assert (first, second) == (True, False)
    with locked(file, wait=False) as third:
        assert third


def test_cpu_is_counted_inside_alone() -> None:
    clock = Clock()
    with statistics.counting_cpu():
        clock.steps = 4
        begun = time.process_time()
        while time.process_time() - begun < 0.1:
            pass
        busy = clock.lap(8)
        clock.steps = 4
        idle = clock.lap(8)
    assert busy[statistics.CPU] >= 0.1 / 4
    assert idle[statistics.CPU] < busy[statistics.CPU]
    assert statistics.CPU not in clock.lap(8)


# ------------------------------------------------------------------- tables, goals, plot


def made_up(shots: int, means: Mapping[str, float], **more: Any) -> Table:
    rows: dict[str, dict[str, Any]] = {
        name: {
            "mean": mean,
            "seeds": {0: mean - 0.02, 1: mean + 0.02},
            "control": name != OURS,
            "cost": 1.25,
            "bound": {"identity": 1e-9, "excess": -0.1},
        }
        for name, mean in means.items()
    }
    for name, row in rows.items():
        for key, difference, other in (
            ("to_baseline", row["mean"] - means["ce_ls"], "ce_ls"),
            ("ours_over", means[OURS] - row["mean"], OURS),
            ("semi_over", means.get(SEMI, 0.0) - row["mean"], SEMI),
        ):
            if name != other and other in means:
                low, high = difference - 0.01, difference + 0.01
                row[key] = {"difference": difference, "low": low, "high": high, "p_holm": 0.002}
    table = {"title": f"numbers, {shots}", "suite": "numbers", "direction": "image-audio"}
    return {**table, "shots": shots, "seeds": [0, 1, 2], "rows": rows, "failed": {}, **more}


@pytest.fixture
def tables() -> dict[str, Table]:
    means = {"ce_ls": 0.24, OURS: 0.56, f"{OURS}/permuted": 0.2, f"{OURS}/random": 0.238}
    found = {
        "numbers-image-audio-3": made_up(3, means, failed={"kd": "UsageError: no $pairs"}),
        "numbers-image-audio-50": made_up(50, {"ce_ls": 0.64, OURS: 0.7}),
        "digits": made_up(2, {"ce_ls": 0.7, OURS: 0.69}, suite="digits"),
    }
    return found


def test_the_tables_say_what_was_found(tables: dict[str, Table]) -> None:
    text = markdown(tables)
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| `")]
    cells = {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines[:4]}
    assert list(cells) == [f"`{name}`" for name in (OURS, "ce_ls", *(f"{OURS}/{c}" for c in (
        "random", "permuted")))]  # fmt: skip
    assert cells[f"`{OURS}/permuted`"] == [
        *("20.0", "18.0 22.0 -", "-4.0", "-5.0 to -3.0", "0.0020"),
        *("+36.0", "+35.0 to +37.0", "0.0020", "1.25"),
    ]
    assert cells["`ce_ls`"][2:5] == ["", "", ""]
    assert "`kd` did not run: UsageError: no $pairs" in text
    needed = round(np.exp(np.interp(0.56, [0.24, 0.64], np.log([3, 50]))))
    assert reading_text(curve_of(tables)) == f"3 labels a class with teacher = {needed} without"
    assert reading_text(curve_of(tables)) in text
    assert list(curve_of(tables)) == [3, 50]
    del tables["numbers-image-audio-50"]
    assert "Label efficiency" not in markdown(tables)
    assert "more than 3" in reading_text(curve_of(tables))


def test_goals_are_those_of_the_design(tables: dict[str, Table]) -> None:
    found = accuracy.goals(tables)
    by_start = {goal.name.split(",")[0]: goal for goal in found}
    values = [goal.value for goal in found]
    assert values == pytest.approx([0.56, 0.002, -1.0, -4.0, -0.2, 1e-9, -0.1])
    assert [goal.met for goal in found] == [True, True, False, False, True, True, True]
    assert by_start[f"{OURS}/permuted to ce_ls in points"].goal == -0.5
    # A row that beats ours with a small p is no success.
    rows = tables["numbers-image-audio-3"]["rows"]
    rows["ce_ls"]["ours_over"]["difference"] = -0.1
    assert [goal.met for goal in accuracy.goals(tables)][1] is False
    rows["ce_ls"]["bound"] = {"identity": 1e-3}
    assert [goal.met for goal in accuracy.goals(tables)][-2:] == [False, True]
    assert accuracy.goals({}) == []


def test_the_row_with_unlabelled_samples_is_held_to_the_nearest_other() -> None:
    means = {"ce_ls": 0.24, OURS: 0.56, SEMI: 0.6, "dkd": 0.59}
    tables = {"numbers-image-audio-3": made_up(3, means)}
    wanted = f"`{SEMI}` over `dkd`, which comes nearest to it: +1.0 (+0.0 to +2.0), p 0.0020"
    assert wanted in markdown(tables)
    goals = {goal.name: goal for goal in accuracy.goals(tables)}
    assert goals[f"{SEMI}, image to audio, 3 labels"].value == 0.6
    assert goals[f"p of {SEMI} over ce_ls, the largest"].met
    tables["numbers-image-audio-3"]["rows"]["dkd"]["semi_over"]["difference"] = -0.01
    assert {goal.name: goal.met for goal in accuracy.goals(tables)}[
        f"p of {SEMI} over dkd, the largest"
    ] is False


def test_the_plot_has_one_panel_or_two(tables: dict[str, Table], tmp_path: Path) -> None:
    heights = []
    for name in ("two", "one"):
        write_plot(tables, tmp_path / "pictures" / f"{name}.png")
        with Image.open(tmp_path / "pictures" / f"{name}.png") as image:
            assert image.size[0] == 1000
            assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 10
            heights.append(image.size[1])
        tables.pop("numbers-image-audio-50", None)
    assert heights[0] > heights[1] + 200
    with pytest.raises(UsageError, match="no student is finished"):
        write_plot({"empty": {**tables["digits"], "rows": {}}}, tmp_path / "none.png")


@pytest.mark.slow
def test_the_short_form_writes_all_that_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {kind: tmp_path / f"accuracy.{kind}" for kind in ("json", "markdown", "plot")}
    options = [word for kind, file in files.items() for word in (f"--{kind}", str(file))]
    for tool in (accuracy, forecast):
        monkeypatch.setattr(tool, "QUICK_STEPS", 30)
    usual = ["--quick", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *usual, *options])
    accuracy.main()
    written = json.loads(files["json"].read_text())
    rows = written["rows"]["numbers-image-audio-3"]["rows"]
    assert set(rows) == {"ce_ls", "kd_memory", OURS, f"{OURS}/permuted"}
    assert all(0 <= row["mean"] <= 1 and row["cost"] > 0 for row in rows.values())
    assert {"name", "value", "goal", "met"} == set(written["goals"][0])
    assert files["markdown"].read_text().strip() in capsys.readouterr().out
    with Image.open(files["plot"]) as image:
        assert image.size[0] == 1000
    # The forecasts, of the same teacher and of some of the same students.
    file = tmp_path / "forecast.json"
    monkeypatch.setattr(sys, "argv", ["forecast.py", *usual, "--json", str(file)])
    forecast.main()
    right, permuted = json.loads(file.read_text())["rows"]["pairs"]
    assert permuted["name"] == f"{right['name']}-permuted"
    assert permuted["score"] < right["score"]
    assert len(list((tmp_path / "out" / "forecasts").iterdir())) == 1  # one training for both


def test_unknown_rows_end_the_tool_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = ["accuracy.py", "--methods", "nothing", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="no row 'nothing'"):
        accuracy.main()
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "--seeds", "0", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="--seeds"):
        accuracy.main()


def test_changes_reach_every_configuration(tmp_path: Path) -> None:
    setting = Setting(tmp_path, None, {"train.steps": 7})
    item = Item(TASK, Row(OURS), 0)
    config = setting.config(item, runs.teachers_of(setting, item))
    assert config.train.steps == setting.teacher_config("text").train.steps == 7
    assert make_config({}).train.steps != 7
