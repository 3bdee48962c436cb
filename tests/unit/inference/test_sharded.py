"""inference/sharded.py: what each rank keeps of a model, without the ranks."""

from dataclasses import dataclass

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_qlora.errors import AdapterError, ModelError
from mlx_qlora.inference.sharded import RowShardedLoRA, architectures, read_part, shard, shardings_of
from mlx_qlora.lora.layers import LoRALinear
from mlx_qlora.quantization.nf4_layers import NF4Linear
from tests.tiny import tiny_model, with_lora

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Rank:
    """A place in a group that nobody talks to."""

    number: int
    of: int

    def rank(self):
        return self.number

    def size(self):
        return self.of


def model_of(name="qwen2", *, bits=None, adapter=True, **lora):
    model = tiny_model(name, bits=bits)
    return with_lora(model, target_modules=ALL, **lora).eval() if adapter else model


def parts(ranks, **options):
    """The same model as each of so many ranks keeps it."""
    made = [model_of(**options) for _ in range(ranks)]
    for number, model in enumerate(made):
        assert shard(model, Rank(number, ranks)) == "tensor"
    return made


@pytest.fixture
def adding(monkeypatch):
    """Sums over ranks are left to the test: each rank gives its own summand."""
    monkeypatch.setattr(mx.distributed, "all_sum", lambda x, **_: x)


def assert_close(one, other):
    assert mx.abs(one - other).max() <= 1e-5 * mx.abs(other).max()


def test_a_layer_cut_along_its_outputs_gives_each_rank_a_piece_of_base_and_update():
    whole = model_of().model.layers[1].self_attn.k_proj
    pieces = [model.model.layers[1].self_attn.k_proj for model in parts(2)]
    x = mx.random.normal((3, 64), key=mx.random.key(1))
    assert all(type(piece) is LoRALinear for piece in pieces)
    made = [piece(x) for piece in pieces]
    assert_close(mx.concatenate(made, axis=-1), whole(x))


@pytest.mark.usefixtures("adding")
@pytest.mark.parametrize("name", ["down_proj", "o_proj"])
def test_a_layer_cut_along_its_inputs_sums_base_and_update_at_once_and_its_bias_counts_once(name):
    models = [model_of(), *parts(2)]
    for model in models:
        for block in model.layers:
            mx.eval(block.parameters())
    whole, *pieces = (
        getattr(m.model.layers[0].mlp if name == "down_proj" else m.model.layers[0].self_attn, name)
        for m in models
    )
    assert all(type(piece) is RowShardedLoRA for piece in pieces)
    width = whole.lora_a.shape[0]
    x = mx.random.normal((3, width), key=mx.random.key(2))
    bias = mx.random.normal((64,), key=mx.random.key(3))
    made = sum(piece(x[:, r * width // 2 : (r + 1) * width // 2]) for r, piece in enumerate(pieces))
    assert_close(made, whole(x))
    biased = RowShardedLoRA(pieces[0].part, bias, Rank(0, 2))
    assert_close(biased(x[:, : width // 2]), pieces[0](x[:, : width // 2]) + bias)


def test_embedding_norms_and_head_stay_whole():
    whole = dict(tree_flatten(model_of(adapter=False).parameters()))
    for model in parts(2, adapter=False):
        for name, array in tree_flatten(model.parameters()):
            is_cut = "_proj" in name and not name.endswith("o_proj.bias")
            assert (array.size == whole[name].size / 2) == is_cut, name


def test_reading_a_part_leaves_nothing_to_compute():
    (model, _) = parts(2)
    read_part(model)
    before = mx.get_active_memory()
    mx.eval(model.parameters())
    assert mx.get_active_memory() == before


@pytest.mark.parametrize("ranks", [3, 4, 64])
def test_heads_are_never_cut(ranks):
    model = tiny_model("llama", bits=None)
    with pytest.raises(ModelError, match="cannot share evenly"):
        shard(model, Rank(0, ranks))


def test_half_a_key_head_is_refused_although_its_numbers_divide():
    with pytest.raises(ModelError) as failed:  # 2 key heads of 16 numbers each, 4 ranks
        shard(tiny_model("llama", bits=None), Rank(0, 4))
    assert "n_kv_heads of model.layers.self_attn: 2" in failed.value.what
    assert failed.value.run == "mlx-qlora infer … --processes 2"


def test_a_group_of_a_quantized_weight_is_never_cut():
    with pytest.raises(ModelError) as failed:  # 64 inputs are one group of 64
        shard(tiny_model("llama", bits=4), Rank(0, 2))
    assert "self_attn.o_proj: 1 groups of 64 inputs" in failed.value.what
    assert "down_proj" not in failed.value.what  # 128 inputs are two


def test_an_architecture_without_sharding_is_refused_and_those_with_are_named():
    model = tiny_model("gemma2", bits=None)
    assert shardings_of(model) == ()
    with pytest.raises(ModelError) as failed:
        shard(model, Rank(0, 2))
    assert "gemma2" in failed.value.what.splitlines()[0]
    assert {"llama", "mistral", "qwen2"} <= set(architectures("tensor"))
    assert "qwen2" in architectures("pipeline")
    assert "llama" not in architectures("pipeline")
    assert ", ".join(architectures("tensor")) in failed.value.what


def test_a_sharding_that_the_architecture_lacks_is_refused_with_one_it_has():
    with pytest.raises(ModelError) as failed:
        shard(tiny_model("llama", bits=None), Rank(0, 2), "pipeline")
    assert failed.value.run == "mlx-qlora infer … --sharding tensor"


def test_in_a_pipeline_each_rank_keeps_some_layers_with_their_updates():
    kept = []
    for number in range(2):
        model = model_of()
        assert shard(model, Rank(number, 2), "pipeline") == "pipeline"
        kept.append({name for name, _ in tree_flatten(model.parameters()) if ".layers." in name})
    assert kept[0].isdisjoint(kept[1])
    assert kept[0] | kept[1] == {n for n, _ in tree_flatten(model_of().parameters()) if ".layers." in n}


def test_more_ranks_than_layers_are_refused():
    with pytest.raises(ModelError, match="2 layers cannot be shared among 3 ranks"):
        shard(tiny_model("qwen2", bits=None), Rank(0, 3), "pipeline")


def test_an_adapter_that_needs_whole_weights_is_refused_with_the_command_that_fuses():
    model = with_lora(tiny_model("qwen2", bits=None), variant="dora", target_modules=("q_proj",)).eval()
    with pytest.raises(AdapterError, match="DoRA") as failed:
        shard(model, Rank(0, 2))
    assert failed.value.run.startswith("mlx-qlora fuse --adapter-path A --output DIR")


def test_an_update_never_follows_a_layer_that_is_cut_in_another_way():
    model = model_of()
    for block in model.layers:
        block.mlp.gate_proj.linear.weight = mx.random.normal((128, 64))
    cut = type(model).shard

    def interleaved(self, group):
        cut(self, group)
        for block in self.layers:
            weight = block.mlp.gate_proj.weight
            block.mlp.gate_proj.weight = weight[::-1]

    type(model).shard = interleaved
    try:
        with pytest.raises(AdapterError, match="cannot follow"):
            shard(model, Rank(0, 2))
    finally:
        type(model).shard = cut


def test_a_format_that_mlx_lm_cannot_cut_is_refused():
    model = tiny_model("llama", bits=None)
    for block in model.layers:
        block.mlp.down_proj = NF4Linear.from_linear(block.mlp.down_proj, group_size=64, mode="nf4")
    with pytest.raises(ModelError, match="nf4") as failed:
        shard(model, Rank(0, 2))
    assert failed.value.run == "mlx-qlora infer … --scheme int4"
