"""A small trained story that the tests of the stages share: built once, never written to."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cmkd_scale.config import Config, make_config
from cmkd_scale.data.build import build
from cmkd_scale.stages.build_memory import memory
from cmkd_scale.stages.teacher import teacher
from tests.data.examples import Pairs, build_toy


@dataclass(frozen=True)
class Story:
    """Shards, a teacher's run and a memory's run."""

    root: Path

    @property
    def shards(self) -> Path:
        return self.root / "shards"

    @property
    def teacher(self) -> Path:
        return self.root / "teacher"

    @property
    def memory(self) -> Path:
        return self.root / "memory"

    def tree(self, run: Path, **sections: dict[str, Any]) -> dict[str, Any]:
        """The config of a small run, with sections changed."""
        tree: dict[str, Any] = {
            "run": {"dir": str(run)},
            "data": {"shards": str(self.shards)},
            "model": {"width": 16, "feature_dim": 8},
            "memory": {"run": str(self.memory)},
            # Four classes are too few for the guard, which would leave the teacher out.
            "method": {"guard": False},
            "train": {
                "steps": 12,
                "global_batch_size": 12,
                "warmup_steps": 2,
                "log_every_steps": 1,
                "checkpoint_every_steps": 4,
            },
        }
        for name, section in sections.items():
            tree[name] = {**tree.get(name, {}), **section}
        return tree

    def config(self, run: Path, **sections: dict[str, Any]) -> Config:
        """The same, validated."""
        return make_config(self.tree(run, **sections))


@pytest.fixture(scope="session")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    made = Story(tmp_path_factory.mktemp("story"))
    for split in ("train", "validation", "test"):
        build_toy(made.shards, split)
    teacher(made.config(made.teacher), console=False)
    memory(make_config({"run": {"dir": str(made.memory)}, "teacher": {"run": str(made.teacher)}}))
    return made


@pytest.fixture
def own_story(story: Story, tmp_path: Path) -> Story:
    """A copy that a test may damage."""
    shutil.copytree(story.root, tmp_path / "own")
    return Story(tmp_path / "own")


@dataclass(frozen=True)
class PairsStory:
    """Shards of ``pairs``, a teacher's run and a memory's run: classes with a structure."""

    root: Path

    @property
    def memory(self) -> Path:
        return self.root / "memory"

    def tree(self, run: Path, method: dict[str, Any], steps: int = 20) -> dict[str, Any]:
        """The config of a small run, guarded if the method is."""
        return {
            "run": {"dir": str(run)},
            "data": {"shards": str(self.root / "shards"), "augment": False},
            "model": {"width": 16, "feature_dim": 16},
            "memory": {"run": str(self.memory)},
            "method": method,
            "train": {
                "steps": steps,
                "global_batch_size": 32,
                "warmup_steps": 2,
                "log_every_steps": 1,
                "checkpoint_every_steps": 4,
            },
        }

    def config(self, run: Path, method: dict[str, Any], steps: int = 20) -> Config:
        """The same, validated."""
        return make_config(self.tree(run, method, steps))


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> PairsStory:
    made = PairsStory(tmp_path_factory.mktemp("pairs"))
    for split in Pairs.splits:
        build(Pairs(), made.root / "shards", modality="text", split=split, samples_per_shard=64)
    run = made.root / "teacher"
    teacher(made.config(run, {}, steps=120), console=False)
    memory(make_config({"run": {"dir": str(made.memory)}, "teacher": {"run": str(run)}}))
    return made
