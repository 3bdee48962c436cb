"""bitsandbytes settings as transformers' BitsAndBytesConfig writes them.

Source: transformers, ``BitsAndBytesConfig``; Dettmers et al. 2022, arXiv:2208.07339 (LLM.int8), and 2023,
arXiv:2305.14314 (NF4, double quantization).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_qlora.config import QuantizationConfig
from mlx_qlora.quantization.translation import Translation, dtype_named, refuse, skipped_names, unknown_key

_DEFAULTS: dict[str, Any] = {
    "load_in_4bit": False,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_compute_dtype": "float32",
    "bnb_4bit_use_double_quant": False,
    "bnb_4bit_quant_storage": "uint8",
    "llm_int8_threshold": 6.0,
    "llm_int8_skip_modules": None,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
}
"""Setting → the value BitsAndBytesConfig gives it, and writes out, when nothing is said."""

_PLACEMENT = {
    "device_map": "the CPU and the GPU share one memory here; the whole model is in it",
    "max_memory": "the CPU and the GPU share one memory here; mlx-qlora plan says what fits",
    "offload_folder": "weights are read from their own files, and nothing is moved out to another folder",
    "offload_state_dict": "weights are read one tensor at a time; nothing is moved out",
    "low_cpu_mem_usage": "weights are always read one tensor at a time",
}
"""Arguments of ``from_pretrained`` that stand beside the settings, and what happens instead."""

BITSANDBYTES_KEYS = (*_DEFAULTS, *_PLACEMENT, "torch_dtype", "dtype", "quant_method")
_BOOLEANS = tuple(key for key, value in _DEFAULTS.items() if isinstance(value, bool))
_STORAGES = ("uint8", "int8", "bfloat16", "float16", "float32", "float64")


def from_bitsandbytes(settings: Mapping[str, Any], *, is_dump: bool) -> Translation:
    """What BitsAndBytesConfig's settings mean here.

    Four bits become NF4 in blocks of 64, eight become affine integers in groups of 64. As in transformers,
    embeddings are left alone, and the output head too unless `llm_int8_skip_modules` says otherwise.

    Args:
        settings: Keys of BitsAndBytesConfig, and those of ``from_pretrained`` that go with it.
        is_dump: They come from an object, defaults written out. Its ``fp4`` may be the default that nobody
            chose, and becomes nf4 with a note; in settings written by hand it is refused.

    Raises:
        ConfigError: unknown settings, wrong values, FP4; all are listed.
    """
    settings = {key: value for key, value in settings.items() if not str(key).startswith("_")}
    near = (*BITSANDBYTES_KEYS, *QuantizationConfig.model_fields)
    problems = [unknown_key(str(key), near) for key in settings if key not in BITSANDBYTES_KEYS]
    said = {k: v for k, v in settings.items() if not (is_dump and v == _DEFAULTS.get(k)) and v is not None}
    problems += _wrong_values(said)
    refuse(problems)
    notes = [f"{key}={said[key]!r}: {instead}" for key, instead in _PLACEMENT.items() if key in said]
    dtype = _dtype(said, notes)
    if not (said.get("load_in_4bit") or said.get("load_in_8bit")):
        if is_dump or any(key in _DEFAULTS for key in said):
            notes.append("neither load_in_4bit nor load_in_8bit is set: the model stays as it is")
        return Translation(QuantizationConfig(scheme="none"), tuple(notes), dtype)
    notes += _of_four_bits(said) if said.get("load_in_4bit") else _of_eight_bits(said)
    skip = skipped_names(said.get("llm_int8_skip_modules"))
    kept = "embeddings and the output head stay" if skip is None else "embeddings stay"
    notes.append(f"{kept} in 16 bits, as in transformers; a scheme by its name quantizes them too")
    config = QuantizationConfig(
        scheme=_scheme(said), skip_modules=skip or (), keep_lm_head=skip is None, keep_embeddings=True
    )
    return Translation(config, tuple(notes), dtype)


def _scheme(said: Mapping[str, Any]) -> str:
    if said.get("load_in_8bit"):
        return "int8"
    return "nf4-dq" if said.get("bnb_4bit_use_double_quant") else "nf4"


def _of_four_bits(said: Mapping[str, Any]) -> list[str]:
    notes = []
    if "bnb_4bit_quant_type" not in said:
        notes.append("bnb_4bit_quant_type is fp4, or not said: nf4 is taken; as many bytes, less error")
    if "bnb_4bit_quant_storage" in said:
        notes.append(
            "bnb_4bit_quant_storage: codes are packed the same way whatever their container is called"
        )
    eights = [key for key in said if key.startswith("llm_int8_") and key != "llm_int8_skip_modules"]
    if eights:
        notes.append(f"{', '.join(eights)}: nothing in 4 bits; there is no integer product, and no offload")
    return notes


def _of_eight_bits(said: Mapping[str, Any]) -> list[str]:
    threshold = said.get("llm_int8_threshold", _DEFAULTS["llm_int8_threshold"])
    notes = [
        f"llm_int8_threshold={threshold:g}: MLX has no integer product; activations keep their type, no "
        "outlier columns are taken out, and int8 in groups of 64 is closer to the float result than LLM.int8"
    ]
    if said.get("llm_int8_enable_fp32_cpu_offload"):
        notes.append("llm_int8_enable_fp32_cpu_offload: nothing is moved; CPU and GPU share one memory")
    if said.get("llm_int8_has_fp16_weight"):
        notes.append("llm_int8_has_fp16_weight: no 16-bit copy is kept; the base is frozen")
    fours = [key for key in said if key.startswith("bnb_4bit_") and key != "bnb_4bit_compute_dtype"]
    return [*notes, f"{', '.join(fours)}: nothing in 8 bits"] if fours else notes


def _dtype(said: Mapping[str, Any], notes: list[str]) -> str | None:
    """One type serves matrix products and what is not quantized; the one of the products decides."""
    asked = {k: dtype_named(said.get(k)) for k in ("bnb_4bit_compute_dtype", "torch_dtype", "dtype")}
    if not said.get("load_in_4bit"):
        asked.pop("bnb_4bit_compute_dtype")
    names = list(dict.fromkeys(name for name in asked.values() if name is not None))
    if len(names) > 1:
        notes.append(
            f"{' and '.join(names)} are asked for: products and what is not quantized are in {names[0]}"
        )
    return names[0] if names else None


def _wrong_values(said: Mapping[str, Any]) -> list[str]:
    problems = [
        f"{k}: True or False, not {said[k]!r}" for k in _BOOLEANS if type(said.get(k, True)) is not bool
    ]
    if said.get("load_in_4bit") is True and said.get("load_in_8bit") is True:
        problems.append("load_in_4bit and load_in_8bit: one of them (4 bits: nf4; 8 bits: int8)")
    kind = said.get("bnb_4bit_quant_type", "nf4")
    if kind == "fp4":
        problems.append("bnb_4bit_quant_type: there is no fp4; nf4 is the nearest: as many bytes, less error")
    elif kind != "nf4":
        problems.append(f"bnb_4bit_quant_type: nf4, not {kind!r}")
    threshold = said.get("llm_int8_threshold", 0.0)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not threshold >= 0:
        problems.append(f"llm_int8_threshold: a number that is not negative, not {threshold!r}")
    storage = str(said.get("bnb_4bit_quant_storage", "uint8")).removeprefix("torch.")
    if storage not in _STORAGES:
        problems.append(f"bnb_4bit_quant_storage: {', '.join(_STORAGES)}, not {storage}")
    for key, read in (
        ("bnb_4bit_compute_dtype", dtype_named),
        ("torch_dtype", dtype_named),
        ("dtype", dtype_named),
        ("llm_int8_skip_modules", skipped_names),
    ):
        try:
            read(said.get(key))
        except (ValueError, TypeError) as error:
            problems.append(f"{key}: {error}")
    return problems
