"""Which layer gets which format, and why one is kept."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_qlora.quantization.policy import decide_all, is_named
from mlx_qlora.quantization.schemes import scheme_named
from tests.tiny import tiny_llama

INT4 = scheme_named("int4")


class Model(nn.Module):
    """Two layers that can be quantized, one too narrow, and one that cannot be."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 64)
        self.wide = nn.Linear(128, 8, bias=True)
        self.narrow = nn.Linear(48, 8)
        self.norm = nn.RMSNorm(64)


class Choosy(Model):
    """It has a say in its own quantization."""

    @staticmethod
    def quant_predicate(path, _module):
        return {"embed": {"group_size": 32, "bits": 8}, "wide": False}.get(path, True)


def test_every_layer_that_can_be_quantized_is_decided_about():
    decisions = decide_all(Model(), INT4)
    assert {path: decision.scheme for path, decision in decisions.items()} == {
        "embed": INT4,
        "wide": INT4,
        "narrow": None,
    }
    assert "48 inputs" in decisions["narrow"].reason
    assert "64" in decisions["narrow"].reason
    assert decisions["wide"].reason is None


def test_a_narrow_layer_is_quantized_when_the_group_divides_it():
    assert decide_all(Model(), scheme_named("nvfp4"))["narrow"].scheme == scheme_named("nvfp4")


def test_the_model_s_own_wishes_are_followed_and_kept_as_it_says_them():
    decisions = decide_all(Choosy(), INT4)
    eight = decisions["embed"]
    assert (eight.scheme.mode, eight.scheme.bits, eight.scheme.group_size) == ("affine", 8, 32)
    assert eight.own == {"group_size": 32, "bits": 8}
    assert decisions["wide"].scheme is None
    assert decisions["wide"].reason == "the architecture keeps it"


def test_the_model_s_wishes_do_not_make_a_layer_fit():
    assert decide_all(Choosy(), INT4)["narrow"].scheme is None


@pytest.mark.parametrize(
    ("skip", "kept"),
    [
        (["lm_head"], {"lm_head"}),
        (["k_proj"], {"model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.k_proj"}),
        (["model.layers.*.mlp.up_proj"], {"model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"}),
        (["layers.1.mlp"], {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}),
        (["proj", "head", "nothing"], set()),
    ],
)
def test_skipped_layers_are_exactly_those_named(skip, kept):
    decisions = decide_all(tiny_llama(bits=None), INT4, skip)
    assert {path for path, decision in decisions.items() if decision.scheme is None} == kept
    assert {decision.reason for decision in decisions.values()} <= {None, "asked to be skipped"}


def test_a_decision_needs_no_weights():
    model = Model()
    model.wide.weight = mx.zeros((1 << 20, 1 << 20), dtype=mx.bfloat16)  # 2 TiB, never evaluated
    assert decide_all(model, INT4)["wide"].scheme == INT4


@pytest.mark.parametrize(
    ("path", "name", "expected"),
    [
        ("model.layers.1.mlp", "model.layers.1.mlp", True),
        ("model.layers.1.mlp", "mlp", True),
        ("model.layers.1.mlp", "layers.1", True),
        ("model.layers.11.mlp", "layers.1", False),
        ("model.layers.1.mlp", "lp", False),
        ("model.layers.1.mlp", "*.1.*", True),
        ("model.layers.1.mlp", "MLP", False),
    ],
)
def test_a_name_is_a_path_an_end_a_part_or_a_pattern(path, name, expected):
    assert is_named(path, name) is expected
