from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load  # noqa: TID251

from cmkd_scale.training.checkpoint import load_newest
from cmkd_scale.training.engine import MODEL_FILE, OPTIMIZER_FILE
from tools.bench import _checkpoint_ways as ways
from tools.bench import checkpoint
from tools.bench._bench import Rows
from tools.bench._checkpoint_beside import Timed, Training

# The benchmark is of one process.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

Read = Callable[[Path, dict[str, Tensor]], dict[str, Tensor]]


@pytest.fixture
def files() -> ways.Files:
    return ways.make_state(width=32, depth=1)


def test_the_state_is_that_of_a_run_after_a_step(files: ways.Files) -> None:
    weights, moments = files[MODEL_FILE], files[OPTIMIZER_FILE]
    names = {name.rpartition("/")[0] for name in moments}
    assert names == set(weights)
    for name, value in weights.items():
        assert float(moments[f"{name}/step"]) == 1.0
        assert moments[f"{name}/exp_avg"].shape == value.shape
        assert float(moments[f"{name}/exp_avg_sq"].min()) >= 0.0
        assert float(moments[f"{name}/exp_avg"].abs().sum()) > 0.0
    whole = ways.size_in_bytes(ways.flat(files))
    assert whole == 3 * ways.size_in_bytes(weights) + 4 * len(weights)


@pytest.mark.parametrize("kind", [ways.Copy, ways.Memmove])
def test_the_floor_copies_everything(files: ways.Files, kind: type[ways.Copy]) -> None:
    copy = ways.Copy(files)
    way = ways.Memmove(copy) if kind is ways.Memmove else copy
    for value in ways.flat(files).values():
        value.add_(1.0)
    way.start()
    assert len(way.pairs) == len(ways.flat(files))
    assert all(torch.equal(value, buffer) for value, buffer in way.pairs)
    assert all(value.data_ptr() != buffer.data_ptr() for value, buffer in way.pairs)


def read_ours(path: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    found = load_newest(path)
    assert found is not None
    return ways.flat(found[0].files)


def read_safetensors(path: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    return load_file(path)


def read_torch(path: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(path, weights_only=True)  # noqa: TID251
    return found


def read_distributed(path: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {name: torch.zeros_like(value) for name, value in like.items()}
    load(found, checkpoint_id=path, no_dist=True)
    return found


WAYS: dict[str, tuple[Callable[[ways.Files, Path], ways.Way], Read]] = {
    "ours": (ways.Ours, read_ours),
    "first": (lambda files, path: ways.Ours(files, path, first=True), read_ours),
    "torch.save": (
        lambda files, path: ways.OneFile(files, path, safetensors=False),
        read_torch,
    ),
    "save_file": (
        lambda files, path: ways.OneFile(files, path, safetensors=True),
        read_safetensors,
    ),
    "dcp.save": (ways.Distributed, read_distributed),
    "async_save": (
        lambda files, path: ways.DistributedAsync(files, path, cached=False),
        read_distributed,
    ),
    "stager kept": (
        lambda files, path: ways.DistributedAsync(files, path, cached=True),
        read_distributed,
    ),
}


@pytest.mark.parametrize("name", WAYS)
def test_every_way_saves_the_state_as_it_was_at_the_start(
    tmp_path: Path, files: ways.Files, name: str
) -> None:
    make, read = WAYS[name]
    path = tmp_path / "saved"
    way = make(files, path)
    live = ways.flat(files)
    for _ in range(2):  # buffers that are kept hold the state before the last
        expected = {name: value.clone() for name, value in live.items()}
        way.start()
        for value in live.values():
            value.add_(1.0)
        way.finish()
        found = read(path, expected)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        way.clear()
        assert not path.exists()


def test_a_save_that_fails_is_no_figure(tmp_path: Path, files: ways.Files) -> None:
    (tmp_path / "file").write_text("no directory")
    way = ways.Ours(files, tmp_path / "file" / "below")
    way.start()
    with pytest.raises(RuntimeError, match="cannot be written"):
        way.finish()


def test_ratios_are_of_the_same_round() -> None:
    found = {
        "floor": [Timed(1.0, 1.0), Timed(10.0, 5.0), Timed(2.0, 1.0)],
        "other": [Timed(2.0, 3.0, 7.0), Timed(30.0, 5.0, 8.0), Timed(8.0, 2.0, 9.0)],
    }
    row = checkpoint.rows_of(found)["other"]
    assert (row["ratio"], row["cpu_ratio"]) == (3.0, 2.0)
    assert (row["quartile_1"], row["quartile_3"]) == (2.0, 4.0)
    assert (row["milliseconds"], row["complete_seconds"]) == (8000.0, 8.0)


def test_the_order_is_drawn_and_the_first_round_is_left_out() -> None:
    calls: list[str] = []

    def variant(name: str) -> Callable[[], Timed]:
        def run() -> Timed:
            calls.append(name)
            return Timed(float(len(calls)), 1.0)

        return run

    names = "abcd"
    found = checkpoint.in_turns({name: variant(name) for name in names}, rounds=4)
    orders = ["".join(calls[begin : begin + 4]) for begin in range(0, 20, 4)]
    assert all(sorted(order) == sorted(names) for order in orders)
    assert len(set(orders)) > 2
    for name in names:
        whole = [1.0 + place for place, called in enumerate(calls) if called == name]
        assert [timed.wall for timed in found[name]] == whole[1:]


def test_steps_go_on_until_it_is_over() -> None:
    training = Training()
    seen: list[int] = []

    def over(count: int) -> bool:
        seen.append(count)
        return count >= 3

    timed = training.until(over)
    assert seen == [1, 2, 3]
    assert timed.wall > 0.0
    assert timed.cpu > 0.0


def test_tables_of_stalls_and_slowdowns(
    tmp_path: Path, files: ways.Files, capsys: pytest.CaptureFixture[str]
) -> None:
    tables: dict[str, Rows] = {
        "stall": checkpoint.stalls(files, tmp_path, rounds=1),
        "slowdown": checkpoint.slowdowns(files, tmp_path, rounds=1),
    }
    assert tables["stall"]["copy into warm buffers"]["ratio"] == 1.0
    assert {checkpoint.OURS, f"{checkpoint.OURS}, first save", "torch.save"} < set(tables["stall"])
    assert set(tables["slowdown"]) > {checkpoint.ALONE, "CheckpointWriter"}
    assert all(row["ratio"] > 0.0 for rows in tables.values() for row in rows.values())
    assert all(0.0 <= row["queued"] <= 1.0 for row in tables["slowdown"].values())
    checkpoint.show_stalls(tables["stall"])
    checkpoint.show_slowdowns(tables["slowdown"])
    printed = capsys.readouterr().out
    assert all(name in printed for rows in tables.values() for name in rows)
    assert not list(tmp_path.iterdir())


def test_the_file_system_has_a_name(tmp_path: Path) -> None:
    assert checkpoint.file_system(tmp_path)
