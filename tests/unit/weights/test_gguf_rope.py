"""A GGUF file holds Llama 3's divisors only; the settings they were computed from are found again."""

import numpy as np
import pytest

from mlx_qlora.errors import ModelError
from mlx_qlora.weights.gguf_file import read_gguf
from mlx_qlora.weights.gguf_metadata import Metadata
from mlx_qlora.weights.gguf_rope import rope_scaling
from tests.gguf_files import KINDS, LLAMA3, full_config, llama3_divisors, write_model


def scaling_of(path, monkeypatch, divisors, **changes):
    monkeypatch.setitem(KINDS["llama3"].extra, "rope_freqs.weight", divisors.astype(np.float32))
    config = full_config("llama3", num_hidden_layers=1, **changes)
    write_model(path, "llama3", config=config)
    return rope_scaling(Metadata(read_gguf(path)), config)


@pytest.mark.parametrize("original", [1024, 4096, 8192, 131072])
@pytest.mark.parametrize("factor", [2.0, 8.0, 32.0])
@pytest.mark.parametrize(("head_dim", "base"), [(64, 500000.0), (128, 500000.0), (128, 10000.0)])
def test_the_settings_of_llama_3_are_found_again(tmp_path, monkeypatch, head_dim, base, factor, original):
    scaling = {**LLAMA3, "factor": factor, "original_max_position_embeddings": original}
    divisors = llama3_divisors(head_dim, base, scaling)
    found = scaling_of(tmp_path / "m.gguf", monkeypatch, divisors, head_dim=head_dim, rope_theta=base)
    if np.allclose(divisors, 1):  # no wavelength is long enough to be scaled
        assert found is None
    else:
        np.testing.assert_allclose(llama3_divisors(head_dim, base, found), divisors, rtol=1e-4)
        assert found["factor"] == pytest.approx(factor, rel=1e-3)


def test_divisors_of_one_are_no_scaling(tmp_path, monkeypatch):
    assert scaling_of(tmp_path / "m.gguf", monkeypatch, np.ones(8)) is None


@pytest.mark.parametrize("divisors", [np.linspace(1, 9, 8), np.ones(7) * 2, np.zeros(8), np.full(8, np.nan)])
def test_other_divisors_are_refused(tmp_path, monkeypatch, divisors):
    with pytest.raises(ModelError, match="not the scaling of Llama 3"):
        scaling_of(tmp_path / "m.gguf", monkeypatch, divisors)
