from __future__ import annotations

from pathlib import Path

import pytest

from cmkd_scale.config import load_config, make_config, save_config, with_changes
from cmkd_scale.errors import UsageError


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "train: {steps: 7}\nrun: {seed: 3}\n")
    config = load_config(file, ["train.steps=9", "data.shards=/x", "run.dir=runs/a"])
    assert config.train.steps == 9
    assert config.run.seed == 3
    assert config.data.shards == "/x"
    assert config.train.global_batch_size == make_config({}).train.global_batch_size


def test_base_is_merged_by_section(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "train: {steps: 7, learning_rate: 0.5}\n")
    file = write(tmp_path / "a.yaml", "base: base.yaml\ntrain: {steps: 8}\n")
    config = load_config(file)
    assert (config.train.steps, config.train.learning_rate) == (8, 0.5)


def test_a_base_that_leads_back_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "b.yaml", "base: a.yaml\n")
    file = write(tmp_path / "a.yaml", "base: b.yaml\n")
    with pytest.raises(UsageError, match="its own base"):
        load_config(file)


def test_all_errors_are_reported_at_once_with_the_nearest_name(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "train: {stepz: 7, global_batch_size: none}\nrum: {}\n")
    with pytest.raises(UsageError) as caught:
        load_config(file)
    message = str(caught.value)
    assert "3 problems" in message
    assert "did you mean 'steps'" in message
    assert "did you mean 'run'" in message
    assert "train.global_batch_size" in message
    assert "'none'" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b\n", "sections"),
        ("a: [\n", "not valid YAML"),
        ("run: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_config(write(tmp_path / "a.yaml", text))


@pytest.mark.parametrize("override", ["train.steps", "=3", "train.steps.deep=3"])
def test_malformed_overrides(tmp_path: Path, override: str) -> None:
    file = write(tmp_path / "a.yaml", "train: {steps: 7}\n")
    with pytest.raises(UsageError, match=r"Override"):
        load_config(file, [override])


def test_a_saved_config_loads_to_the_same_digest(tmp_path: Path) -> None:
    config = make_config({"run": {"dir": "x", "seed": 4}, "data": {"options": {"fold": 1}}})
    save_config(config, tmp_path / "c.yaml")
    again = load_config(tmp_path / "c.yaml")
    assert again == config
    assert again.digest() == config.digest()


def test_keys_that_came_later_leave_the_digests_of_earlier_runs_alone() -> None:
    """The literal is the digest of all defaults by the version that had no backbones."""
    earlier = "58b79ddbba4eeee11ecd7571a54ddd54bb999438d0ecfceb20b492efe989ee60"
    assert make_config({}).digest() == earlier
    for section, name, value in (
        ("model", "backbone", "someone/tiny"),
        ("model", "lora_targets", ["query"]),
        ("teacher", "cache", "outputs"),
        ("memory", "mixed_precision", "bf16"),
    ):
        assert make_config({section: {name: value}}).digest() != earlier


def test_the_digest_ignores_what_shapes_no_result() -> None:
    config = make_config({"run": {"dir": "x"}})
    same = with_changes(config, {"run.dir": "y", "data.workers": 2, "train.keep_checkpoints": 9})
    other = with_changes(config, {"train.steps": 3})
    assert same.digest() == config.digest()
    assert other.digest() != config.digest()


def test_required_values_are_all_named() -> None:
    with pytest.raises(UsageError, match=r"run\.dir.*teacher\.run"):
        make_config({}).require("run.dir", "run.seed", "teacher.run")


def test_every_field_explains_itself() -> None:
    for name, section in make_config({}).__class__.model_fields.items():
        for key, field in section.annotation.model_fields.items():  # type: ignore[union-attr]
            assert field.description, f"{name}.{key} has no docstring"
