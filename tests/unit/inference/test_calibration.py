"""inference/calibration.py: bits where the answers need them."""

import json

import mlx.core as mx
import pytest

from mlx_qlora.config import DataConfig, ModelConfig, QuantizationConfig
from mlx_qlora.errors import ConfigError, ModelError
from mlx_qlora.inference.calibration import settle_by_answers
from mlx_qlora.quantization.policy import recipe_of
from mlx_qlora.weights.source import resolve_model
from mlx_qlora.weights.stream import quantize_checkpoint
from mlx_qlora.weights.target import settle
from tests.checkpoints import make_checkpoint, raw, save_sharded, tensors_of

TARGET = QuantizationConfig(bits_per_weight=5.0)


@pytest.fixture(scope="module")
def folder(tiny_llama_folder, tmp_path_factory):
    """A model whose second block is all but silent: its weights are as large, its answers matter little."""
    path = make_checkpoint(tmp_path_factory.mktemp("uneven") / "m", "llama-tied", tiny_llama_folder)
    tensors = tensors_of(path)
    for name in list(tensors):
        if ".layers.1." in name and "layernorm" in name:
            tensors[name] = tensors[name] * 1e-3
    save_sharded(path, tensors, 1)
    return path


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"o clube venceu a partida {n}"}) + "\n" for n in range(8)))
    return DataConfig(path=str(file), max_seq_length=64, valid_fraction=0.0)


def bits_by_block(settled):
    found = {0: [], 1: []}
    for path, option in settled.chosen.items():
        if ".layers." in path:
            found[int(path.split(".layers.")[1][0])].append(option.scheme.bits)
    return {block: sum(bits) / len(bits) for block, bits in found.items()}


def test_a_block_that_the_answers_do_not_need_gets_fewer_bits_than_by_its_weights(folder, data):
    by_weights = settle(resolve_model(str(folder)), TARGET)
    by_answers = settle_by_answers(ModelConfig(path=str(folder)), TARGET, data, max_rows=4)
    assert abs(bits_by_block(by_weights)[0] - bits_by_block(by_weights)[1]) < 1
    assert bits_by_block(by_answers)[0] > bits_by_block(by_answers)[1] + 1
    assert by_answers.bits_per_weight <= 5.0


def test_what_was_settled_can_be_written_and_names_its_layers(folder, data, tmp_path):
    settled = settle_by_answers(ModelConfig(path=str(folder)), TARGET, data, max_rows=2)
    assert settled.config.bits_per_weight is None
    result = quantize_checkpoint(resolve_model(str(folder)), tmp_path / "out", recipe_of(settled.config))
    assert result.bits_per_weight == settled.bits_per_weight


def test_calibration_changes_no_file_and_repeats(folder, data):
    before = {name: raw(array) for name, array in tensors_of(folder).items()}
    first, again = (settle_by_answers(ModelConfig(path=str(folder)), TARGET, data, max_rows=2) for _ in "12")
    assert first.config == again.config
    assert {name: raw(array) for name, array in tensors_of(folder).items()} == before
    assert mx.get_active_memory() < 64 * 2**20


def test_without_a_target_or_with_a_quantized_model_there_is_nothing_to_settle(folder, data, tmp_path):
    import mlx_qlora as mq

    with pytest.raises(ConfigError, match="bits per weight"):
        settle_by_answers(ModelConfig(path=str(folder)), QuantizationConfig(), data)
    mq.quantize(str(folder), tmp_path / "int8", "int8")
    with pytest.raises(ModelError, match="quantized already"):
        settle_by_answers(ModelConfig(path=str(tmp_path / "int8")), TARGET, data)
