"""Quantization settings as they are written for bitsandbytes and torchao, as a configuration of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlx_qlora.config import QuantizationConfig, build_config
from mlx_qlora.errors import ConfigError
from mlx_qlora.quantization.bitsandbytes_settings import from_bitsandbytes
from mlx_qlora.quantization.schemes import SCHEMES, UNQUANTIZED, scheme_named
from mlx_qlora.quantization.torchao_settings import TORCHAO_NAMES, from_torchao, is_torchao
from mlx_qlora.quantization.translation import WHERE, Filter, Translation, refuse, unknown_key

_OF_OTHERS = {
    "gptq": "int4 with group_size 128",
    "awq": "int4 with group_size 128",
    "hqq": "int4",
    "quanto": "int8 or int4",
    "eetq": "int8",
    "fp8": "mxfp8",
    "fbgemm_fp8": "mxfp8",
    "compressed-tensors": "int8",
    "mxfp4": "the scheme mxfp4",
    "higgs": "int4",
    "aqlm": "int2",
    "vptq": "int2",
}
"""transformers' other methods → the scheme that comes nearest."""


def quantization_from(settings: Any, *, filter_fn: Filter | None = None) -> Translation:
    """What quantization settings in another library's words mean here.

    Args:
        settings: One of

            - a dictionary with the keys of bitsandbytes (``load_in_4bit``, ``bnb_4bit_quant_type``, …) and of
              ``from_pretrained`` beside them (``device_map``), or transformers' BitsAndBytesConfig;
            - a torchao configuration: an object (``Int4WeightOnlyConfig(group_size=64)``), its name, its
              dump, or transformers' TorchAoConfig;
            - the name of a scheme, a QuantizationConfig, or a dictionary of its keys.
        filter_fn: torchao's: (module, path) → whether it is quantized. `Translation.for_model` applies it.
            With torchao's settings it alone decides, embeddings included.

    Raises:
        ConfigError: the settings contradict themselves, have no counterpart here, or are none; every problem
            is listed, and what comes nearest.
    """
    if isinstance(settings, Mapping) and "filter_fn" in settings:
        settings = dict(settings)
        filter_fn = filter_fn or settings.pop("filter_fn")
        settings.pop("filter_fn", None)
    if filter_fn is not None and not callable(filter_fn):
        raise ConfigError(f"filter_fn is a function of (module, path), not {filter_fn!r}.", where=WHERE)
    translated = _translated(settings)
    if filter_fn is None:
        return translated
    if is_torchao(settings):
        free = {"keep_embeddings": False, "keep_lm_head": False}
        translated = replace(translated, config=translated.config.model_copy(update=free))
    return replace(translated, filter_fn=filter_fn)


def _translated(settings: Any) -> Translation:
    if isinstance(settings, QuantizationConfig):
        return Translation(settings)
    if isinstance(settings, str):
        return _from_name(settings)
    is_dump = not isinstance(settings, Mapping)
    if is_dump and callable(getattr(settings, "to_dict", None)):
        settings = settings.to_dict()
    if isinstance(settings, Mapping):
        return _from_mapping(settings, is_dump)
    if is_torchao(settings):
        return from_torchao(settings)
    raise ConfigError(
        "quantization_config is a dictionary, a BitsAndBytesConfig, a torchao configuration or the name of a "
        f"scheme, not an object of type {type(settings).__name__}.",
        where=WHERE,
        run='mq.load(MODEL, quantization="int4")',
    )


def _from_name(name: str) -> Translation:
    if name in UNQUANTIZED or name in SCHEMES or not is_torchao(name):
        if name not in UNQUANTIZED:
            scheme_named(name)
        return Translation(QuantizationConfig(scheme=name))
    return from_torchao(name)


def _from_mapping(settings: Mapping[str, Any], is_dump: bool) -> Translation:
    # An enumeration in the object, text in its JSON.
    method = getattr(settings.get("quant_method"), "value", settings.get("quant_method"))
    if method is not None:
        settings = {**settings, "quant_method": method}
    if method not in (None, "bitsandbytes", "torchao"):
        nearest = _OF_OTHERS.get(str(method), "int4 or int8")
        raise ConfigError(
            f"quant_method {method!r} has no counterpart here; the nearest is {nearest}.",
            where=WHERE,
            run=f'mq.load(MODEL, quantization="{_first_scheme(nearest)}")',
        )
    if is_torchao(settings):
        return from_torchao(settings)
    ours = QuantizationConfig.model_fields
    strangers = [key for key in settings if key not in ours]
    if settings and len(strangers) < len(settings):  # at least one key is our own
        refuse([unknown_key(key, [*ours]) for key in strangers])
        return Translation(build_config({"quantization": dict(settings)}, where=WHERE).quantization)
    # A dump says of itself which method it is for; its defaults were written out by nobody.
    return from_bitsandbytes(settings, is_dump=is_dump or "_load_in_4bit" in settings)


def _first_scheme(nearest: str) -> str:
    return next((word for word in nearest.split() if word in SCHEMES), "int4")


__all__ = ["TORCHAO_NAMES", "Filter", "Translation", "quantization_from"]
