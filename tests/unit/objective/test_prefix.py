"""objective/prefix.py: frozen layers are left out, and neither the loss nor any gradient notices."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_qlora.config import TrainingConfig
from mlx_qlora.dataset.batches import Batch, Layout, collated
from mlx_qlora.dataset.records import Example
from mlx_qlora.objective.loss import objective_for
from mlx_qlora.objective.prefix import FrozenPrefix, NoPrefix, StoredPrefix, frozen_prefix
from mlx_qlora.training.optimizer import build_optimizer
from mlx_qlora.training.recompute import recomputed
from mlx_qlora.training.step import TrainStep
from tests import tiny
from tests.tiny import VOCAB, target_modules, tiny_llama, with_lora

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "cohere")
LENGTHS = (9, 40, 23, 31)


def half_adapted(name: str, monkeypatch, *, dropout: float = 0.0, num_layers: int = 2) -> nn.Module:
    """Four layers of an architecture, the last of them with adapters."""
    monkeypatch.setitem(tiny._SIZES, "num_hidden_layers", 4)
    shape = dict(tiny.ARCHITECTURES[name])
    if "layer_types" in shape:
        shape["layer_types"] = [*shape["layer_types"], *shape["layer_types"]]
    monkeypatch.setitem(tiny.ARCHITECTURES, name, shape)
    model = tiny.tiny_model(name)
    return with_lora(model, dropout=dropout, target_modules=target_modules(name), num_layers=num_layers)


def examples() -> list[Example]:
    rng = np.random.default_rng(7)
    rows = [rng.integers(1, VOCAB, length).astype(np.int32) for length in LENGTHS]
    return [Example(row, np.arange(len(row)) > 2, f"made:{i}") for i, row in enumerate(rows)]


def batches(name: str) -> list[Batch]:
    """The same examples side by side, end to end, and packed by two."""
    made, numbers = examples(), [[3], [0], [2], [1]]
    rows = [[made[n] for n in row] for row in numbers]
    side_by_side = collated(rows, Layout(), numbers)
    end_to_end = collated(rows, Layout(may_concatenate=True, linear_cost=1e9), numbers)
    packed = collated([rows[0] + rows[1], rows[2] + rows[3]], Layout(), [[3, 0], [2, 1]])
    # gemma2's own attention takes a mask of one row for a mask of heads.
    return [side_by_side, end_to_end] if name == "gemma2" else [side_by_side, end_to_end, packed]


class Kept:
    """Hidden states of each example, computed by itself and kept in memory as `dtype`."""

    def __init__(self, prefix: FrozenPrefix, dtype: mx.Dtype = mx.float32) -> None:
        self.dtype = dtype
        self.rows = [prefix.hidden(mx.array(example.tokens[None, :-1]))[0] for example in examples()]
        self.dtype_computed = self.rows[0].dtype

    def gathered(self, batch: Batch) -> mx.array:
        width, rows = batch.inputs_BT.shape[1], []
        for numbers in batch.examples:
            row = mx.concatenate([self.rows[number] for number in numbers])
            rows.append(mx.concatenate([row, mx.repeat(row[:1], width - len(row), axis=0)]))
        return mx.stack(rows).astype(self.dtype)


def loss_and_gradients(objective, batch, *, checkpointing=False, compiled=False):
    """Of one micro-batch, by the step that trains."""
    config = TrainingConfig(compile=compiled)
    with recomputed(list(objective.model.layers), enabled=checkpointing):
        step = TrainStep(objective, build_optimizer(config), config)
        nll, grad = step._nll_and_grad(objective.prepared(batch), step._dropout_keys(1, 0))
        mx.eval(nll, grad)
    return nll.item(), dict(tree_flatten(grad))


def with_prefix(objective, dtype: mx.Dtype = mx.float32):
    """The same objective, its hidden states kept in memory as `dtype`."""
    prefix = frozen_prefix(objective.model)
    assert isinstance(prefix, FrozenPrefix)
    assert objective.model.training
    kept = Kept(prefix, dtype)
    return replace(objective, prefix=StoredPrefix(prefix, kept.dtype_computed, kept.gathered))


def difference(one: dict[str, mx.array], other: dict[str, mx.array]) -> float:
    """The largest difference of any gradient, in units of that gradient's largest element."""
    assert one.keys() == other.keys()
    return max((mx.abs(one[k] - other[k]).max() / mx.abs(one[k]).max()).item() for k in one)


EVERY_WAY = [
    {"dropout": dropout, "checkpointing": checkpointing, "compiled": compiled}
    for dropout in (0.0, 0.4)
    for checkpointing in (False, True)
    for compiled in (False, True)
]
CASES = [("llama", way) for way in EVERY_WAY]
CASES += [(name, way) for name in ARCHITECTURES[1:] for way in (EVERY_WAY[0], EVERY_WAY[-1])]


@pytest.mark.parametrize(
    ("name", "way"), CASES, ids=[f"{name}-{'-'.join(k for k in way if way[k])}" for name, way in CASES]
)
def test_loss_and_every_gradient_are_those_of_the_whole_model(name, way, monkeypatch):
    model = half_adapted(name, monkeypatch, dropout=way["dropout"])
    settings = {key: way[key] for key in ("checkpointing", "compiled")}
    whole = objective_for(model)
    cut = with_prefix(whole)
    for batch in batches(name):
        nll, gradients = loss_and_gradients(whole, batch, **settings)
        cut_nll, cut_gradients = loss_and_gradients(cut, batch, **settings)
        assert cut_nll == pytest.approx(nll, rel=1e-6)
        assert all(mx.abs(gradient).max().item() > 0 for gradient in gradients.values())
        assert difference(gradients, cut_gradients) <= 1e-5


def test_the_frozen_layers_are_not_run(monkeypatch):
    model = half_adapted("llama", monkeypatch)
    cut, batch = with_prefix(objective_for(model)), batches("llama")[0]
    nll = cut.nll(cut.prepared(batch)).item()
    for layer in model.layers[:2]:
        layer.self_attn.q_proj.scales = mx.full(layer.self_attn.q_proj.scales.shape, mx.nan)
    assert cut.nll(cut.prepared(batch)).item() == nll
    whole = replace(cut, prefix=None)
    assert np.isnan(whole.nll(whole.prepared(batch)).item())


def test_a_batch_whose_examples_have_no_number_is_computed_whole(monkeypatch):
    model = half_adapted("llama", monkeypatch)
    whole, batch = objective_for(model), replace(batches("llama")[0], examples=())
    cut = with_prefix(whole)
    assert cut.prepared(batch).hidden_BTD.size == 0
    assert cut.nll(cut.prepared(batch)).item() == whole.nll(whole.prepared(batch)).item()


def test_hidden_states_of_an_example_are_the_same_alone_and_among_others(monkeypatch):
    model = half_adapted("mistral", monkeypatch)
    prefix = frozen_prefix(model)
    rows = examples()
    together = collated([[row] for row in rows], Layout())
    hidden = prefix.hidden(mx.array(together.inputs_BT))
    for row, example in enumerate(rows):
        alone = prefix.hidden(mx.array(example.tokens[None, :-1]))[0]
        assert mx.allclose(hidden[row, : len(alone)], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rounding_float32_to_bfloat16_moves_loss_and_gradients_by_little(name, monkeypatch):
    whole = objective_for(half_adapted(name, monkeypatch))
    cut, batch = with_prefix(whole, mx.bfloat16), batches(name)[0]
    nll, gradients = loss_and_gradients(whole, batch)
    cut_nll, cut_gradients = loss_and_gradients(cut, batch)
    assert cut_nll == pytest.approx(nll, rel=1e-3)
    assert 0 < difference(gradients, cut_gradients) < 2e-2


def test_bfloat16_activations_are_kept_exactly(monkeypatch):
    model = half_adapted("llama", monkeypatch)
    model.set_dtype(mx.bfloat16, lambda dtype: dtype == mx.float32)
    whole, (batch, *_) = objective_for(model), batches("llama")
    prefix = frozen_prefix(model)
    hidden = prefix.hidden(mx.array(batch.inputs_BT))
    assert hidden.dtype == mx.bfloat16
    cut = replace(whole, prefix=StoredPrefix(prefix, hidden.dtype, lambda _: hidden))
    nll, gradients = loss_and_gradients(whole, batch)
    cut_nll, cut_gradients = loss_and_gradients(cut, batch)
    assert cut_nll == nll
    assert all(mx.array_equal(gradients[name], cut_gradients[name]) for name in gradients)


def test_hidden_states_enter_in_the_type_of_the_activations(monkeypatch):
    cut = with_prefix(objective_for(half_adapted("llama", monkeypatch)), mx.bfloat16)
    batch, seen = batches("llama")[0], []
    layer = cut.model.layers[2]
    norm = layer.input_layernorm
    layer.input_layernorm = lambda x: seen.append(x.dtype) or norm(x)
    cut.nll(cut.prepared(batch))
    assert seen == [mx.float32]


def test_layers_get_their_class_back_even_after_an_error(monkeypatch):
    model = half_adapted("llama", monkeypatch)
    prefix, classes = frozen_prefix(model), [type(layer) for layer in model.layers]
    context = prefix.given(mx.zeros((1, 1, 64)))
    context.__enter__()
    assert [type(layer) for layer in model.layers] != classes
    with pytest.raises(RuntimeError):
        context.gen.throw(RuntimeError())
    assert [type(layer) for layer in model.layers] == classes
    assert not any("passing" in vars(layer) for layer in model.layers)


def test_where_every_layer_is_adapted_there_is_nothing_to_keep(monkeypatch):
    reason = frozen_prefix(half_adapted("llama", monkeypatch, num_layers=-1))
    assert isinstance(reason, NoPrefix)
    assert "nothing to cache" in reason.reason


def test_a_head_alone_leaves_all_layers_frozen():
    model = with_lora(tiny_llama(), target_modules=("lm_head",))
    assert frozen_prefix(model).num_layers == 2


def test_weights_trained_below_the_layers_are_noticed():
    model = with_lora(tiny_llama(), target_modules=("q_proj",), num_layers=1)
    model.model.embed_tokens.unfreeze(keys=["scales"])
    assert isinstance(frozen_prefix(model), NoPrefix)


class _Residual(nn.Module):
    """Adds what entered the first layer to what leaves the last: a way past the frozen layers."""

    def __init__(self, layers: list[nn.Module], *, skip: bool, pair: bool) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(VOCAB, 64), layers
        self.skip, self.pair = skip, pair

    def __call__(self, tokens, cache=None):  # noqa: ARG002
        kept = None
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
            x, _ = x if self.pair else (x, None)
            kept = x if kept is None else kept
        return self.embed.as_linear(x + kept if self.skip else x)


class _Layer(nn.Module):
    def __init__(self, *, pair: bool) -> None:
        super().__init__()
        self.q_proj, self.pair = nn.Linear(64, 64), pair
        self.num_calls = 0

    def __call__(self, x):
        self.num_calls += 1
        y = x + mx.tanh(self.q_proj(x))
        return (y, None) if self.pair else y


@pytest.mark.parametrize(
    ("settings", "is_taken"),
    [
        ({"skip": False, "pair": False}, True),
        ({"skip": True, "pair": False}, False),
        ({"skip": False, "pair": True}, False),
    ],
)
def test_an_architecture_that_cannot_be_cut_is_found_out_by_trying(settings, is_taken):
    layers = [_Layer(pair=settings["pair"]) for _ in range(4)]
    model = with_lora(_Residual(layers, **settings), target_modules=("q_proj",), num_layers=2)
    found = frozen_prefix(model)
    assert isinstance(found, FrozenPrefix) == is_taken
    if not is_taken:
        assert "cannot be cut apart" in found.reason
    assert all(type(layer) is _Layer for layer in model.layers)


def test_frozen_layers_that_draw_at_random_are_not_cached():
    layers = [_Layer(pair=False) for _ in range(4)]
    layers[0].q_proj = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.2))
    model = with_lora(_Residual(layers, skip=False, pair=False), target_modules=("q_proj",), num_layers=2)
    assert isinstance(frozen_prefix(model), NoPrefix)
    assert model.training


def test_no_layer_is_called_for_nothing():
    layers = [_Layer(pair=False) for _ in range(4)]
    model = with_lora(_Residual(layers, skip=False, pair=False), target_modules=("q_proj",), num_layers=2)
    prefix = frozen_prefix(model)

    def calls() -> list[int]:
        return [layer.num_calls for layer in layers]

    before = np.array(calls())
    hidden = prefix.hidden(mx.array([[1, 2, 3]]))
    assert (calls() - before).tolist() == [1, 1, 0, 0]
    with prefix.given(hidden):
        model(mx.array([[1, 2, 3]]))
    assert (calls() - before).tolist() == [1, 1, 1, 1]
