"""training/checkpoint.py"""

from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_qlora.config import RunConfig, build_config
from mlx_qlora.errors import CheckpointError, StorageError
from mlx_qlora.training.checkpoint import ADAPTER, OPTIMIZER, STATE, CheckpointStore, Progress, RunIdentity

WEIGHTS = {"a.lora_a": mx.arange(6.0).reshape(2, 3)}
MOMENTS = {"step": mx.array(3, mx.uint64), "a.m": mx.ones((2, 3))}


def store(tmp_path, *, config: RunConfig | None = None, base="b", data="d", keep=3) -> CheckpointStore:
    return CheckpointStore(tmp_path, RunIdentity(config or RunConfig(), base, data), keep)


def saved(tmp_path, *steps: int, **options: object) -> CheckpointStore:
    checkpoints = store(tmp_path, **options)
    for step in steps:
        checkpoints.save(Progress(step=step), WEIGHTS, MOMENTS)
    return checkpoints


def test_what_was_saved_comes_back(tmp_path):
    progress = Progress(step=7, tokens=123, best_loss=0.1 + 0.2, best_step=7, learning_rate_factor=0.5)
    checkpoints = store(tmp_path)
    checkpoints.save(progress, WEIGHTS, MOMENTS)
    loaded, broken = checkpoints.load_newest()
    assert loaded.progress == progress
    assert not broken
    assert mx.array_equal(loaded.adapter["a.lora_a"], WEIGHTS["a.lora_a"])
    assert loaded.optimizer["step"].dtype == mx.uint64
    assert (tmp_path / "latest").read_text() == (tmp_path / "best").read_text() == "step-0000007\n"


def test_the_newest_few_and_the_best_are_kept(tmp_path):
    checkpoints = store(tmp_path, keep=2)
    for step in (2, 4, 6, 8, 10):
        checkpoints.save(Progress(step=step, best_step=2, best_loss=1.0), WEIGHTS, MOMENTS)
    assert checkpoints.steps() == [2, 8, 10]


@pytest.mark.parametrize("name", [ADAPTER, OPTIMIZER, STATE])
@pytest.mark.parametrize("damage", ["flip the middle", "flip the end", "truncate", "remove"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, name, damage):
    checkpoints = saved(tmp_path, 1, 2)
    path = checkpoints.path_of(2) / name
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2 if damage == "flip the middle" else -3] ^= 1
        path.write_bytes(content)
    loaded, broken = checkpoints.load_newest()
    assert loaded.progress.step == 1
    assert len(broken) == 1
    assert "step-0000002" in broken[0]


def test_without_any_checkpoint_the_next_command_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint") as error:
        store(tmp_path).load_newest()
    assert error.value.run


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"config": build_config({"lora": {"rank": 16}})}, "lora.rank: 8 → 16"),
        ({"base": "other"}, "base model"),
        ({"data": "other"}, "data"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_the_difference(tmp_path, other, said):
    saved(tmp_path, 1)
    with pytest.raises(CheckpointError, match=said):
        store(tmp_path, **other).load_newest()


def test_what_only_changes_the_display_may_differ(tmp_path):
    saved(tmp_path, 1)
    shown = build_config({"training": {"steps_per_report": 1, "keep_checkpoints": 9}})
    assert store(tmp_path, config=shown).load_newest()[0].progress.step == 1


def test_a_half_written_folder_is_never_seen(tmp_path):
    checkpoints = saved(tmp_path, 1)
    partial = tmp_path / ".step-0000002.77.tmp"
    partial.mkdir()
    (partial / ADAPTER).write_bytes(b"half")
    assert checkpoints.load_newest()[0].progress.step == 1
    assert not partial.exists()


def test_a_failing_write_leaves_the_older_ones_whole_and_nothing_else(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, 1)

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(StorageError, match="full"):
        checkpoints.save(Progress(step=2), WEIGHTS, MOMENTS)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-0000001"]
    assert checkpoints.load_newest()[0].progress.step == 1


def test_saving_the_same_step_again_replaces_it(tmp_path):
    checkpoints = saved(tmp_path, 5)
    again = replace(Progress(step=5), learning_rate_factor=0.5)
    checkpoints.save(again, WEIGHTS, MOMENTS)
    assert checkpoints.load(5).progress == again


def test_later_checkpoints_can_be_dropped(tmp_path):
    checkpoints = saved(tmp_path, 1, 2, 3)
    checkpoints.drop_after(1)
    assert checkpoints.steps() == [1]
