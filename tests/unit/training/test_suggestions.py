"""training/suggestions.py: each rule fires on what it is for, and stays silent on what it is not."""

from dataclasses import replace

import pytest

from mlx_qlora.config import build_config
from mlx_qlora.dataset.batches import Layout
from mlx_qlora.presets import GIB
from mlx_qlora.training.cost_rules import (
    cut_rows,
    empty_window,
    falling_speed,
    relieved,
    room_left,
    unlabelled_rows,
)
from mlx_qlora.training.learning_rules import no_validation, overfitting, still_learning, too_high_rate
from mlx_qlora.training.suggestion import Room, RunFacts
from mlx_qlora.training.suggestions import RULES, command, suggestions
from mlx_qlora.training.window import Window

FACTS = RunFacts(config=build_config(), num_rows=100)


def facts(**training) -> RunFacts:
    return replace(FACTS, config=build_config({"training": training}))


def step(number: int, loss: float | None = 1.0, *, seconds: float = 1.0, memory=(), **fields) -> dict:
    at = {"footprint_bytes": GIB, "swap_growth_bytes": 0, "pressure": None, **dict(memory)}
    return {
        "event": "StepDone", "step": number, "epoch": (number - 1) // 10 + 1, "loss_nats": loss,
        "target_tokens": 10, "tokens": 100, "grad_norm": 0.5, "seconds": seconds, "memory": at,
        "skipped": loss is None, "positions": 100, **fields,
    }  # fmt: skip


def valid(number: int, loss: float | None) -> dict:
    return {"event": "Validated", "step": number, "loss_nats": loss}


def ended(**fields) -> dict:
    return {"event": "RunFinished", "stopped_early": False, "peak_memory_bytes": GIB, **fields}


def pressed(action: str) -> dict:
    memory = {"footprint_bytes": 3 * GIB, "swap_growth_bytes": 0}
    return {"event": "MemoryPressure", "step": 3, "memory": memory, "budget_bytes": 2 * GIB, "action": action}


def falling(steps: int = 40) -> list[dict]:
    """A run as it should be: loss and validation fall, then level off."""
    losses = [1.0 + 2.0 * 0.85**number for number in range(steps + 1)]
    run = [valid(0, losses[0])]
    for number in range(1, steps + 1):
        run.append(step(number, losses[number]))
        if number % 10 == 0:
            run.append(valid(number, losses[number] + 0.1))
    return [*run, ended()]


def overfit(*, rise: float = 0.3) -> list[dict]:
    """Training loss falls to the end, validation is best after step 20 of 40."""
    run = [valid(0, 3.0)]
    for number in range(1, 41):
        run.append(step(number, 3.0 - 0.06 * number))
        if number == 20:
            run.append(valid(20, 1.5))
    return [*run, valid(40, 1.5 + rise), ended()]


def test_a_run_as_it_should_be_gets_no_suggestion():
    assert suggestions(falling(), FACTS) == ()


def test_a_run_without_an_update_gets_no_suggestion():
    assert suggestions([], FACTS) == ()
    assert suggestions([valid(0, 1.0)], FACTS) == ()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_rule_bears_a_run_of_skipped_updates_alone(rule):
    rule([step(1, None, grad_norm=None), step(2, None, grad_norm=None), valid(2, None)], FACTS)


# ---------------------------------------------------------------- overfitting


def test_overfitting_tells_the_epoch_the_rise_and_the_best_step():
    said = overfitting(overfit(), FACTS)
    assert said is not None
    assert said.reason.startswith(
        "overfitting from epoch 2: validation rose 0.30 while the training loss fell"
    )
    assert "best is step 20, which is the one kept" in said.reason
    assert said.options == "--set training.early_stopping_patience=2"


@pytest.mark.parametrize(
    "entries",
    [
        falling(),
        overfit(rise=0.017),
        [dict(e, loss_nats=100 * e["loss_nats"]) if "loss_nats" in e else e for e in overfit(rise=0.012)],
        [*overfit()[:-1], ended(stopped_early=True)],
        [valid(0, 3.0), *(step(n, 1.0 + n / 10) for n in range(1, 21)), valid(10, 1.0), valid(20, 2.0)],
    ],
    ids=[
        "the last is best",
        "a rise within the noise",
        "a rise of less than 1 %",
        "stopped early by itself",
        "the training loss rose too",
    ],
)
def test_it_is_not_overfitting_when(entries):
    assert overfitting(entries, FACTS) is None


def test_a_run_that_never_beats_its_base_is_told_to_learn_more_gently():
    entries = [valid(0, 1.0), *(step(n, 2.0 - n / 20) for n in range(1, 21)), valid(20, 1.4)]
    said = overfitting(entries, facts(learning_rate=1e-3))
    assert said is not None
    assert "no update helped: validation rose 0.40 above the base's 1.00" in said.reason
    assert said.assignments == ("training.learning_rate=2.0e-04",)


# ---------------------------------------------------------------- the learning rate


def test_roll_backs_ask_for_the_rate_the_run_ended_with_and_a_longer_warm_up():
    back = {"event": "RolledBack", "from_step": 4, "to_step": 1, "learning_rate_factor": 0.25}
    said = too_high_rate([step(1), back, *map(step, range(2, 20))], facts(learning_rate=8e-4, warmup_steps=5))
    assert said is not None
    assert "the run went back once" in said.reason
    assert said.assignments == ("training.learning_rate=2.0e-04", "training.warmup_steps=10")


def test_a_roll_back_late_in_a_run_leaves_the_warm_up():
    back = {"event": "RolledBack", "from_step": 53, "to_step": 50, "learning_rate_factor": 0.5}
    said = too_high_rate([*map(step, range(1, 100)), back], facts(learning_rate=8e-4, warmup_steps=5))
    assert said is not None
    assert said.assignments == ("training.learning_rate=4.0e-04",)


def test_skipped_updates_are_counted():
    said = too_high_rate([step(1), step(2, None), *map(step, range(3, 60))], FACTS)
    assert said is not None
    assert "1 update was skipped as not finite" in said.reason


def spiking(height: float, times: int) -> list[dict]:
    at = {40 + 20 * n for n in range(times)}
    return [step(n, height if n in at else 1.0) for n in range(1, 120)]


def test_three_spikes_are_too_high_a_rate_and_two_are_chance():
    said = too_high_rate(spiking(2.5, 3), FACTS)
    assert said is not None
    assert "3 updates had over twice the loss" in said.reason
    assert too_high_rate(spiking(2.5, 2), FACTS) is None
    assert too_high_rate(spiking(1.9, 3), FACTS) is None


def test_a_loss_that_ends_above_its_beginning_is_too_high_a_rate():
    said = too_high_rate([step(n, 1.0 + n / 50) for n in range(1, 51)], FACTS)
    assert said is not None
    assert "the training loss rose from" in said.reason
    assert too_high_rate([step(n, 2.0 - n / 50) for n in range(1, 51)], FACTS) is None


def test_a_validation_far_above_the_bases_own_is_too_high_a_rate_though_the_loss_fell():
    falling = [step(n, 8.0 - n / 50) for n in range(1, 51)]
    said = too_high_rate([valid(0, 0.75), *falling, valid(50, 6.0)], FACTS)
    assert said is not None
    assert "validation rose from 0.75, the base's, to 6.00" in said.reason
    assert too_high_rate([valid(0, 0.75), *falling, valid(50, 1.4)], FACTS) is None
    assert too_high_rate([valid(0, 0.1), *falling, valid(50, 0.5)], FACTS) is None
    assert too_high_rate([valid(5, 0.75), *falling, valid(50, 6.0)], FACTS) is None


# ---------------------------------------------------------------- how long, and on what


def learning(last: float) -> list[dict]:
    return [valid(0, 3.0), *map(step, range(1, 41)), valid(20, 2.0), valid(30, 1.8), valid(40, last), ended()]


def test_a_validation_that_still_falls_asks_for_a_longer_run():
    said = still_learning(learning(1.5), FACTS)
    assert said is not None
    assert said.reason == "validation was still falling: 1.800 at step 30, 1.500 at the end"
    assert said.assignments == ("training.num_epochs=6",)
    by_steps = still_learning(learning(1.5), facts(max_steps=40))
    assert by_steps is not None
    assert by_steps.assignments == ("training.max_steps=80",)


@pytest.mark.parametrize(
    "entries",
    [learning(1.79), learning(1.9), [valid(0, 3.0), step(1), valid(1, 1.0)], learning(1.5)[:-2]],
    ids=["it has levelled off", "it rose", "too few validations", "nothing was validated at the end"],
)
def test_a_run_is_long_enough_when(entries):
    assert still_learning(entries, FACTS) is None


def test_a_run_that_stopped_early_is_not_told_to_be_longer():
    assert still_learning([*learning(1.5)[:-1], ended(stopped_early=True)], FACTS) is None


def test_a_run_without_validation_is_told_what_that_costs():
    for held_out, asked in ((0.0, 0.1), (0.1, 0.2)):  # of very few rows, a tenth is none
        said = no_validation(
            [step(1)], replace(FACTS, config=build_config({"data": {"valid_fraction": held_out}}))
        )
        assert said is not None
        assert said.options == f"--set data.valid_fraction={asked}"
    assert no_validation([step(1), valid(1, 1.0)], FACTS) is None


def test_cut_rows_are_told_from_one_in_a_hundred_on():
    said = cut_rows([], replace(FACTS, cut_rows=7))
    assert said is not None
    assert "7 of 100 rows (7%) were longer than 512 tokens and cut" in said.reason
    assert said.assignments == ("data.max_seq_length=1024",)
    assert cut_rows([], replace(FACTS, num_rows=1000, cut_rows=7)) is None
    dropped = cut_rows([], replace(FACTS, dropped_rows=7))
    assert dropped is not None
    assert dropped.reason.endswith("and dropped")


def test_rows_without_a_target_are_told():
    said = unlabelled_rows([], replace(FACTS, unlabelled_rows=2))
    assert said is not None
    assert said.reason.startswith("2 rows were left out: the prompt fills the window")
    assert unlabelled_rows([], FACTS) is None


# ---------------------------------------------------------------- memory and speed


def slowing(*, swap: int = 0, pressure: str | None = None, last: float = 2.0) -> list[dict]:
    memory = {"swap_growth_bytes": swap, "pressure": pressure}
    return [step(n, seconds=1.0 if n <= 10 else last, memory=memory) for n in range(1, 41)]


@pytest.mark.parametrize(
    ("run", "sign"),
    [
        (slowing(swap=GIB), "swap grew 1.0 GiB"),
        (slowing(pressure="critical"), "the system's memory pressure was critical"),
        ([*slowing(), pressed("cleared MLX's buffer cache")], "the footprint passed its budget"),
    ],
    ids=["swap", "pressure", "budget"],
)
def test_a_run_that_slows_down_for_want_of_memory_is_told_so(run, sign):
    said = falling_speed(run, FACTS)
    assert said is not None
    assert said.reason == f"tokens per second fell 50% over the run (100 → 50) while {sign}"
    assert said.assignments == ("training.batch_size=1", "training.gradient_accumulation=4")


@pytest.mark.parametrize(
    "run",
    [slowing(), slowing(swap=GIB, last=1.2), slowing(swap=GIB)[:11], slowing(pressure="normal")],
    ids=["no sign of short memory", "hardly slower", "too few updates", "normal pressure"],
)
def test_a_run_is_not_told_of_swap_when(run):
    assert falling_speed(run, FACTS) is None


def test_what_takes_less_memory_is_said_in_order_of_harm():
    assert falling_speed(slowing(swap=GIB), facts(batch_size=1)).assignments == (
        "training.gradient_checkpointing=true",
    )
    both = facts(batch_size=1, gradient_checkpointing=True)
    assert falling_speed(slowing(swap=GIB), both).assignments == ("data.max_seq_length=256",)


def test_halved_micro_batches_are_suggested_for_the_next_run_with_the_same_updates():
    halved = pressed("halved the micro-batch to 2, with twice the accumulation: the same updates")
    said = relieved([step(1), halved, halved], facts(batch_size=8, gradient_accumulation=2))
    assert said is not None
    assert said.assignments == ("training.batch_size=2", "training.gradient_accumulation=8")
    assert "halved 2 times" in said.reason
    assert relieved([step(1), pressed("cleared MLX's buffer cache")], FACTS) is None


WIDE = Layout(linear_cost=12.0 * 2048, is_banded=True)
SHORT = Window(lengths=(12,) * 64, batch_size=2, layout=WIDE, may_pack=True)


def test_padding_is_told_with_the_share_that_was_measured_and_the_factor_that_is_modelled():
    said = empty_window([step(1, tokens=38, positions=100)], replace(FACTS, window=SHORT))
    assert said is not None
    assert said.reason.startswith("62% of the positions were padding; an epoch is ")
    assert "by the cost model of positions and attention" in said.reason
    assert said.assignments == ("data.packing=true",)


@pytest.mark.parametrize(
    ("entry", "window"),
    [
        (step(1, tokens=80, positions=100), SHORT),
        (step(1, tokens=38, positions=0), SHORT),
        (step(1, tokens=38, positions=100), replace(SHORT, may_pack=False)),
        (step(1, tokens=38, positions=100), None),
    ],
    ids=["little of it", "not counted", "nothing to do about it", "rows not known"],
)
def test_padding_is_not_told_when_there_is(entry, window):
    assert empty_window([entry], replace(FACTS, window=window)) is None


ROOM = Room(
    assignments=("training.gradient_checkpointing=false",),
    needed_bytes=3 * GIB,
    budget_bytes=8 * GIB,
    effect="no layer computed twice",
)


def test_memory_that_was_left_is_told_with_what_it_would_buy():
    said = room_left([step(1)], replace(FACTS, room=ROOM))
    assert said is not None
    assert said.reason == (
        "the run took 1.00 of 8.00 GiB; by the plan 3.00 GiB are enough to have no layer computed twice"
    )
    assert room_left([step(1)], FACTS) is None
    assert room_left([step(1, memory={"footprint_bytes": 6 * GIB})], replace(FACTS, room=ROOM)) is None
    assert room_left([step(1), pressed("cleared")], replace(FACTS, room=ROOM)) is None


# ---------------------------------------------------------------- what is done with them


def test_of_two_suggestions_for_one_key_the_graver_is_made():
    worse = [valid(0, 1.0), *(step(n, 1.0 + n / 20) for n in range(1, 21)), valid(20, 2.0)]
    assert too_high_rate(worse, FACTS).keys == overfitting(worse, FACTS).keys == {"training.learning_rate"}
    assert [said.topic for said in suggestions(worse, FACTS)] == ["learning rate"]


def test_every_assignment_of_every_rule_makes_a_valid_configuration():
    from mlx_qlora.config import merge_trees, parse_assignment

    runs = [overfit(), learning(1.5), slowing(swap=GIB), spiking(3.0, 3), [step(1)], [step(1, None)]]
    every = replace(FACTS, cut_rows=9, unlabelled_rows=1, window=SHORT, room=ROOM)
    runs.append([step(1, tokens=38), pressed("halved the micro-batch to 1")])
    found = [said for run in runs for said in suggestions(run, every)]
    assert {said.topic for said in found} >= {"overfitting", "learning rate", "swap", "validation", "padding"}
    for said in found:
        tree = begun = build_config({"training": {"gradient_checkpointing": True}}).model_dump(mode="json")
        for assignment in said.assignments:
            tree = merge_trees(tree, parse_assignment(assignment))
        assert build_config(tree) != build_config(begun), said


def test_the_command_runs_it_again_in_another_folder(tmp_path):
    found = suggestions([step(1)], FACTS)
    folder = tmp_path / "my club"
    assert command(folder, found) == (
        f"mlx-qlora train --config '{folder}/run.yaml' --adapter-path '{folder}-2' "
        "--set data.valid_fraction=0.2"
    )
