"""transformers and bitsandbytes as oracles: we read what they write, and they read what we write."""

import copy
import json
import warnings

import mlx.core as mx
import numpy as np
import pytest

from mlx_qlora.config import ModelConfig, QuantizationConfig
from mlx_qlora.quantization.schemes import scheme_named
from mlx_qlora.weights.bitsandbytes_export import export_bitsandbytes
from mlx_qlora.weights.loader import load_base
from mlx_qlora.weights.source import resolve_model
from mlx_qlora.weights.stream import quantize_checkpoint
from tests.conftest import save_tokenizer

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
bnb = pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")

TOKENS = [[3, 5, 7, 11, 13]]
SETTINGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "fp4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module", autouse=True)
def quietly():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both complain of devices they would rather have
        yield


def unquantized(folder, width=128, inner=192):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def written_by_transformers(folder, name, **sizes):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        unquantized(folder / "dense", **sizes),
        quantization_config=transformers.BitsAndBytesConfig(**SETTINGS[name]),
        dtype=torch.bfloat16,
        device_map="cpu",
    )
    model.save_pretrained(folder / name)
    save_tokenizer(folder / name)
    return folder / name


def read_by_transformers(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")


def float_weights(model):
    """Every weight in float32, by the definition of the formats.

    bitsandbytes' own CPU kernels compute in bfloat16 where they can, and can unpack wrongly where a block
    spans rows.
    """
    weights = {}
    modules = dict(model.named_modules())
    for name, tensor in model.state_dict().items():
        path, _, leaf = name.rpartition(".")
        layer = modules.get(path)
        if leaf == "weight" and isinstance(layer, bnb.nn.Linear4bit):
            state = copy.copy(layer.weight.quant_state)
            absmax = state.absmax
            if state.nested:
                absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
            packed = layer.weight.data.reshape(-1).long()
            values = state.code[torch.stack([packed >> 4, packed & 15], 1).reshape(-1)]
            scales = absmax.repeat_interleave(state.blocksize)[: values.numel()]
            weights[name] = (values * scales).reshape(state.shape)
        elif leaf == "weight" and isinstance(layer, bnb.nn.Linear8bitLt):
            weights[name] = layer.weight.CB.float() * (layer.weight.SCB.float() / 127)[:, None]
        elif leaf in ("weight", "bias"):
            weights[name] = tensor.float()
    return weights


def logits_of(model):
    settings = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).float()
    plain.load_state_dict(float_weights(model))
    with torch.no_grad():
        return plain(torch.tensor(TOKENS)).logits.numpy()


def relative_error(ours, theirs):
    return np.abs(np.array(ours) - theirs).max() / np.abs(theirs).max()


def load(folder):
    return load_base(ModelConfig(path=str(folder), dtype="float32"), QuantizationConfig())


@pytest.mark.parametrize("name", SETTINGS)
def test_a_checkpoint_of_theirs_gives_their_logits(name, tmp_path):
    folder = written_by_transformers(tmp_path, name)
    base = load(folder)
    layer = base.model.layers[0].mlp.up_proj
    assert layer.mode == ("affine" if name == "int8" else name)
    assert layer.group_size == (128 if name == "int8" else 64)
    assert relative_error(base.model(mx.array(TOKENS)), logits_of(read_by_transformers(folder))) < 2e-6


@pytest.mark.parametrize("name", ["nf4", "nf4-dq"])
def test_blocks_that_span_rows_are_read_right(name, tmp_path):
    folder = written_by_transformers(tmp_path, name, width=96, inner=200)
    base = load(folder)
    assert base.model.layers[0].mlp.down_proj.group_size == 8
    assert relative_error(base.model(mx.array(TOKENS)), logits_of(read_by_transformers(folder))) < 2e-6


@pytest.mark.parametrize("scheme", ["nf4", "nf4-dq"])
def test_they_read_what_we_write_to_the_bit(scheme, tmp_path):
    source = resolve_model(str(unquantized(tmp_path / "dense")))
    quantize_checkpoint(source, tmp_path / "ours", scheme_named(scheme))
    export_bitsandbytes(resolve_model(str(tmp_path / "ours")), tmp_path / "theirs")
    model = read_by_transformers(tmp_path / "theirs")
    base = load(tmp_path / "theirs")
    for index in range(2):
        theirs, ours = model.model.layers[index].mlp.up_proj, base.model.layers[index].mlp.up_proj
        assert isinstance(theirs, bnb.nn.Linear4bit)
        state = theirs.weight.quant_state
        assert bytes(theirs.weight.data.numpy()) == bytes(np.array(ours.weight))
        assert np.array_equal(state.absmax.numpy(), np.array(ours.absmax).reshape(-1))
        if scheme == "nf4-dq":
            assert state.offset.item() == ours.offset.item()
            assert np.array_equal(state.state2.absmax.numpy(), np.array(ours.nested_absmax))
    assert relative_error(base.model(mx.array(TOKENS)), logits_of(model)) < 2e-6
    with torch.no_grad():  # their own kernels, in bfloat16
        own = model(torch.tensor(TOKENS)).logits.float().numpy()
    assert relative_error(base.model(mx.array(TOKENS)), own) < 0.05


@pytest.mark.parametrize("scheme", ["nf4", "nf4-dq"])
def test_the_same_weights_are_quantized_to_the_same_file(scheme, tmp_path):
    """Ours from the 16-bit checkpoint, and theirs: equal tensors under equal names."""
    from tests.checkpoints import raw, tensors_of

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several sum the mean in another order
    try:
        theirs = tensors_of(written_by_transformers(tmp_path, scheme))
    finally:
        torch.set_num_threads(threads)
    quantize_checkpoint(resolve_model(str(tmp_path / "dense")), tmp_path / "ours", scheme_named(scheme))
    export_bitsandbytes(resolve_model(str(tmp_path / "ours")), tmp_path / "export")
    ours = tensors_of(tmp_path / "export")
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        if "quant_state" in name:
            assert json.loads(bytes(np.array(array))) == json.loads(bytes(np.array(theirs[name])))
        elif name not in ("lm_head.weight", "model.embed_tokens.weight"):  # ours were in NF4 meanwhile
            assert (array.shape, raw(array)) == (theirs[name].shape, raw(theirs[name])), name
