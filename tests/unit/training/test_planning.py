"""training/planning.py and training/model_shape.py"""

import json

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from mlx_qlora.config import build_config
from mlx_qlora.errors import ConfigError, Interrupted, MemoryBudgetError, ModelError
from mlx_qlora.lora.attach import attach
from mlx_qlora.memory.plan import GIB, MIB
from mlx_qlora.objective.loss import objective_for
from mlx_qlora.presets import preset
from mlx_qlora.training.events import RunStarted, StepDone
from mlx_qlora.training.model_shape import MicroBatch, planned_model, workload
from mlx_qlora.training.planning import auto_preset, config_source, plan_run, work_of
from mlx_qlora.training.run import train
from mlx_qlora.weights.loader import load_base
from tests.conftest import save_tokenizer
from tests.tiny import _SIZES, ARCHITECTURES, target_modules

LITTLE = {"data": {"max_seq_length": 512}, "training": {"batch_size": 8, "memory_budget_gib": 0.001}}


def planned(folder, name="llama", layers=2, **changes):
    sizes = {**_SIZES, **ARCHITECTURES[name], "torch_dtype": "bfloat16", "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(sizes))
    tree = {"model": {"path": str(folder)}, "lora": {"target_modules": list(target_modules(name))}}
    return build_config(tree, changes)


@pytest.fixture(scope="module")
def architecture_folder(tmp_path_factory):
    """Makes the folder of a tiny model with weights, by architecture."""

    def made(name):
        folder = tmp_path_factory.mktemp(name)
        vocabulary = -(-save_tokenizer(folder) // 64) * 64
        config = {**_SIZES, **ARCHITECTURES[name], "torch_dtype": "bfloat16", "vocab_size": vocabulary}
        model_class, args_class = _get_classes(config)
        model = model_class(args_class.from_dict(config))
        model.set_dtype(mx.bfloat16)
        mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return made


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_planned_from_its_config_json_alone(name, tmp_path):
    config = planned(tmp_path, name)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    plan = plan_run(config).plan
    assert plan.fits
    assert plan.parts["activations"] > 0
    assert mx.get_peak_memory() - before < MIB


@pytest.mark.parametrize(("scheme", "name"), [("int4", "llama"), ("none", "qwen2"), ("int8", "gemma2")])
def test_bytes_that_stay_are_those_of_the_model_that_is_really_loaded(scheme, name, architecture_folder):
    folder = architecture_folder(name)
    tree = {
        "model": {"path": str(folder)},
        "quantization": {"scheme": scheme},
        "lora": {"rank": 4, "target_modules": list(target_modules(name))},
    }
    config = build_config(tree)
    numbers = plan_run(config).numbers
    model = load_base(config.model, config.quantization).model
    base = sum(a.nbytes for _, a in tree_flatten(model.parameters()))
    attach(model, config.lora, 0)
    trained = sum(a.nbytes for _, a in tree_flatten(model.trainable_parameters()))
    assert (numbers.weights_bytes, numbers.lora_bytes) == (base, trained)
    assert numbers.optimizer_bytes == pytest.approx(2 * trained, abs=100)


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
def test_a_step_has_the_sizes_of_the_objective_that_training_finds_out(name, architecture_folder):
    folder = architecture_folder(name)
    config = build_config(
        {"model": {"path": str(folder)}, "lora": {"target_modules": list(target_modules(name))}}
    )
    step = plan_run(config).numbers.step
    model = load_base(config.model, config.quantization).model
    attach(model, config.lora, 0)
    objective = objective_for(model.train())
    batch = MicroBatch(2, 512, 1022, 512)
    found = workload(objective, batch, config, on_cpu=True).step
    assert found.is_head_plain == step.is_head_plain == (name == "llama")
    assert found.are_scores_kept == step.are_scores_kept == (name == "gemma2")
    assert found.hidden == 2 * 512 * 64 * 4


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"training": {"batch_size": 1}}, {"training": {"batch_size": 4}}),
        ({"data": {"max_seq_length": 128}}, {"data": {"max_seq_length": 512}}),
        ({"training": {"gradient_checkpointing": True}}, {"training": {"gradient_checkpointing": False}}),
        ({"lora": {"num_layers": 1}}, {"lora": {"num_layers": 6}}),
        ({"lora": {"dropout": 0.0}}, {"lora": {"dropout": 0.1}}),
    ],
)
def test_what_takes_less_memory_is_predicted_to(less, more, tmp_path):
    base = {"data": {"max_seq_length": 512}, "training": {"batch_size": 2}}
    small, large = (plan_run(planned(tmp_path, layers=6, **merged(base, tree))).plan for tree in (less, more))
    assert small.needed_bytes < large.needed_bytes


def merged(base, over):
    return {key: {**base.get(key, {}), **over.get(key, {})} for key in {*base, *over}}


def test_what_helps_is_told_in_order_of_least_harm_and_keeps_the_update(tmp_path):
    run = plan_run(planned(tmp_path, layers=8, **LITTLE))
    changes = run.changes()
    assert changes[0].assignments == ("training.batch_size=4", "training.gradient_accumulation=4")
    kinds = [change.assignments[0].split("=")[0] for change in changes]
    order = ["training.batch_size", "training.gradient_checkpointing", "data.max_seq_length",
             "lora.num_layers", "lora.rank"]  # fmt: skip
    assert [kind for kind in order if kind in kinds] == list(dict.fromkeys(kinds))
    peaks = [change.peak_bytes for change in changes]
    assert peaks == sorted(peaks, reverse=True)
    assert not changes[-1].fits


def test_the_changes_that_are_told_make_it_fit(tmp_path):
    needed = plan_run(planned(tmp_path, layers=8, **LITTLE)).plan.needed_bytes
    tight = merged(LITTLE, {"training": {"memory_budget_gib": (needed - MIB) / GIB}})
    run = plan_run(planned(tmp_path, layers=8, **tight))
    assert not run.plan.fits
    changes = run.changes()
    assert changes[-1].fits
    assignments = [one.split("=") for change in changes for one in change.assignments]
    changed = {}
    for path, value in assignments:
        room, key = path.split(".")
        changed.setdefault(room, {})[key] = json.loads(value)
    assert plan_run(planned(tmp_path, layers=8, **merged(tight, changed))).plan.fits


def test_a_mac_is_planned_in_the_checkpoints_own_type(tmp_path):
    here, mac = (plan_run(planned(tmp_path), memory_bytes=m) for m in (None, 8 * GIB))
    assert "activations in bfloat16" in mac.notes
    assert 2 * mac.numbers.step.hidden == here.numbers.step.hidden
    assert mac.plan.budget.num_bytes == pytest.approx(16 / 3 * GIB, rel=1e-6)


def test_the_preset_of_this_size_of_mac_is_chosen_or_a_smaller_one_that_fits_the_model(tmp_path):
    planned(tmp_path)
    assert auto_preset(str(tmp_path), memory_bytes=32 * GIB) == "mac-32gb"
    assert auto_preset(str(tmp_path), memory_bytes=8 * GIB) == "mac-8gb"
    sizes = {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "head_dim": 128}
    wide = {**_SIZES, **ARCHITECTURES["llama"], **sizes, "num_key_value_heads": 40, "vocab_size": 32000}
    (tmp_path / "config.json").write_text(json.dumps({**wide, "num_hidden_layers": 60}))
    assert auto_preset(str(tmp_path), memory_bytes=16 * GIB) == "mac-8gb"
    assert auto_preset(str(tmp_path), memory_bytes=32 * GIB) == "mac-32gb"


def test_a_model_that_cannot_be_planned_gets_a_preset_by_memory(tmp_path):
    assert auto_preset(str(tmp_path / "none"), memory_bytes=16 * GIB) == "mac-16gb"
    assert auto_preset(None, memory_bytes=8 * GIB) == "mac-8gb"


def test_a_folder_without_a_config_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json"):
        plan_run(build_config({"model": {"path": str(tmp_path)}}))


def test_without_a_model_there_is_no_plan():
    with pytest.raises(ConfigError, match="no model"):
        plan_run(build_config({}))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"o clube {i} venceu " * (i + 1)}) + "\n" for i in range(8)))
    return path


def run_config(folder, rows, **training):
    return build_config(
        {
            "model": {"path": str(folder)},
            "data": {"path": str(rows), "valid_fraction": 0.0},
            "lora": {"rank": 2, "target_modules": ["q_proj"]},
            "training": {"max_steps": 20, "batch_size": 2, "steps_per_checkpoint": 1, **training},
        }
    )


def test_the_real_rows_count_and_are_counted(tiny_llama_folder, rows):
    config = run_config(tiny_llama_folder, rows)
    work = work_of(config)
    assert work.num_steps == 20
    assert work.tokens_per_epoch == sum(work.lengths)
    full, real = plan_run(config), plan_run(config, work=work)
    assert real.batch == work.largest
    assert real.plan.needed_bytes < full.plan.needed_bytes
    assert work.largest.labels <= work.largest.rows * work.largest.width


def test_a_run_that_cannot_fit_is_refused_before_weights_are_read(tiny_llama_folder, rows, tmp_path):
    seen = []
    config = run_config(tiny_llama_folder, rows, memory_budget_gib=0.05)
    with pytest.raises(MemoryBudgetError, match="may use 0.05 GiB") as refused:
        train(config, tmp_path / "a", on_bytes=lambda *_: seen.append("read"))
    assert seen == []
    assert "--force" in refused.value.run
    assert not (tmp_path / "a").exists()


def noted(event):
    return event.notes if isinstance(event, RunStarted) else ()


def test_force_goes_on_and_so_does_a_run_that_has_done_steps(tiny_llama_folder, rows, tmp_path):
    def interrupt(event):
        if isinstance(event, StepDone) and event.step == 3:
            raise KeyboardInterrupt

    config = run_config(tiny_llama_folder, rows)
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        train(config, tmp_path / "a", observers=[interrupt])
    tight = run_config(tiny_llama_folder, rows, memory_budget_gib=0.05)
    for folder, settings in (("a", {"resume": True}), ("b", {"force": True})):
        notes = []
        with pytest.raises(MemoryBudgetError, match="saved after step"):  # at run time, not by the plan
            train(tight, tmp_path / folder, observers=[lambda e, n=notes: n.extend(noted(e))], **settings)
        assert any("does not fit" in note for note in notes)


def test_planning_evaluates_no_array_of_the_model(tmp_path):
    config = planned(tmp_path)
    before = mx.get_active_memory()
    model = planned_model(config_source(config), config, [], on_cpu=True)
    assert sum(a.nbytes for _, a in tree_flatten(model.parameters())) > 50_000
    assert mx.get_active_memory() - before < 10_000


MISTRAL_7B = {
    "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 32768, "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize("gigabytes", [8, 16, 32])
def test_each_preset_trains_a_7b_model_on_its_mac(gigabytes, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**MISTRAL_7B, "torch_dtype": "bfloat16"}))
    config = build_config(preset(f"mac-{gigabytes}gb"), {"model": {"path": str(tmp_path)}})
    planned = plan_run(config, memory_bytes=gigabytes * GIB)
    assert planned.plan.fits, planned.line
    assert planned.changes() == []
