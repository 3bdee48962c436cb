"""scripts/presets_page.py, data/shapes, and benchmarks/seven_billion.py's random models of a shape."""

import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_qlora.config import ModelConfig, QuantizationConfig, build_config
from mlx_qlora.presets import by_size, preset
from mlx_qlora.weights.loader import load_base
from mlx_qlora.weights.plan import skeleton
from mlx_qlora.weights.source import resolve_model
from tests.checkpoints import CONFIGS

ROOT = Path(__file__).parents[2]
SHAPES = sorted(path.parent for path in (ROOT / "data" / "shapes").glob("*/config.json"))
GIB = 1024**3


def loaded(file: Path):
    """A script's module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(file.parent))
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, file.stem, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
    return module


page = loaded(ROOT / "scripts" / "presets_page.py")
benchmark = loaded(ROOT / "benchmarks" / "seven_billion.py")


@pytest.mark.parametrize("folder", SHAPES, ids=lambda path: path.name)
def test_a_shape_has_as_many_parameters_as_its_publisher_counts(folder):
    config = json.loads((folder / "config.json").read_text())
    model = skeleton(resolve_model(str(folder), needs_weights=False))
    assert sum(array.size for _, array in tree_flatten(model.parameters())) == config["_num_parameters"]
    assert "huggingface.co/" in config["_source"]


def test_the_page_has_every_model_under_every_preset_and_runs_that_were_measured():
    text = (ROOT / "docs" / "PRESETS.md").read_text()
    tables = {match["name"]: match.group() for match in page.PLACE.finditer(text)}
    assert tables.keys() == {*by_size(), "measured"}
    for name in by_size():
        rows = re.findall(r"^\| (\S+) \| [\d.]+ [BM] \| [\d.]+ \| (?:yes|\*\*no\*\*) \|", tables[name], re.M)
        assert sorted(rows) == sorted(path.name for path in SHAPES)
    measured = json.loads((ROOT / "docs" / "presets.json").read_text())
    assert len(measured) >= 3
    for by_preset in measured.values():
        for result in by_preset.values():
            assert result["peak_bytes"] < result["limit_bytes"]


def test_operations_of_a_token_are_six_for_each_weight_and_the_rest_is_attention(tmp_path):
    shape = {**CONFIGS["llama-untied"], "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    tree = {"model": {"path": str(tmp_path)}, "data": {"max_seq_length": 10}}
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128  # q and o, k and v, the MLP
    assert page.flops_per_token(build_config(preset("mac-8gb"), tree)) == (
        6 * (layer + 320 * 64) + 8 * 10 * 64
    )


def test_a_preset_is_planned_for_its_mac_and_one_that_does_not_fit_says_what_would():
    small, large = (ROOT / "data" / "shapes" / name for name in ("SmolLM2-135M", "Gemma-2-9B"))
    row = page.planned(small, "mac-8gb")
    assert row.run.plan.fits
    assert row.run.plan.budget.num_bytes == pytest.approx(8 * GIB * 2 / 3, rel=1e-6)
    assert row.tokens_per_hour == pytest.approx(3600 * 0.4 * 2.6e12 / page.flops_per_token(row.run.config))
    assert row.widest == "16 bits"
    none = page.planned(large, "mac-8gb")
    assert not none.run.plan.fits
    assert none.widest == "none fits"
    assert none.note.count("data.max_seq_length=") == 1  # the last, not the steps towards it


def test_what_was_measured_stands_beside_what_was_predicted(tmp_path, monkeypatch):
    result = {
        "steps": 2,
        "limit_bytes": 5 * GIB,
        "predicted_bytes": 2 * GIB,
        "peak_bytes": 2.1 * GIB,
        "seconds": 61.2,
    }
    (tmp_path / "found.json").write_text(json.dumps({"M": {"mac-8gb": result}}))
    monkeypatch.setattr(page, "MEASURED", tmp_path / "found.json")
    assert "| M | mac-8gb | 2 | 5.00 | 2.00 | 2.10 | +5.0% | 61 |" in page.measured_table()


@pytest.mark.parametrize("architecture", ["llama-tied", "llama-untied", "qwen2", "gemma2"])
def test_a_random_model_of_a_shape_is_whole_quantized_and_gives_finite_logits(architecture, tmp_path):
    shape = tmp_path / "shape"
    shape.mkdir()
    (shape / "config.json").write_text(json.dumps(CONFIGS[architecture]))
    benchmark.write_model(tmp_path / "model", shape)
    base = load_base(ModelConfig(path=str(tmp_path / "model")), QuantizationConfig())
    assert base.source.is_quantized
    whole = skeleton(resolve_model(str(shape), needs_weights=False))
    assert base.num_parameters == sum(array.size for _, array in tree_flatten(whole.parameters()))
    logits = base.model(mx.array([[1, 2, 3]])).astype(mx.float32)
    assert math.isfinite(logits.sum().item())
    assert logits.std().item() > 0
