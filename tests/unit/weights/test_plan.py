"""The plan knows the result from headers alone, and refuses weights that do not fit their config."""

import inspect
import json
import shutil
from itertools import pairwise

import mlx.core as mx
import pytest

from mlx_qlora.errors import ModelError, WeightsError
from mlx_qlora.quantization.policy import Recipe
from mlx_qlora.quantization.schemes import SCHEMES, scheme_named
from mlx_qlora.weights.plan import plan_quantization, skeleton
from mlx_qlora.weights.source import resolve_model
from mlx_qlora.weights.stream import quantize_checkpoint
from tests.checkpoints import make_checkpoint, save_sharded, tensors_of

INT4 = scheme_named("int4")
OWN_CODE = """
import mlx.core as mx
import mlx.nn as nn
from dataclasses import dataclass

@dataclass
class ModelArgs:
    width: int
    @classmethod
    def from_dict(cls, config):
        return cls(config["width"])

class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.mine = nn.Linear(args.width, 8, bias=False)

    def sanitize(self, weights):
        weights["mine.weight"] += 1
        return weights
"""


@pytest.fixture
def model(tmp_path, tiny_llama_folder):
    return shutil.copytree(tiny_llama_folder, tmp_path / "model")


def plan(folder, scheme=INT4, skip=(), shard_bytes=1 << 30, **options):
    return plan_quantization(resolve_model(str(folder), **options), scheme, skip, shard_bytes)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def outputs(made):
    return {output.name: output for shard in made.shards for job in shard for output in job.outputs}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("architecture", ["gemma2", "qwen3_moe"])
def test_planned_names_types_shapes_and_bytes_are_those_written(
    architecture, scheme, tmp_path, tiny_llama_folder
):
    if scheme.is_codebook and architecture == "qwen3_moe":  # there are no stacked experts in NF4
        scheme = Recipe(scheme, overrides=(("switch_mlp", SCHEMES["int4"]),))
    folder = make_checkpoint(tmp_path / "source", architecture, tiny_llama_folder, num_shards=2)
    planned = outputs(made := plan(folder, scheme, shard_bytes=30_000))
    quantize_checkpoint(resolve_model(str(folder)), tmp_path / "out", scheme, shard_bytes=30_000)
    written = tensors_of(tmp_path / "out")
    assert {name: output.shape for name, output in planned.items()} == {
        n: a.shape for n, a in written.items()
    }
    assert {n: output.num_bytes for n, output in planned.items()} == {n: a.nbytes for n, a in written.items()}
    assert made.output_bytes == sum(array.nbytes for array in written.values())
    assert made.num_parameters == sum(array.size for array in tensors_of(folder).values())
    names = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert names == {made.shard_name(index) for index in range(len(made.shards))}


@pytest.mark.parametrize("shard_bytes", [1, 5_000, 20_000, 1 << 30])
def test_shards_keep_their_size_unless_one_tensor_is_larger(model, shard_bytes):
    made = plan(model, shard_bytes=shard_bytes)
    sizes = [[sum(o.num_bytes for o in job.outputs) for job in shard] for shard in made.shards]
    assert all(sum(jobs) <= shard_bytes or len(jobs) == 1 for jobs in sizes)
    assert all(sum(a) + b[0] > shard_bytes for a, b in pairwise(sizes))
    assert len(outputs(made)) == sum(len(job.outputs) for shard in made.shards for job in shard)


def test_planning_evaluates_no_weights(tmp_path, tiny_llama_folder):
    folder = make_checkpoint(tmp_path / "moe", "qwen3_moe", tiny_llama_folder, vocab_size=20_000)
    source = resolve_model(str(folder))
    plan_quantization(source, INT4, (), 1 << 30)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    plan_quantization(source, INT4, (), 1 << 30)
    assert mx.get_peak_memory() - before < 100_000


def test_planning_leaves_the_random_state_alone(model):
    source = resolve_model(str(model))
    mx.random.seed(5)
    expected = mx.random.normal((4,)).tolist()
    mx.random.seed(5)
    skeleton(source)
    assert mx.random.normal((4,)).tolist() == expected


def test_expert_stacks_are_not_held_while_they_are_written(tmp_path, tiny_llama_folder):
    folder = make_checkpoint(
        tmp_path / "moe", "qwen3_moe", tiny_llama_folder, hidden_size=512, moe_intermediate_size=512
    )
    made = plan(folder)
    jobs = [job for shard in made.shards for job in shard if "switch_mlp" in job.name]
    assert len(jobs) == 6
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for job in jobs:
        for first in range(0, job.rows, 128):
            mx.eval(job.read(first, first + 128))
    assert mx.get_peak_memory() - before < jobs[0].num_bytes / 2


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_a_missing_expert_is_a_weights_error(architecture, tmp_path, tiny_llama_folder):
    folder = make_checkpoint(tmp_path / "moe", architecture, tiny_llama_folder)
    tensors = tensors_of(folder)
    name = next(name for name in tensors if "experts.2." in name)
    del tensors[name]
    save_sharded(folder, tensors, 1)
    with pytest.raises(WeightsError, match=name.replace(".", r"\.")):
        plan(folder)


@pytest.mark.parametrize("has_tower", [True, False])
def test_what_vision_needs_stays_only_where_the_model_keeps_its_tower(model, monkeypatch, has_tower):
    from mlx_lm.models import llama
    from mlx_lm.utils import save

    if has_tower:
        as_it_was = llama.LlamaModel.__init__

        def with_tower(self, args):
            as_it_was(self, args)
            self.vision_tower = {}

        monkeypatch.setattr(llama.LlamaModel, "__init__", with_tower)
    edit_config(model, vision_config={"depth": 2})
    assert "keep_vision_config" in inspect.getsource(save)  # mlx-lm's rule, which this follows
    assert plan(model).config.get("vision_config") == ({"depth": 2} if has_tower else None)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": 128}, "model.norm.weight: [64], but config.json makes it [128]"),
        ({"num_hidden_layers": 3}, "model.layers.2.mlp.up_proj.weight: missing"),
        ({"num_hidden_layers": 1}, "model.layers.1.mlp.up_proj.weight: the architecture has no such tensor"),
        ({"tie_word_embeddings": False}, "lm_head.weight: missing"),
        ({"attention_bias": True}, "model.layers.0.self_attn.q_proj.bias: missing"),
        ({"vocab_size": 1000}, "[1000, 64]"),
    ],
)
def test_weights_that_do_not_fit_the_configuration_are_listed(model, changes, says):
    edit_config(model, **changes)
    with pytest.raises(WeightsError) as caught:
        plan(model)
    assert says in str(caught.value)


def test_every_wrong_tensor_is_listed_in_one_error(model):
    tensors = tensors_of(model)
    tensors["stray"] = mx.zeros((3,))
    tensors["model.norm.weight"] = mx.zeros((65,))
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_sharded(model, tensors, 1)
    with pytest.raises(WeightsError, match=r"\(3 tensors\)") as caught:
        plan(model)
    for says in ("stray: the arch", "model.norm.weight: [65]", "model.layers.0.mlp.up_proj.weight: missing"):
        assert says in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "64"},
        {"hidden_size": None},
        {"num_attention_heads": 0},
        {"num_hidden_layers": -1.5},
        {"rope_scaling": {"type": "nonsense"}},
        {"vocab_size": {}},
    ],
)
def test_a_nonsensical_configuration_is_a_model_error(model, changes):
    edit_config(model, **changes)
    with pytest.raises(ModelError, match="does not describe a llama model") as caught:
        plan(model)
    assert caught.value.where == str(model / "config.json")


def test_the_folder_s_own_code_builds_a_trusted_model(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "mine.py").write_text(OWN_CODE)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "mine", "model_file": "mine.py", "width": 64})
    )
    save_sharded(folder, {"mine.weight": mx.ones((8, 64))}, 1)
    source = resolve_model(str(folder), trust_remote_code=True)
    assert outputs(plan_quantization(source, INT4, (), 1 << 30)).keys() == {
        "mine.weight",
        "mine.scales",
        "mine.biases",
    }
    quantize_checkpoint(source, tmp_path / "out", INT4)
    assert (tmp_path / "out" / "mine.py").read_text() == OWN_CODE
    # Ones in the file; its own code adds one, in place.
    assert (tensors_of(tmp_path / "out")["mine.biases"] == 2).all().item()


@pytest.mark.parametrize("code", [None, "raise RuntimeError('no')", "syntax error here", "x = 1"])
def test_own_code_that_does_not_work_is_a_model_error(model, code):
    if code is not None:
        (model / "mine.py").write_text(code)
    edit_config(model, model_file="mine.py")
    with pytest.raises(ModelError, match="does not describe"):
        plan(model, trust_remote_code=True)


def test_the_digest_changes_with_anything_that_changes_the_result(model):
    digests = [
        plan(model).digest("a"),
        plan(model).digest("b"),
        plan(model, scheme_named("int8")).digest("a"),
        plan(model, skip=["up_proj"]).digest("a"),
        plan(model, shard_bytes=9_000).digest("a"),
    ]
    edit_config(model, rope_theta=5.0)
    digests.append(plan(model).digest("a"))
    assert len(set(digests)) == len(digests)
    assert plan(model).digest("a") == digests[-1]


def test_a_skipped_layer_stays_as_it_was_and_is_listed(model):
    made = plan(model, skip=["layers.0.self_attn", "embed_tokens"])
    assert {layer.layer for layer in made.skipped} == {
        "model.embed_tokens",
        *(f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"),
    }
    assert outputs(made)["model.embed_tokens.weight"].dtype == "BF16"
    assert "model.layers.0.self_attn.q_proj.scales" not in outputs(made)
    assert "model.layers.1.self_attn.q_proj.scales" in outputs(made)


def test_layers_no_group_divides_stay_and_are_listed(material):
    folder = material / "stories260k" / "hf"
    if not folder.is_dir():
        pytest.skip("stories260k is not among the material")
    made = plan(folder)
    assert {layer.layer for layer in made.skipped} == {f"model.layers.{i}.mlp.down_proj" for i in range(5)}
    assert all("172 inputs" in layer.reason for layer in made.skipped)
    assert outputs(made)["model.layers.0.mlp.down_proj.weight"].shape == (64, 172)
