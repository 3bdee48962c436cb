"""A GGUF file becomes a model folder that gives the same logits, trains, and says what it rounded."""

import json
import shutil
import tracemalloc

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import load_model

from mlx_qlora.config import build_config
from mlx_qlora.errors import ModelError, StorageError
from mlx_qlora.weights.gguf import import_gguf, is_imported, open_gguf
from mlx_qlora.weights.gguf_config import config_of
from mlx_qlora.weights.gguf_convert import convert
from mlx_qlora.weights.gguf_file import read_gguf
from mlx_qlora.weights.gguf_model import map_tensors
from mlx_qlora.weights.gguf_tensors import AFFINE
from mlx_qlora.weights.loader import load_base
from mlx_qlora.weights.output_folder import MANIFEST
from mlx_qlora.weights.plan import skeleton
from mlx_qlora.weights.shards import read_checkpoint
from mlx_qlora.weights.source import ModelSource, resolve_model
from tests.gguf_files import (
    BLOCK_TYPES,
    KINDS,
    full_config,
    gguf_tensors,
    random_blocks,
    random_model,
    reference_values,
    write_gguf,
    write_model,
)

TOKENS = mx.array([[1, 5, 270, 300, 17, 262, 261, 3, 290, 264] * 4])


def logits_of(folder):
    model, _ = load_model(folder)
    model.update(
        tree_unflatten(
            [
                (n, a if a.dtype == mx.uint32 else a.astype(mx.float32))
                for n, a in tree_flatten(model.parameters())
            ]
        )
    )
    return np.array(model(TOKENS))


def relative_error(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


def wide_config(**changes):
    """Rows of 256, which K-quants need."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1}
    return full_config("llama", **sizes, **changes)


def write_of_type(path, type_, *, only=lambda _name: True, **changes):
    """A llama with random blocks of that type in every matrix, and the float32 model of the same numbers."""
    config = wide_config(**changes)
    model = random_model(config)
    tensors = gguf_tensors(model, "llama", config)
    blocks = {
        name: random_blocks(array.shape, type_, seed)
        for seed, (name, array) in enumerate(tensors.items())
        if array.ndim > 1 and only(name)
    }
    write_gguf(path, "llama", config, tensors, {n: (raw, type_) for n, raw in blocks.items()}, {})
    return blocks


@pytest.fixture(scope="module")
def llama_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_model(path, "llama")
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_gives_the_logits_of_the_model_it_was_written_from(tmp_path, kind):
    model = write_model(tmp_path / "m.gguf", kind)
    result = import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert relative_error(logits_of(tmp_path / "out"), np.array(model(TOKENS))) < 1e-5
    assert all(tensor.is_exact for tensor in result.tensors)
    assert len(result.tensors) == len(read_checkpoint(tmp_path / "out"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_says_in_config_json_what_its_model_was_built_from(tmp_path, kind):
    write_model(tmp_path / "m.gguf", kind)
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    found, wanted = resolve_model(str(tmp_path / "out")).config, full_config(kind)
    if wanted["model_type"] == "mistral":  # llama.cpp has one name for both
        wanted["model_type"] = "llama"
    scaling, expected = found.pop("rope_scaling", None), wanted.pop("rope_scaling", None)
    assert {key: found[key] for key in wanted if key in found} == {
        k: v for k, v in wanted.items() if k in found
    }
    assert (scaling is None) == (expected is None)
    for key in expected or {}:
        assert scaling["type" if key == "rope_type" else key] == expected[key]


@pytest.mark.parametrize("type_", [t for t in BLOCK_TYPES if t in AFFINE], ids=lambda t: t.name)
def test_affine_formats_stay_packed_and_every_number_stays_what_it_was(tmp_path, type_):
    write_of_type(tmp_path / "m.gguf", type_)
    result = import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert all(tensor.is_exact for tensor in result.tensors)
    bits = AFFINE[type_].bits
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]["bits"] == bits
    packed = mx.load(str(tmp_path / "out" / "model.safetensors"))
    opened = open_gguf(tmp_path / "m.gguf")
    down = [packed[f"model.layers.0.mlp.down_proj.{part}"] for part in ("weight", "scales", "biases")]
    assert down[0].dtype == mx.uint32
    whole = mx.dequantize(down[0], *(part.astype(mx.float32) for part in down[1:]), group_size=32, bits=bits)
    np.testing.assert_array_equal(np.array(whole), opened.tensors["blk.0.ffn_down.weight"])


@pytest.mark.parametrize("type_", [t for t in BLOCK_TYPES if t in AFFINE], ids=lambda t: t.name)
def test_the_packed_import_gives_the_logits_of_the_dequantized_model(tmp_path, type_):
    config = wide_config()
    model = random_model(config)
    tensors = gguf_tensors(model, "llama", config)
    blocks = {n: random_blocks(a.shape, type_, i) for i, (n, a) in enumerate(tensors.items()) if a.ndim > 1}
    write_gguf(tmp_path / "m.gguf", "llama", config, tensors, {n: (r, type_) for n, r in blocks.items()}, {})
    opened = open_gguf(tmp_path / "m.gguf").tensors
    write_gguf(tmp_path / "f32.gguf", "llama", config, {n: opened[n] for n in tensors}, {}, {})
    import_gguf(tmp_path / "m.gguf", tmp_path / "packed")
    import_gguf(tmp_path / "f32.gguf", tmp_path / "dense")
    assert relative_error(logits_of(tmp_path / "packed"), logits_of(tmp_path / "dense")) < 1e-5


@pytest.mark.parametrize("type_", [t for t in BLOCK_TYPES if t not in AFFINE], ids=lambda t: t.name)
def test_other_formats_are_quantized_anew_and_named(tmp_path, type_):
    blocks = write_of_type(tmp_path / "m.gguf", type_)
    result = import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert {t.gguf_name for t in result.tensors if not t.is_exact} == set(blocks)
    assert {t.stored for t in result.tensors if not t.is_exact} == {"affine 8-bit, groups of 32, F16 scales"}
    packed = mx.load(str(tmp_path / "out" / "model.safetensors"))
    down = [packed[f"model.layers.0.mlp.down_proj.{part}"] for part in ("weight", "scales", "biases")]
    wanted = reference_values(blocks["blk.0.ffn_down.weight"], type_)
    expected = mx.quantize(mx.array(wanted.astype(np.float16)), 32, 8)
    assert all(mx.array_equal(found, part) for found, part in zip(down, expected, strict=True))
    scales, biases = (part.astype(mx.float32) for part in expected[1:])
    whole = np.array(mx.dequantize(expected[0], scales, biases, group_size=32, bits=8))
    groups = wanted.reshape(-1, 32)
    steps = np.ptp(groups, axis=-1, keepdims=True) / 255
    rounding = np.abs(groups).max(axis=-1, keepdims=True) / 2048
    # Half a step, half a step more at the far end since MLX keeps zero exact, and float16's own rounding.
    assert (np.abs(whole.reshape(-1, 32) - groups) <= 1.3 * steps + rounding).all()


def test_formats_may_differ_from_tensor_to_tensor(tmp_path):
    config = full_config("llama")
    tensors = gguf_tensors(random_model(config), "llama", config)
    kinds = [Type.Q4_0, Type.Q5_1, Type.Q8_0, Type.F16, Type.BF16]
    matrices = [name for name, array in tensors.items() if array.ndim > 1]
    types = {}
    for index, name in enumerate(matrices):
        type_ = kinds[index % len(kinds)]
        types[name] = (gguf.quantize(tensors[name], type_), type_)
    dense = {n: gguf.dequantize(*types[n]) if n in types else a for n, a in tensors.items()}
    write_gguf(tmp_path / "m.gguf", "llama", config, tensors, types, {})
    write_gguf(tmp_path / "f32.gguf", "llama", config, dense, {}, {})
    import_gguf(tmp_path / "m.gguf", tmp_path / "mixed")
    import_gguf(tmp_path / "f32.gguf", tmp_path / "dense")
    assert relative_error(logits_of(tmp_path / "mixed"), logits_of(tmp_path / "dense")) < 1e-5
    stored = {info.dtype for info in read_checkpoint(tmp_path / "mixed").values()}
    assert stored == {"U32", "F16", "BF16", "F32"}


@pytest.mark.parametrize("kind", ["mixtral", "mixtral-old", "qwen3moe", "phi3", "gemma2", "phi2-fused"])
def test_packed_experts_and_fused_layers_give_the_logits_of_the_dequantized_model(tmp_path, kind):
    config = full_config(kind)
    tensors = gguf_tensors(random_model(config), kind, config)
    types = {
        n: (gguf.quantize(a, Type.Q4_1), Type.Q4_1)
        for n, a in tensors.items()
        if a.ndim > 1 and "gate_inp" not in n
    }
    dense = {n: gguf.dequantize(*types[n]) if n in types else a for n, a in tensors.items()}
    write_gguf(tmp_path / "m.gguf", kind, config, tensors, types, {})
    write_gguf(tmp_path / "f32.gguf", kind, config, dense, {}, {})
    import_gguf(tmp_path / "m.gguf", tmp_path / "packed")
    import_gguf(tmp_path / "f32.gguf", tmp_path / "dense")
    assert relative_error(logits_of(tmp_path / "packed"), logits_of(tmp_path / "dense")) < 1e-5


def test_blocks_of_rows_make_no_difference(tmp_path, monkeypatch):
    write_of_type(tmp_path / "m.gguf", Type.Q5_K)
    import_gguf(tmp_path / "m.gguf", tmp_path / "whole")
    monkeypatch.setattr("mlx_qlora.weights.gguf_convert.BLOCK_BYTES", 5000)
    import_gguf(tmp_path / "m.gguf", tmp_path / "blocks")
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (
        tmp_path / "blocks/model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    "type_", [Type.F32, Type.Q4_K, Type.Q6_K, Type.IQ2_S, Type.Q8_0], ids=lambda t: t.name
)
def test_memory_depends_on_the_block_and_not_on_the_tensor(tmp_path, monkeypatch, type_):
    monkeypatch.setattr("mlx_qlora.weights.gguf_convert.BLOCK_BYTES", 64 * 1024)
    config = wide_config(vocab_size=8192, tie_word_embeddings=True)
    tensors = gguf_tensors(random_model(config), "llama", config)
    embedding = tensors["token_embd.weight"]
    raw = embedding if type_ == Type.F32 else random_blocks(embedding.shape, type_)
    write_gguf(tmp_path / "m.gguf", "llama", config, tensors, {"token_embd.weight": (raw, type_)}, {})
    file = read_gguf(tmp_path / "m.gguf")
    source = ModelSource(tmp_path, "m", None, config_of(file))
    targets = {target.name: target for target in map_tensors(file, skeleton(source), source.config)}
    list(convert(targets["model.layers.0.mlp.up_proj.weight"]))  # tables that are made once
    next(convert(targets["model.embed_tokens.weight"]))
    tracemalloc.start()
    blocks = sum(1 for _ in convert(targets["model.embed_tokens.weight"]))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert blocks == embedding.nbytes // (64 * 1024) == 128
    assert peak_bytes < embedding.nbytes / 4


def test_shards_hold_what_one_file_holds(tmp_path, llama_file):
    import_gguf(llama_file, tmp_path / "one")
    import_gguf(llama_file, tmp_path / "many", shard_bytes=50_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 1
    np.testing.assert_array_equal(logits_of(tmp_path / "one"), logits_of(tmp_path / "many"))


def test_scales_beyond_float16_are_kept_in_float32(tmp_path):
    config = full_config("llama")
    tensors = gguf_tensors(random_model(config), "llama", config)
    raw = gguf.quantize(tensors["blk.0.ffn_down.weight"], Type.Q8_0)
    raw.reshape(-1, 34)[3, :2] = np.array([1000], "<f2").view(np.uint8)
    types = {
        "blk.0.ffn_down.weight": (raw, Type.Q8_0),
        "blk.0.ffn_up.weight": (gguf.quantize(tensors["blk.0.ffn_up.weight"], Type.Q8_0), Type.Q8_0),
    }
    write_gguf(tmp_path / "m.gguf", "llama", config, tensors, types, {})
    first = import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    again = import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert again.tensors == first.tensors
    assert again.bytes == first.bytes
    packed = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert packed["model.layers.0.mlp.up_proj.scales"].dtype == mx.float16
    parts = [packed[f"model.layers.0.mlp.down_proj.{part}"] for part in ("weight", "scales", "biases")]
    assert parts[1].dtype == mx.float32
    whole = mx.dequantize(*parts, group_size=32, bits=8)
    np.testing.assert_array_equal(np.array(whole), gguf.dequantize(raw, Type.Q8_0))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("type_", [Type.Q8_0, Type.Q4_K, Type.Q6_K], ids=lambda t: t.name)
def test_numbers_that_are_not_finite_are_refused_by_the_tensors_name(tmp_path, type_, value):
    config = wide_config()
    tensors = gguf_tensors(random_model(config), "llama", config)
    raw = random_blocks(tensors["blk.0.ffn_up.weight"].shape, type_)
    at = 208 if type_ == Type.Q6_K else 0
    blocks = raw.reshape(-1, gguf.GGML_QUANT_SIZES[type_][1])
    blocks[5, at : at + 2] = np.array([value], "<f2").view(np.uint8)
    write_gguf(tmp_path / "m.gguf", "llama", config, tensors, {"blk.0.ffn_up.weight": (raw, type_)}, {})
    with pytest.raises(ModelError, match=r"blk\.0\.ffn_up\.weight holds numbers that are not finite"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_a_missing_a_left_over_and_a_misshapen_tensor_are_all_named(tmp_path):
    config = full_config("llama")
    tensors = gguf_tensors(random_model(config), "llama", config)
    del tensors["blk.1.ffn_up.weight"]
    tensors["blk.0.attn_sinks.weight"] = np.zeros(4, np.float32)
    tensors["blk.0.ffn_gate.weight"] = np.zeros((64, 32), np.float32)
    tensors["blk.1.ffn_down.weight"] = tensors["blk.1.ffn_down.weight"].T.copy()
    write_gguf(tmp_path / "m.gguf", "llama", config, tensors, {}, {})
    with pytest.raises(ModelError) as caught:
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    message = str(caught.value)
    assert "blk.1.ffn_up.weight is missing" in message
    assert "blk.0.attn_sinks.weight: the architecture has no such tensor" in message
    assert "gate_proj.weight: [64, 32] in the file, [96, 64] in the model" in message
    assert "down_proj.weight: [96, 64] in the file, [64, 96] in the model" in message


def test_experts_whose_axes_are_swapped_are_refused(tmp_path):
    config = full_config("mixtral")
    tensors = gguf_tensors(random_model(config), "mixtral", config)
    tensors["blk.0.ffn_up_exps.weight"] = tensors["blk.0.ffn_up_exps.weight"].swapaxes(0, 1).copy()
    write_gguf(tmp_path / "m.gguf", "mixtral", config, tensors, {}, {})
    with pytest.raises(ModelError, match=r"up_proj.weight: \[96, 4, 64\] in the file, \[4, 96, 64\]"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "metadata", "said"),
    [
        ("llama", {"llama.block_count": 10**6}, "fewer tensors than layers"),
        ("llama", {"llama.embedding_length": 2**30}, "embedding_length is 1073741824"),
        ("llama", {"llama.attention.head_count": 0}, "config.json does not describe|does not fit"),
        ("llama", {"llama.attention.head_count": "four"}, "head_count is four"),
        ("llama", {"llama.attention.layer_norm_rms_epsilon": float("nan")}, "epsilon is nan"),
        ("llama", {"llama.attention.head_count_kv": [2, 4]}, "the same for every layer"),
        ("gemma", {"gemma.rope.scaling.type": "yarn", "gemma.rope.scaling.factor": 4.0}, "gemma cannot"),
        ("qwen3moe", {"qwen3moe.rope.scaling.type": "yarn"}, "qwen3_moe cannot"),
        ("llama", {"llama.rope.dimension_count": 8}, "Only 8 of 16 numbers per head are rotated"),
        ("llama", {"split.count": 3}, "one of 3 parts"),
        ("llama", {"general.architecture": "mamba"}, "'mamba' cannot be imported; these can: llama"),
        ("llama", {"general.architecture": ""}, "does not say its architecture"),
    ],
)
def test_metadata_that_describe_no_model_are_refused(tmp_path, kind, metadata, said):
    path = tmp_path / "m.gguf"
    rewritten = rewrite_metadata(path, kind, metadata)
    with pytest.raises(ModelError, match=said):
        import_gguf(rewritten, tmp_path / "out")


def rewrite_metadata(path, kind, changes):
    """As write_model, with metadata replaced after gguf-py wrote its own."""
    from tests import gguf_files

    real = gguf_files._add

    def added(writer, key, value):
        real(writer, key, changes.get(key, value))

    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(gguf_files, "_add", added)
        arch = changes.get("general.architecture")
        if arch is not None:
            own = gguf_files.KINDS[kind]
            patch.setitem(gguf_files.KINDS, kind, gguf_files.Kind(arch, own.config))
            patch.setattr(
                gguf_files, "gguf_tensors", lambda *_: {"token_embd.weight": np.zeros((320, 64), np.float32)}
            )
        known = {key for key in changes if key.split(".", 1)[1] in _COMMON or key == "general.architecture"}
        write_model(path, kind, metadata={k: v for k, v in changes.items() if k not in known})
    return path


_COMMON = {
    "block_count",
    "embedding_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon",
}


def test_a_vocabulary_without_a_model_is_refused(material, tmp_path):
    with pytest.raises(ModelError, match="holds no model"):
        import_gguf(material / "gguf/vocab-only/ggml-vocab-llama-spm.gguf", tmp_path / "out")


def test_rope_divisors_of_another_kind_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(KINDS["llama3"].extra, "rope_freqs.weight", np.linspace(1, 9, 8, dtype=np.float32))
    write_model(tmp_path / "m.gguf", "llama3")
    with pytest.raises(ModelError, match="not the scaling of Llama 3"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")


def test_an_output_that_holds_something_else_is_not_touched(tmp_path, llama_file):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(StorageError, match="something else"):
        import_gguf(llama_file, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_an_import_that_is_there_is_not_made_again(tmp_path, llama_file):
    import_gguf(llama_file, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    read = []
    import_gguf(llama_file, tmp_path / "out", lambda done, total: read.append((done, total)))
    assert read == []
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before
    (tmp_path / "out" / "model.safetensors").unlink()
    assert not is_imported(tmp_path / "out")


def test_a_failure_half_way_leaves_nothing(tmp_path, llama_file):
    def stop(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_gguf(llama_file, tmp_path / "out", stop)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_import_left_is_swept_away_and_nothing_else(tmp_path, llama_file):
    for name in (".out.99999.tmp", ".out2.99999.tmp", "out2"):
        (tmp_path / name).mkdir()
    import_gguf(llama_file, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out2.99999.tmp", "out", "out2"]


def test_progress_ends_at_all_the_bytes(tmp_path, llama_file):
    told = []
    import_gguf(llama_file, tmp_path / "out", lambda *now: told.append(now))
    opened = open_gguf(llama_file)
    total = sum(array.nbytes for array in opened.tensors.values())
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_open_gguf_gives_any_tensor_by_name(llama_file):
    opened = open_gguf(str(llama_file))
    assert opened.metadata["general.architecture"] == "llama"
    assert opened.metadata["llama.block_count"] == 2
    assert opened.tensors["token_embd.weight"].shape == (320, 64)
    assert opened.tensors["token_embd.weight"].dtype == np.float32
    assert len(opened.tensors) == len(list(opened.tensors)) == 21
    with pytest.raises(KeyError):
        opened.tensors["nothing"]


def test_any_model_argument_may_be_a_gguf_file(tmp_path, llama_file, monkeypatch):
    monkeypatch.setenv("MLX_QLORA_CACHE", str(tmp_path / "cache"))
    source = resolve_model(str(llama_file))
    assert source.name == str(llama_file)
    assert source.folder.parent == tmp_path / "cache"
    assert json.loads((source.folder / MANIFEST).read_text())["source"] == str(llama_file)
    before = (source.folder / "model.safetensors").stat().st_ino
    assert resolve_model(str(llama_file)).folder == source.folder
    assert (source.folder / "model.safetensors").stat().st_ino == before
    (source.folder / "model.safetensors").unlink()
    resolve_model(str(llama_file))
    assert (source.folder / "model.safetensors").is_file()


def test_another_file_under_the_same_name_is_imported_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_QLORA_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "m.gguf"
    write_model(path, "llama", seed=1)
    first = resolve_model(str(path)).folder
    write_model(path, "llama", seed=2)
    assert resolve_model(str(path)).folder != first


def test_a_hub_file_is_named_by_its_repository(tmp_path, llama_file, monkeypatch):
    asked = []

    def download(repository, file, *, revision):
        asked.append((repository, file, revision))
        return str(llama_file)

    monkeypatch.setenv("MLX_QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    source = resolve_model("some/model-GGUF:tiny.gguf", "main")
    assert asked == [("some/model-GGUF", "tiny.gguf", "main")]
    assert source.name == "some/model-GGUF:tiny.gguf"
    assert source.config["model_type"] == "llama"


def test_a_packed_gguf_base_loads_and_an_unquantized_one_is_quantized(tmp_path, monkeypatch, llama_file):
    monkeypatch.setenv("MLX_QLORA_CACHE", str(tmp_path / "cache"))
    packed = shutil.copy(llama_file, tmp_path / "packed.gguf")
    write_of_type(packed, Type.Q4_0)
    config = build_config({"model": {"path": str(packed)}, "quantization": {"scheme": "int8"}})
    base = load_base(config.model, config.quantization)
    assert base.scheme is None
    assert base.model.model.layers[0].mlp.up_proj.bits == 4
    config = build_config(
        {"model": {"path": str(llama_file)}, "quantization": {"scheme": "int8", "group_size": 32}}
    )
    base = load_base(config.model, config.quantization)
    assert base.scheme is not None
    assert base.model.model.layers[0].mlp.up_proj.bits == 8


def test_lora_trains_on_a_gguf_base(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_QLORA_CACHE", str(tmp_path / "cache"))
    write_of_type(tmp_path / "m.gguf", Type.Q4_K)
    run = one_step(tmp_path / "m.gguf", tmp_path)
    assert run.finished.steps == 1
    saved = mx.load(str(tmp_path / "adapter" / "adapters.safetensors"))
    assert any(mx.any(array != 0).item() for name, array in saved.items() if name.endswith("lora_b"))
    kept = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert kept["mlx_qlora"]["model"]["path"] == str(tmp_path / "m.gguf")


def one_step(model, folder):
    from mlx_qlora.training.run import train

    rows = [{"prompt": "the a", "completion": " in the"}] * 4
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = build_config(
        {
            "model": {"path": str(model)},
            "lora": {"rank": 2},
            "data": {"path": str(folder / "data.jsonl"), "max_seq_length": 64},
            "training": {"max_steps": 1, "batch_size": 2, "gradient_accumulation": 1, "warmup_steps": 0},
        }
    )
    return train(config, folder / "adapter")


MATERIAL = ["bf16", "f16", "f32", "q4_0", "q4_1", "q4_k_m", "q5_0", "q6_k", "q8_0"]


@pytest.mark.parametrize("name", [name for name in MATERIAL if name != "f32"])
def test_every_tensor_of_a_real_file_equals_its_reference(material, name):
    folder = material / "gguf" / "stories260k"
    opened = open_gguf(folder / f"stories260K-{name}.gguf").tensors
    with np.load(folder / f"stories260K-{name}.dequant.npz") as reference:
        assert set(reference) == set(opened)
        for tensor in reference:
            np.testing.assert_array_equal(opened[tensor], reference[tensor], strict=True)


@pytest.mark.parametrize("name", MATERIAL)
def test_a_real_file_gives_the_logits_of_its_dequantized_model(material, tmp_path, name):
    folder = material / "gguf" / "stories260k"
    import_gguf(folder / f"stories260K-{name}.gguf", tmp_path / "packed")
    model, _ = load_model(material / "stories260k" / "hf")
    if name != "f32":
        with np.load(folder / f"stories260K-{name}.dequant.npz") as reference:
            model.load_weights(
                [
                    (mlx_name, from_llama_cpp(array, gguf_name))
                    for gguf_name, array in reference.items()
                    for mlx_name in [mlx_name_of(gguf_name)]
                ]
            )
    assert relative_error(logits_of(tmp_path / "packed"), np.array(model(TOKENS))) < 1e-5


def mlx_name_of(gguf_name):
    from tests.gguf_files import NAMES

    names = {value: key for key, value in reversed(NAMES.items()) if "fc" not in key and "dense" not in key}
    stem, _, leaf = gguf_name.rpartition(".")
    if stem.startswith("blk."):
        _, layer, rest = stem.split(".")
        return f"model.layers.{layer}.{names[rest]}.{leaf}"
    return f"{names[stem].replace('final_layernorm', 'norm')}.{leaf}"


def from_llama_cpp(array, name):
    heads = 8 if "attn_q" in name else 4 if "attn_k" in name else None
    if heads:
        pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, -1)
        array = pairs.swapaxes(1, 2).reshape(array.shape)
    return mx.array(array)


def test_lora_trains_on_a_real_gguf_base(material, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_QLORA_CACHE", str(tmp_path / "cache"))
    run = one_step(material / "gguf/stories260k/stories260K-q4_k_m.gguf", tmp_path)
    assert run.finished.steps == 1
