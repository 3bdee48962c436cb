"""torchao's configurations, by the names of their classes.

Source: torchao.quantization (``quantize_`` and its configs); the short names are those of its older releases.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from typing import Any

from mlx_qlora.config import QuantizationConfig
from mlx_qlora.errors import ConfigError
from mlx_qlora.quantization.translation import WHERE, Translation, refuse, skipped_names, unknown_key

TORCHAO_NAMES = (
    "Int8WeightOnly",
    "Int4WeightOnly",
    "IntxWeightOnly",
    "Int8DynamicActivationInt8Weight",
    "Int8DynamicActivationInt4Weight",
    "Int8DynamicActivationIntxWeight",
)
"""What has a meaning here; with or without Config at the end, in CamelCase or snake_case."""

PER_MODULE_NAMES = ("FqnToConfig", "ModuleFqnToConfig", "AOPerModuleConfig")

_NEAREST = {
    "float8": "mxfp8 (8-bit floats) or int8",
    "nvfp4": "the scheme nvfp4",
    "mx": "the scheme mxfp4 or mxfp8",
    "fpx": "int6",
    "uintx": "IntxWeightOnly",
    "int8static": "Int8WeightOnly",
    "gemlite": "Int4WeightOnly",
}
"""Beginning of a name that has no meaning here → what comes nearest."""

_GROUPS = (32, 64, 128)
_BITS = (2, 3, 4, 5, 6, 8)
_NO_INTEGER_PRODUCT = "MLX has no integer product: activations keep their type, weights alone are quantized"
_TRANSFORMERS_KEYS = (
    *("quant_method", "quant_type", "quant_type_kwargs", "modules_to_not_convert"),
    *("include_input_output_embeddings", "untie_embedding_weights"),
)
_OF_A_DUMP = ("_type", "_version", "_data")


@dataclass(frozen=True)
class _Weights:
    """What one torchao configuration says of a layer."""

    scheme: str
    """As overrides spell it: int8, int4-g128."""
    notes: tuple[str, ...] = ()


def is_torchao(settings: Any) -> bool:
    """Whether this is a torchao configuration: an object, its dump, or a name."""
    if isinstance(settings, Mapping):
        return "_type" in settings or "quant_type" in settings or settings.get("quant_method") == "torchao"
    if isinstance(settings, str):
        return _folded(settings) in {_folded(name) for name in TORCHAO_NAMES} or "weight" in settings.lower()
    return type(settings).__module__.partition(".")[0] == "torchao" or is_torchao(type(settings).__name__)


def from_torchao(settings: Any) -> Translation:
    """What a torchao configuration means here. As in torchao, linear layers alone are quantized.

    Args:
        settings: A config object, its name, its dump by ``config_to_dict``, or transformers' TorchAoConfig
            as a dictionary. A ``FqnToConfig`` becomes overrides.

    Raises:
        ConfigError: nothing here has that meaning; the nearest thing is named.
    """
    if isinstance(settings, Mapping) and "_type" not in settings:
        return _from_transformers(settings)
    name, values = _name_and_values(settings)
    if name in PER_MODULE_NAMES:
        return _per_module(values)
    weights = _weights(name, values)
    return Translation(_linear_layers_in(weights.scheme), weights.notes)


def _from_transformers(settings: Mapping[str, Any]) -> Translation:
    refuse([unknown_key(key, _TRANSFORMERS_KEYS) for key in settings if key not in _TRANSFORMERS_KEYS])
    inner = settings.get("quant_type")
    if isinstance(inner, Mapping) and "default" in inner:
        inner = inner["default"]
    if isinstance(inner, str):
        inner = {"_type": inner, "_data": settings.get("quant_type_kwargs") or {}}
    if inner is None:
        raise ConfigError("quant_type is not said; Int4WeightOnlyConfig, say.", where=WHERE)
    translated = from_torchao(inner)
    try:
        skip = skipped_names(settings.get("modules_to_not_convert"))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"modules_to_not_convert: {error}", where=WHERE) from None
    has_ends = bool(settings.get("include_input_output_embeddings"))
    changes = {
        "skip_modules": skip or (),
        "keep_lm_head": skip is None and not has_ends,
        "keep_embeddings": not has_ends,
    }
    notes = translated.notes
    if settings.get("untie_embedding_weights"):
        notes += ("untie_embedding_weights: a tied embedding stays one matrix, in one format",)
    return Translation(translated.config.model_copy(update=changes), notes)


def _per_module(values: Mapping[str, Any]) -> Translation:
    """Overrides. In torchao exact names come first, then the first pattern that fits, then ``_default``."""
    table = dict(values.get("fqn_to_config") or values.get("module_fqn_to_config") or {})
    notes: list[str] = []

    def scheme_of(settings: Any) -> str:
        if settings is None:
            return "none"
        weights = _weights(*_name_and_values(settings))
        notes.extend(note for note in weights.notes if note not in notes)
        return weights.scheme

    default = scheme_of(table.pop("_default", None))
    patterns = {_glob(name): scheme_of(c) for name, c in table.items() if name.startswith("re:")}
    names = {
        name.removesuffix(".weight"): scheme_of(c) for name, c in table.items() if not name.startswith("re:")
    }
    overrides = {**dict(reversed(patterns.items())), **names}
    chosen = [scheme for scheme in [default, *overrides.values()] if scheme != "none"]
    if not chosen:
        return Translation(QuantizationConfig(scheme="none"), (*notes, "no module has a configuration"))
    if default == "none":
        overrides = {"*": "none", **overrides}
    return Translation(_linear_layers_in(chosen[0], overrides), tuple(notes))


def _glob(pattern: str) -> str:
    text = pattern.removeprefix("re:").removeprefix("^").removesuffix("$")
    glob = text.replace(r"\.", "\0").replace(".*", "*").replace("\0", ".")
    if re.search(r"[\\()|+?{}\[\]^$]", glob):
        raise ConfigError(
            f"{pattern} has no counterpart among the path patterns here, which know * alone.",
            where=WHERE,
            run='mq.load(MODEL, quantization=QuantizationConfig(overrides={"*.down_proj": "int8"}))',
        )
    return glob


def _weights(name: str, values: Mapping[str, Any]) -> _Weights:
    folded = _folded(name)
    known = {_folded(each): each for each in TORCHAO_NAMES}
    if folded not in known:
        raise ConfigError(_no_such(name, folded), where=WHERE, run='mq.load(MODEL, quantization="int8")')
    kind = known[folded]
    group, is_grouped = _group_size(kind, values)
    bits = _bits(kind, values)
    notes = []
    if "DynamicActivation" in kind:
        notes.append(f"{name}: {_NO_INTEGER_PRODUCT}")
    if not is_grouped:
        notes.append(
            f"{name}: one scale for each {group} inputs here, not one for a row: closer to the floats"
        )
    problems = []
    if bits not in _BITS:
        nearest = min(_BITS, key=lambda own: (abs(own - bits), -own))
        problems.append(
            f"{name}: weights have {', '.join(map(str, _BITS))} bits, not {bits}; nearest: {nearest}"
        )
    if group not in _GROUPS:
        nearest = min(_GROUPS, key=lambda own: (abs(own - group), own))
        problems.append(f"{name}: groups of {', '.join(map(str, _GROUPS))}, not {group}; nearest: {nearest}")
    refuse(problems)
    return _Weights(f"int{bits}" if group == 64 else f"int{bits}-g{group}", tuple(notes))


def _no_such(name: str, folded: str) -> str:
    by_beginning = [near for start, near in _NEAREST.items() if folded.startswith(start)]
    close = get_close_matches(folded, [_folded(each) for each in TORCHAO_NAMES], n=1)
    by_name = [each for each in TORCHAO_NAMES if [_folded(each)] == close]
    nearest = [*by_beginning, *by_name, "Int8WeightOnly"][0]
    return (
        f"torchao's {name} has no counterpart here; the nearest is {nearest}. "
        f"There are {', '.join(TORCHAO_NAMES)}."
    )


def _group_size(kind: str, values: Mapping[str, Any]) -> tuple[int, bool]:
    """Inputs that share a scale, and whether torchao shares one among a group at all."""
    default = {"Int4WeightOnly": 128, "Int8DynamicActivationInt4Weight": 32}.get(kind)
    default = 32 if kind == "Int8DynamicActivationIntxWeight" else default
    granularity = values.get("granularity", values.get("weight_granularity"))
    group = values.get("group_size")
    if group is None:
        group = _value(granularity, "group_size")
    if group is None and granularity is None:
        group = default
    if group is None:
        return 64, False
    if isinstance(group, bool) or not isinstance(group, int):
        raise ConfigError(f"group_size is a number such as 64, not {group!r}.", where=WHERE)
    return group, True


def _bits(kind: str, values: Mapping[str, Any]) -> int:
    if "Intx" not in kind:
        return 4 if "Int4" in kind else 8
    text = str(_value(values.get("weight_dtype"), None) or "int8")
    match = re.search(r"int(\d+)$", text)
    if match is None:
        raise ConfigError(f"weight_dtype is an integer type such as torch.int4, not {text}.", where=WHERE)
    return int(match[1])


def _value(thing: Any, field: str | None) -> Any:
    """A field of an object or of its dump; without a field, the dumped value itself."""
    if isinstance(thing, Mapping):
        data = thing.get("_data", thing)
        return data.get(field) if field is not None and isinstance(data, Mapping) else data
    return thing if field is None else getattr(thing, field, None)


def _name_and_values(settings: Any) -> tuple[str, Mapping[str, Any]]:
    if isinstance(settings, str):
        return settings, {}
    if isinstance(settings, Mapping):
        refuse([unknown_key(key, _OF_A_DUMP) for key in settings if key not in _OF_A_DUMP])
        data = settings.get("_data") or {}
        if not isinstance(data, Mapping) or not isinstance(settings.get("_type"), str):
            raise ConfigError("This is no dump of a torchao configuration.", where=WHERE)
        return settings["_type"], data
    if not hasattr(settings, "__dict__") or isinstance(settings, type):
        raise ConfigError(f"{settings!r} is no torchao configuration.", where=WHERE)
    named = [field.name for field in fields(settings)] if is_dataclass(settings) else list(vars(settings))
    return type(settings).__name__, {name: getattr(settings, name) for name in named}


def _folded(name: str) -> str:
    return name.replace("_", "").lower().removesuffix("config")


def _linear_layers_in(scheme: str, overrides: Mapping[str, str] | None = None) -> QuantizationConfig:
    """Of a scheme as overrides spell it."""
    name, _, group = scheme.partition("-g")
    return QuantizationConfig(
        scheme=name,
        group_size=int(group) if group else None,
        overrides=tuple((overrides or {}).items()),
        keep_embeddings=True,
    )
