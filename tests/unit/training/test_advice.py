"""training/advice.py: formats for a machine, by predicted memory and measured quality."""

import json
import math

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache

from mlx_qlora.config import build_config
from mlx_qlora.errors import ConfigError
from mlx_qlora.memory.plan import GIB, MIB
from mlx_qlora.training import advice
from mlx_qlora.training.advice import (
    CANDIDATES,
    RECORDED,
    RECORDED_SOURCE,
    RUN_LOSS_NATS,
    Option,
    Quality,
    advise,
    choose,
    read_measured,
)
from tests.conftest import REPOSITORY

LARGE = {
    "model_type": "mistral",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 8000,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
MEASURED = {
    "fp16": Quality(0.0, 0.0),
    "int8": Quality(0.0001, 0.0),
    "int4": Quality(0.02, 0.02),
    "int2": Quality(1.0, 2.0),
}


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LARGE))
    return build_config(
        {"model": {"path": str(tmp_path)}, "data": {"max_seq_length": 64}, "training": {"batch_size": 1}}
    )


def option(name, size, quality, *, runs=True, trains=True):
    return Option(name, size, size, runs, size, trains, quality)


OPTIONS = st.lists(
    st.builds(
        Option,
        scheme=st.sampled_from(CANDIDATES),
        weights_bytes=st.integers(1, 100),
        run_bytes=st.integers(1, 200),
        can_run=st.booleans(),
        train_bytes=st.integers(1, 200),
        can_train=st.booleans(),
        quality=st.none() | st.builds(Quality, st.floats(0, 1), st.floats(-0.1, 3)),
    ),
    min_size=1,
    unique_by=lambda each: each.scheme,
)


@given(options=OPTIONS, is_training=st.booleans(), tolerance=st.floats(0.001, 0.5))
def test_the_choice_fits_and_nothing_that_fits_is_better(options, is_training, tolerance):
    found = choose(options, tolerance, is_training=is_training)
    fitting = [each for each in options if (each.can_train if is_training else each.can_run)]
    judged = [each for each in fitting if each.quality is not None]
    if not fitting:
        assert found.scheme is None
        return
    chosen = next(each for each in fitting if each.scheme == found.scheme)
    if not judged:
        assert chosen.weights_bytes == max(each.weights_bytes for each in fitting)
        return
    near = [each for each in judged if each.quality.divergence_nats <= tolerance]
    if near:
        assert chosen in near
        quick = [each for each in near if not each.scheme.startswith("nf4")] or near
        assert chosen.weights_bytes == min(each.weights_bytes for each in quick)
        assert chosen in quick
    else:
        assert chosen.quality.divergence_nats == min(each.quality.divergence_nats for each in judged)


def test_the_reason_says_by_what_it_was_chosen():
    near, far = option("int8", 8, Quality(0.001, 0.001)), option("int2", 2, Quality(0.9, 1.5))
    assert "that fits within 0.01" in choose([near, far], 0.01, is_training=False).reason
    assert "none that fits is within" in choose([far], 0.01, is_training=False).reason
    assert "no quality was measured" in choose([option("int3", 3, None)], 0.01, is_training=False).reason
    none = choose([option("int2", 5 * GIB, None, runs=False)], 0.01, is_training=False)
    assert (none.scheme, "5.00 GiB" in none.reason) == (None, True)


@pytest.mark.slow
def test_less_memory_never_gets_a_larger_format(config):
    sizes = []
    for memory in (1500 * MIB, 800 * MIB, 550 * MIB, 450 * MIB, 64 * MIB):
        found = advise(config, memory_bytes=memory, measured=MEASURED, source="test")
        by_name = {each.scheme: each for each in found.options}
        assert [each.scheme for each in found.options if each.can_run] == [
            each.scheme for each in found.options if each.run_bytes <= found.budget.num_bytes
        ]
        sizes.append(by_name[found.to_run.scheme].weights_bytes if found.to_run.scheme else 0)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1] == 0
    assert found.to_train.scheme is None


def test_every_format_is_planned_and_smaller_ones_take_less(config):
    found = advise(config, memory_bytes=16 * GIB, measured=MEASURED, source="test")
    by_name = {each.scheme: each for each in found.options}
    assert list(by_name) == list(CANDIDATES)
    assert by_name["nf4"].weights_bytes > by_name["nf4-dq"].weights_bytes
    for larger, smaller in (("fp16", "int8"), ("int8", "int6"), ("int4", "int3")):
        assert by_name[larger].run_bytes > by_name[smaller].run_bytes
        assert by_name[larger].weights_bytes > by_name[smaller].weights_bytes
    assert by_name["nf4"].run_bytes == pytest.approx(by_name["int4"].run_bytes, rel=0.01)
    assert found.to_run.scheme == "int8"
    assert found.to_train.scheme == "int4"
    assert by_name["int3"].quality is None
    assert found.context_tokens == 4096


def test_a_format_that_was_measured_in_other_groups_is_planned_too(config):
    found = advise(config, memory_bytes=16 * GIB, measured={"int4-g32": Quality(0.001, 0.0)}, source="test")
    by_name = {each.scheme: each for each in found.options}
    assert by_name["int4-g32"].weights_bytes > by_name["int4"].weights_bytes
    assert found.to_run.scheme == "int4-g32"


def test_keys_and_values_are_counted_as_mlx_lm_allots_them():
    from tests.tiny import tiny_llama

    model = tiny_llama()
    cache = make_prompt_cache(model)
    mx.eval(model(mx.zeros((1, 300), mx.int32), cache=cache))
    made = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache)
    assert advice._cache_bytes(model, 300) == made == 2 * 2 * 512 * 32 * 4


def test_running_is_planned_without_making_an_array(config):
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    advise(config, memory_bytes=16 * GIB, measured=MEASURED, source="test")
    assert mx.get_peak_memory() - before < MIB


def test_a_quantized_model_leaves_nothing_to_choose(config, tmp_path):
    quantized = {**LARGE, "quantization": {"bits": 4, "group_size": 64}}
    (tmp_path / "config.json").write_text(json.dumps(quantized))
    with pytest.raises(ConfigError, match="quantized already"):
        advise(config, memory_bytes=16 * GIB)


def test_what_compare_printed_is_read_and_the_float_model_has_one_name(tmp_path):
    rows = [
        {"scheme": "none", "divergence_nats": 0.0, "perplexity_change": 0.0, "problem": None},
        {"scheme": "int4-g32", "divergence_nats": 0.01, "perplexity_change": 0.02, "problem": None},
        {"scheme": "nf4", "problem": "why"},
    ]
    file = tmp_path / "compare.json"
    file.write_text(json.dumps({"rows": rows}))
    assert read_measured(file) == {"fp16": Quality(0, 0), "int4-g32": Quality(0.01, 0.02)}


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"rows": [{"scheme": "int4"}]}', '{"rows": []}', '{"rows": 3}', "\x00"]
)
def test_another_file_is_refused_with_the_command_that_makes_one(text, tmp_path):
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(ConfigError, match="mlx-qlora compare"):
        read_measured(tmp_path / "file.json")
    with pytest.raises(ConfigError, match="Cannot read"):
        read_measured(tmp_path / "absent.json")


def test_a_scheme_in_it_that_does_not_exist_is_refused(tmp_path):
    row = {"scheme": "int7", "divergence_nats": 0.0, "perplexity_change": 0.0, "problem": None}
    (tmp_path / "file.json").write_text(json.dumps({"rows": [row]}))
    with pytest.raises(ConfigError, match="int7"):
        read_measured(tmp_path / "file.json")


def test_the_recorded_qualities_are_those_in_the_documents():
    found = [read_measured(REPOSITORY / "docs" / "compare" / name) for name in advice.RECORDED_FILES]
    assert set(RECORDED) == set(CANDIDATES)
    for scheme, quality in RECORDED.items():
        mean = math.prod(each[scheme].divergence_nats for each in found) ** (1 / len(found))
        assert quality.divergence_nats == pytest.approx(mean, rel=0.01)
        assert quality.perplexity_change == pytest.approx(math.expm1(mean), rel=0.02)
    assert "COMPARE.md" in RECORDED_SOURCE
    assert RECORDED["int8"].divergence_nats < RUN_LOSS_NATS < RECORDED["int2"].divergence_nats


def test_the_command_prints_one_choice_for_each_use(tmp_path, capsys):
    from mlx_qlora.__main__ import load_command, run

    (tmp_path / "config.json").write_text(json.dumps(LARGE))
    options = ["--model", str(tmp_path), "--advise", "--memory", "8GB"]
    assert run(load_command("plan"), [*options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"options", "to_run", "to_train", "budget", "source", "preset"} <= set(found)
    assert found["to_run"]["scheme"] in CANDIDATES
    assert run(load_command("plan"), options) == 0
    said = capsys.readouterr().out
    assert f"To run: {found['to_run']['scheme']}, " in said
    assert f"To train: {found['to_train']['scheme']}, " in said
    assert "COMPARE.md" in said
    assert run(load_command("plan"), ["--model", str(tmp_path), "--measured", "x.json"]) == 2
    assert "--measured is for --advise" in capsys.readouterr().err
