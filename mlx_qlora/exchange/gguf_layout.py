"""mlx-lm's parameters by llama.cpp's names and in its layout: the import's rules, the other way round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np

from mlx_qlora.errors import ModelError
from mlx_qlora.weights.gguf_convert import _head_order
from mlx_qlora.weights.gguf_model import _EXPERTS, _PERMUTED
from mlx_qlora.weights.plan import skeleton
from mlx_qlora.weights.source import ModelSource

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gemma3": "gemma3",
    "phi": "phi2",
    "phi3": "phi3",
}
"""config.json's ``model_type`` → GGUF's architecture."""

_TEXT_PART = "language_model."
_ROUTERS = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")


@dataclass(frozen=True)
class Layout:
    """How the parameters of one model are called and laid out in a GGUF file."""

    architecture: str
    config: dict[str, Any]
    """config.json; of a model with a vision part that of its text model."""
    args: Any
    """mlx-lm's ModelArgs: what the model is built from, with its defaults."""
    names: gguf.TensorNameMap

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        own = getattr(self.args, "head_dim", None)
        return int(own or self.args.hidden_size // self.args.num_attention_heads)

    def name_of(self, parameter: str) -> str:
        """GGUF's name of a parameter.

        Raises:
            ValueError: it has none.
        """
        name = parameter.removeprefix(_TEXT_PART)
        path, _, leaf = name.rpartition(".")
        if ".switch_mlp." in path:
            layer, projection = path.split(".")[2], path.rpartition(".")[2]
            return f"{_EXPERTS[projection].format(layer)}.{leaf}"
        found = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError("GGUF has no name for it")
        return str(found)

    def rows_per_head(self, parameter: str, rows: int) -> int | None:
        """Rows of one head, where llama.cpp wants them interleaved for its rotary embedding.

        Raises:
            ValueError: the rows are no whole number of heads.
        """
        path, _, leaf = parameter.rpartition(".")
        if self.architecture != "llama" or not path.endswith(_PERMUTED) or leaf not in ("weight", "bias"):
            return None
        if getattr(self.args, "rope_traditional", False):
            return None  # the rows lie as llama.cpp wants them already
        is_query = path.endswith("q_proj")
        heads = self.args.num_attention_heads if is_query else self.args.num_key_value_heads
        if rows % (2 * heads):
            raise ValueError(f"{rows} rows are no whole number of {heads} heads")
        return rows // int(heads)

    def added_to(self, parameter: str) -> float:
        """llama.cpp keeps 1 + w for Gemma's norms."""
        is_norm = self.architecture.startswith("gemma") and parameter.endswith("norm.weight")
        return 1.0 if is_norm else 0.0


def interleaved(rows: int, rows_per_head: int) -> np.ndarray:
    """For each row of whole heads in llama.cpp's order, its place in the transformers layout."""
    return np.argsort(_head_order(rows, rows_per_head))


def is_kept_in_float32(gguf_name: str, shape: tuple[int, ...]) -> bool:
    """Norms, biases and the routers of a mixture: llama.cpp takes these in float32 only."""
    return len([size for size in shape if size != 1]) < 2 or gguf_name.endswith(_ROUTERS)


def layout_of(source: ModelSource) -> Layout:
    """The layout of the model that a config.json describes; its weights are not needed.

    Raises:
        ModelError: an architecture that cannot be exported, or a broken configuration.
    """
    kind = str(source.config["model_type"])
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"Models of the type {kind!r} cannot be exported; these can: {', '.join(ARCHITECTURES)}.",
            where=str(source.folder / "config.json"),
            run="python convert_hf_to_gguf.py FOLDER   # llama.cpp's own, for an unquantized model",
        )
    model, config = skeleton(source), source.config
    args: Any = model.args
    if kind == "gemma3":
        config = {**config, **config.get("text_config", {}), "model_type": "gemma3_text"}
        args = model["language_model"].args
    architecture = ARCHITECTURES[kind]
    kinds = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], args.num_hidden_layers)
    return Layout(architecture, config, args, names)
