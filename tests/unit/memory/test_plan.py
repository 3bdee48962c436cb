"""memory/plan.py"""

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_qlora.errors import ConfigError
from mlx_qlora.memory.plan import (
    CONSTANTS,
    GIB,
    MIB,
    Budget,
    Constants,
    Step,
    Workload,
    mac_budget,
    parse_memory,
    plan_memory,
)

NOTHING = Constants(**dict.fromkeys((field.name for field in fields(Constants)), 0.0))
STEP = Step(
    num_layers=3,
    is_checkpointed=False,
    hidden=10 * MIB,
    outputs=40 * MIB,
    adapter_inputs=10 * MIB,
    dropped_inputs=0,
    scores=5 * MIB,
    are_scores_kept=False,
    logits=8 * MIB,
    is_head_plain=True,
    head=0,
    head_float32=20 * MIB,
    unpacked=2 * MIB,
)
ROOM = Budget(64 * GIB, "a test")


def work(lora: int = MIB, num_micro_batches: int = 1, **step: object) -> Workload:
    return Workload(GIB, lora, 2 * lora, replace(STEP, **step), 3, num_micro_batches)


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("8GB", 8 * GIB), ("16", 16 * GIB), ("0.5 gib", GIB // 2), ("512MB", GIB // 2)]
)
def test_memory_is_read_as_it_is_sold(text, num_bytes):
    assert parse_memory(text) == num_bytes


@pytest.mark.parametrize("text", ["", "lots", "0GB", "-8GB", "8TB8"])
def test_what_is_no_amount_of_memory_is_refused(text):
    with pytest.raises(ConfigError, match="no amount of memory"):
        parse_memory(text)


def test_a_small_mac_lends_its_gpu_two_thirds_and_a_large_one_three_quarters():
    assert mac_budget(8 * GIB).num_bytes == pytest.approx(16 / 3 * GIB, rel=1e-6)
    assert mac_budget(64 * GIB).num_bytes == 48 * GIB


def test_each_constant_counts_arrays_of_its_size():
    one = replace(NOTHING, layer_outputs=1.0, layer_inputs=0.5, checkpoint=2.0)
    plan = plan_memory(work(lora=0), ROOM, one)
    assert plan.parts["activations"] == 3 * (40 + 5) * MIB
    checkpointed = plan_memory(work(lora=0, is_checkpointed=True), ROOM, one)
    assert checkpointed.parts["activations"] == (3 * 2 * 10 + 40 + 5) * MIB


def test_only_the_larger_phase_counts():
    constants = replace(NOTHING, work_outputs=1.0, loss_logits=1.0)
    assert plan_memory(work(lora=0), ROOM, constants).phase == "backward"
    loss = plan_memory(work(lora=0, logits=50 * MIB), ROOM, constants)
    assert (loss.phase, loss.parts["loss"], loss.parts["activations"]) == ("loss", 50 * MIB, 0)


def test_with_large_adapters_the_update_decides():
    assert plan_memory(work(lora=GIB), ROOM).phase == "update"


def test_gradients_are_held_twice_when_they_are_summed():
    once, summed = (plan_memory(work(num_micro_batches=n), ROOM).parts["lora"] for n in (1, 4))
    assert summed - once == MIB


def test_scores_are_kept_only_where_attention_is_not_made_block_by_block():
    constants = replace(NOTHING, layer_scores=1.0)
    kept, blocked = (plan_memory(work(lora=0, are_scores_kept=are), ROOM, constants) for are in (True, False))
    assert (kept.parts["attention"], blocked.parts["attention"]) == (15 * MIB, 0)


def test_the_heap_of_the_c_library_counts_on_a_cpu_only():
    assert CONSTANTS.heap + CONSTANTS.head_heap > 0
    on_cpu, on_gpu = (plan_memory(work(), Budget(4 * GIB, "a test", keeps)) for keeps in (False, True))
    assert on_cpu.parts["interpreter"] > on_gpu.parts["interpreter"]


SIZES = [f.name for f in fields(Step) if f.type == "int"]


@given(st.sampled_from(SIZES), st.integers(1, 8), st.booleans(), st.booleans())
def test_parts_add_up_and_a_larger_step_never_means_less_memory(name, factor, is_checkpointed, keeps):
    small = replace(STEP, is_checkpointed=is_checkpointed, dropped_inputs=MIB, head=MIB)
    large = replace(small, **{name: getattr(small, name) * factor})
    budget = Budget(3 * GIB, "a test", keeps)
    plans = [plan_memory(Workload(GIB, MIB, MIB, step, 3, 2), budget) for step in (small, large)]
    for plan in plans:
        assert sum(plan.parts.values()) == plan.peak_bytes
        assert min(plan.parts.values()) >= 0
        assert plan.peak_bytes <= budget.num_bytes or plan.parts["cache"] == 0
    assert plans[0].needed_bytes <= plans[1].needed_bytes


def test_a_run_over_its_budget_does_not_fit_and_keeps_no_buffers():
    plan = plan_memory(work(), Budget(GIB, "a test", keeps_buffers=True))
    assert not plan.fits
    assert plan.parts["cache"] == 0


def test_no_constant_that_was_fitted_is_negative():
    assert min(getattr(CONSTANTS, field.name) for field in fields(Constants)) >= 0
