"""A person trains, resumes and asks with layers in their files: the numbers are the resident model's."""

import json

import pytest

from mlx_qlora.config import build_config
from mlx_qlora.errors import MemoryBudgetError
from mlx_qlora.inference.generate import load_assistant
from mlx_qlora.memory.monitor import GIB
from mlx_qlora.training.planning import plan_run
from mlx_qlora.training.run import train

ONE_LAYER_AT_A_TIME_GIB = 50_000 / GIB


@pytest.fixture
def settings(tiny_llama_folder, tmp_path):
    rows = [{"question": f"pergunta {i * 37}?", "answer": "resposta " * (i % 5 + 1)} for i in range(30)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return {
        "model": {"path": str(tiny_llama_folder)},
        "data": {"path": str(data)},
        "lora": {"dropout": 0.1},
        "training": {
            "max_steps": 4,
            "warmup_steps": 0,
            "learning_rate": 0.01,
            "steps_per_checkpoint": 2,
            "steps_per_validation": 2,
        },
    }


def offloaded(settings, **training):
    model = {**settings["model"], "offload": True, "offload_budget_gib": ONE_LAYER_AT_A_TIME_GIB}
    return {**settings, "model": model, "training": {**settings["training"], **training}}


def adapter_of(settings, folder, **options):
    events = []
    run = train(build_config(settings), folder, observers=[events.append], **options)
    return (folder / "adapters.safetensors").read_bytes(), events[0].notes, run


@pytest.mark.parametrize(
    ("scheme", "budget_bytes"),
    [
        ("int4", 50_000),
        pytest.param("nf4-dq", 40_000, marks=pytest.mark.slow),
        pytest.param("none", 250_000, marks=pytest.mark.slow),
    ],
)
def test_the_adapter_of_a_run_is_the_resident_one(settings, tmp_path, scheme, budget_bytes):
    settings["quantization"] = {"scheme": scheme}
    if scheme == "none":
        settings["lora"]["num_layers"] = 1
        settings["training"]["cache_frozen_prefix"] = True
    resident, notes, _ = adapter_of(settings, tmp_path / "resident")
    assert not any("offload" in note for note in notes)
    from_files = offloaded(settings)
    from_files["model"]["offload_budget_gib"] = budget_bytes / GIB
    streamed, notes, run = adapter_of(from_files, tmp_path / "streamed")
    assert any("2 of 2 layers stay in their files" in note for note in notes)
    assert run.base.offload.plan.streamed
    assert streamed == resident
    untrained = {**settings, "training": {**settings["training"], "max_steps": 1}}
    assert adapter_of(untrained, tmp_path / "short")[0] != resident


def test_a_run_begun_with_offload_goes_on_without_it(settings, tmp_path):
    resident, _, _ = adapter_of(settings, tmp_path / "resident")
    adapter_of(offloaded(settings, max_steps=4), tmp_path / "mixed")
    for later in (tmp_path / "mixed" / "checkpoints").glob("step-0000004"):
        for file in later.iterdir():
            file.unlink()
        later.rmdir()
    mixed, notes, _ = adapter_of(settings, tmp_path / "mixed", resume=True)
    assert "resumed from step-0000002" in notes
    assert mixed == resident


def test_an_adapter_answers_the_same_from_files(settings, tmp_path):
    adapter_of(settings, tmp_path / "adapter")
    resident = load_assistant(adapter_path=tmp_path / "adapter")
    streamed = load_assistant(adapter_path=tmp_path / "adapter", offload_budget_gib=ONE_LAYER_AT_A_TIME_GIB)
    assert streamed.base.offload is not None
    assert "2 of 2 layers" in streamed.base.notes[0]
    assert streamed.ask("pergunta 37?").text == resident.ask("pergunta 37?").text != ""
    fits = load_assistant(adapter_path=tmp_path / "adapter", offload=True)
    assert fits.base.offload is None
    assert "none is left in its file" in fits.base.notes[0]


def test_what_does_not_fit_at_all_says_how_much_is_needed(settings, tmp_path):
    settings["model"] |= {"offload": True, "offload_budget_gib": 1e-6}
    with pytest.raises(MemoryBudgetError, match="one layer at a time") as error:
        adapter_of(settings, tmp_path / "adapter")
    enough = float(error.value.run.partition("offload_budget_gib=")[2].split()[0])
    settings["model"] |= {"offload_budget_gib": enough}
    adapter_of(settings, tmp_path / "enough")


def test_the_plan_counts_the_weights_that_may_be_in_memory_and_offers_offload_last(settings):
    whole = plan_run(build_config(settings))
    streamed = plan_run(build_config(offloaded(settings)))
    assert streamed.plan.parts["weights"] == round(ONE_LAYER_AT_A_TIME_GIB * GIB)
    assert whole.plan.parts["weights"] > streamed.plan.parts["weights"]
    assert streamed.numbers.step.is_checkpointed
    settings["training"]["memory_budget_gib"] = 0.000_05
    changes = plan_run(build_config(settings)).changes()
    assert changes[-1].assignments == ("model.offload=true",)
