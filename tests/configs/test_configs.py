"""Every config below ``configs/`` is valid, fits its data, and trains when it is made small.

The shards are those that the command in the config's own comment builds, from a small tree in the
layout in which the data set is published.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cmkd_scale import cli
from cmkd_scale.config import Config, load_config
from cmkd_scale.operations.plan import stage_of
from cmkd_scale.stages.build_memory import memory
from cmkd_scale.stages.common import make_spec
from cmkd_scale.stages.streams import open_split
from cmkd_scale.stages.student import student
from cmkd_scale.stages.teacher import teacher
from tests.configs.commands import builds
from tests.configs.shrink import shrink, with_small_backbone
from tests.conftest import REPOSITORY
from tests.data.datasets.published import CASES, VGG_LABELS, vggsound_tree

DIRECTORY = REPOSITORY / "configs"
CONFIGS = sorted(str(file.relative_to(DIRECTORY)) for file in DIRECTORY.rglob("*.y*ml"))
WITH_SHARDS = [name for name in CONFIGS if builds(DIRECTORY / name)]


def make_tree(dataset: str, root: Path) -> None:
    """As published; of VGGSound as many labels as a config may choose."""
    if dataset == "vggsound":
        more = [f"sound {number}" for number in range(48)]
        vggsound_tree(root, [*VGG_LABELS, *more], clips_per_label=3)
    else:
        CASES[dataset].make(root)


class Workplace:
    """The directory in which a user types the commands of configs, each one once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._built: set[str] = set()
        self._results: dict[str, dict[str, Any]] = {}
        # Not validated: a config with a mistake is to fail its own test alone.
        trees = {name: yaml.safe_load((DIRECTORY / name).read_text()) for name in CONFIGS}
        self._makers = {Path(tree["run"]["dir"]): name for name, tree in trees.items()}
        assert len(self._makers) == len(CONFIGS), "two configs write into one run"

    def build_shards(self, name: str) -> None:
        """Run the commands that the config's comment gives."""
        for words in builds(DIRECTORY / name):
            if " ".join(words) in self._built:
                continue
            dataset = words[3]
            tree = self._root / "published" / dataset
            if not tree.is_dir():
                make_tree(dataset, tree)
            source = [str(tree) if word == "DIR" else word for word in words[1:]]
            assert cli.main([*source, "--workers", "0"]) == 0
            self._built.add(" ".join(words))

    def train(self, name: str) -> dict[str, Any]:
        """Results of the config's stage when it is small; what it builds on is made first."""
        if name not in self._results:
            config = load_config(DIRECTORY / name)
            self.build_shards(name)
            for run in builds_on(config):
                self.train(self._makers[run])
            self._results[name] = run_stage(shrink(config, self._root / "hub"))
        return self._results[name]

    def with_small_backbone(self, config: Config) -> Config:
        """See ``shrink``."""
        return with_small_backbone(config, self._root / "hub")


def builds_on(config: Config) -> list[Path]:
    """Runs that must be there before the config's own."""
    memories = config.memory.run if isinstance(config.memory.run, list) else [config.memory.run]
    return [run for run in (config.teacher.run, *memories) if run is not None]


def run_stage(config: Config) -> dict[str, Any]:
    if stage_of(config) == "memory":
        return memory(config)
    stage = {"teacher": teacher, "student": student}[stage_of(config)]
    return stage(config, console=False)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    root = tmp_path_factory.mktemp("workplace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("CMKD_CACHE", str(root / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield Workplace(root)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_trains_when_it_is_small(workplace: Workplace, name: str) -> None:
    config = load_config(DIRECTORY / name)
    assert stage_of(config) == Path(name).stem.partition("_")[0]
    results = workplace.train(name)
    assert results["stage"] == stage_of(config)
    if results["stage"] == "student":
        labels = json.loads((Path(str(config.run.dir)) / "labels.json").read_text())
        assert labels["shared"]
        assert labels["only_here"] == labels["only_there"] == []


@pytest.mark.parametrize("name", WITH_SHARDS)
def test_samples_fit_the_model_in_full(workplace: Workplace, name: str) -> None:
    """What one becomes by the transform as it stands passes through the model as it stands, which
    holds no numbers; a backbone of the hub alone is a small one."""
    workplace.build_shards(name)
    config = workplace.with_small_backbone(load_config(DIRECTORY / name))
    splits = [open_split(config, split) for split in ("train", "validation", "test")]
    assert len({split.label_names for split in splits}) == 1
    assert all(split.reader.manifest.modality == config.data.modality for split in splits)
    train = splits[0]
    decoded = train.modality.decode(train.reader[0].members)
    assert decoded.shape == train.modality.shape
    assert bool(decoded.isfinite().all())
    if config.data.modality == "image":
        frames = config.data.transform.get("frames", 1)
        assert train.reader.manifest.options["frames"] == frames
    with torch.device("meta"):
        model = make_spec(config, train, config.model.feature_dim or 8).build()
        output = model(torch.empty(1, *train.modality.shape))
    assert output.logits.shape == (1, len(train.label_names))


@pytest.mark.parametrize("name", WITH_SHARDS)
def test_steps_are_those_of_the_comment(name: str) -> None:
    """``N epochs x M clips / B``, to a hundredth."""
    found = re.findall(r"# (\d+) epochs x ([\d,]+) .*?/ ([\d,]+)", (DIRECTORY / name).read_text())
    ((epochs, samples, batch),) = [[int(word.replace(",", "")) for word in row] for row in found]
    train = load_config(DIRECTORY / name).train
    assert train.global_batch_size == batch
    assert train.steps == pytest.approx(epochs * samples / batch, rel=0.01)
