from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from cmkd_scale.cli import main
from cmkd_scale.config import make_config
from cmkd_scale.errors import UsageError
from cmkd_scale.operations.plan import make_plan, stage_of
from cmkd_scale.operations.plan_calibration import of_one_rank
from cmkd_scale.operations.plan_cluster import Cluster
from tests.stages.conftest import Story


def test_the_stage_that_a_config_is_for() -> None:
    assert stage_of(make_config({})) == "teacher"
    assert stage_of(make_config({"teacher": {"run": "t"}})) == "memory"
    assert stage_of(make_config({"memory": {"run": "m"}})) == "student"
    assert stage_of(make_config({"teacher": {"run": "t"}, "method": {"name": "kd"}})) == "student"
    assert stage_of(make_config({}), "student") == "student"
    with pytest.raises(UsageError, match="did you mean 'student'"):
        stage_of(make_config({}), "studnet")


def test_one_rank_has_its_part_of_each_batch() -> None:
    config = make_config({"train": {"global_batch_size": 96, "unlabelled_batch_size": 192}})
    local = of_one_rank(config, 32)
    assert (local.train.global_batch_size, local.train.unlabelled_batch_size) == (3, 6)
    with pytest.raises(UsageError, match=r"global_batch_size=96 .* use 100"):
        of_one_rank(config, 20)


def test_a_plan_for_many_nodes(
    story: Story, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    tree = story.tree(tmp_path / "run", train={"steps": 1000, "global_batch_size": 12 * 16})
    file.write_text(yaml.safe_dump(tree))
    arguments = ["plan", "--config", str(file), "--nodes", "4", "--devices-per-node", "4"]
    options = ["--price-per-hour", "3", "--network-gb-per-second", "1", "--device-gib", "80"]
    assert main([*arguments, *options, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["stage"], plan["ranks"], plan["backend"]) == ("student", 16, "ddp")
    assert plan["advised"] == "ddp"
    assert plan["calibration"]["samples"] == 12
    assert plan["cluster"]["network_bytes_per_second"] == 1e9
    assert plan["price"] == pytest.approx(3 * plan["forecast"]["hours"])
    assert plan["checkpoint_bytes"] > 12 * plan["parameters"]
    assert list(plan["memory"]) == ["ddp", "zero1", "zero2", "fsdp2", "zero3", "zero3_offload"]
    hours, other = plan["forecast"]["hours"], plan["sensitivity"]
    assert other["devices half as fast"] > hours > other["devices twice as fast"]
    assert other["nothing hidden behind backward"] >= hours
    assert main([*arguments, "--backend", "zero3"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("student ucmkd_global on 4 nodes x 4 devices with zero3: ")
    assert "assumed: device_speed 1, " in text
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_planned(story: Story, tmp_path: Path) -> None:
    config = story.config(tmp_path / "run")
    with pytest.raises(UsageError, match="passes once over the data"):
        make_plan(config, Cluster(1, 1), stage="memory")
    with pytest.raises(UsageError, match="did you mean 'fsdp2'"):
        make_plan(config, Cluster(1, 2), backend="fsdp")
    with pytest.raises(UsageError, match="cannot be divided over 64 ranks"):
        make_plan(config, Cluster(8, 8))


@pytest.mark.parametrize(
    "option", [("--nodes", "0"), ("--overlap", "1.5"), ("--latency-us", "-1"), ("--nodes", "x")]
)
def test_numbers_out_of_bounds(option: tuple[str, str]) -> None:
    arguments = ["plan", "--config", "f", "--nodes", "1", "--devices-per-node", "1", *option]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
