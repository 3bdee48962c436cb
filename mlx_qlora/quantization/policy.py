"""Which layer gets which format, and by which rule."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import mlx.nn as nn

from mlx_qlora.config import QuantizationConfig
from mlx_qlora.errors import ConfigError, listed
from mlx_qlora.quantization.schemes import Scheme, checked, resolve

SENSITIVE_LAYERS = (
    *("v_proj", "v_a_proj", "v_b_proj", "qkv_proj", "Wqkv", "wqkv", "c_attn", "query_key_value"),
    *("down_proj", "w2", "fc2", "dense_4h_to_h", "mlp.c_proj"),
)
"""Ends of paths: value projections, alone or fused with others, and what leads out of the MLP."""

BY_SCHEME = "the scheme of the model"
"""The rule where no other one names the layer."""

_SPELLED = re.compile(r"(?P<name>.+?)(?:-g(?P<group_size>\d+))?")
_BLOCK = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class Decision:
    """What happens to one layer that could be quantized."""

    scheme: Scheme | None
    """None keeps it as it is."""
    rule: str
    """What decided so."""
    own: Mapping[str, Any] | None = None
    """Its entry in config.json, where it differs from the model's; in the architecture's words, if any."""

    @property
    def reason(self) -> str | None:
        """Why the layer is kept; None where it is quantized."""
        return self.rule if self.scheme is None else None


@dataclass(frozen=True)
class Recipe:
    """One scheme for a model, and the layers that get another or none."""

    scheme: Scheme
    skip_modules: tuple[str, ...] = ()
    keep_lm_head: bool = False
    keep_embeddings: bool = False
    overrides: tuple[tuple[str, Scheme | None], ...] = ()
    """(name or pattern, scheme); of those that match a layer the last one counts."""
    sensitive_scheme: Scheme | None = None
    keep_sensitive: bool = False
    """Sensitive layers stay as they are."""

    @property
    def name(self) -> str:
        """Of a quantized copy's folder."""
        is_plain = self == Recipe(self.scheme, self.skip_modules)
        return self.scheme.name if is_plain else f"{self.scheme.name}-mixed"

    @property
    def group_size(self) -> int:
        """Of layers that nothing else is said of."""
        return self.scheme.group_size

    def config(self) -> dict[str, int | str]:
        """What config.json says of layers that have no entry of their own."""
        return self.scheme.config()


def recipe_of(config: QuantizationConfig) -> Recipe | None:
    """The recipe a configuration asks for; None keeps the checkpoint as it is.

    Raises:
        ConfigError: a scheme does not exist, or bits_per_weight has not become overrides yet.
    """
    scheme = resolve(config)
    if scheme is None:
        if config.overrides or config.sensitive_scheme or config.bits_per_weight:
            raise ConfigError(
                f"The scheme {config.scheme} keeps the whole checkpoint; no layer can have another.",
                where="quantization.scheme",
                run="mlx-qlora train --set quantization.scheme=int8 --set quantization.overrides={…} …",
            )
        return None
    if config.bits_per_weight is not None:
        raise ConfigError(
            f"{config.bits_per_weight} bits per weight are reached by measuring the layers of a model first.",
            where="quantization.bits_per_weight",
            run="mlx-qlora quantize MODEL --bits-per-weight … --output DIR   # then train on DIR",
        )
    sensitive = config.sensitive_scheme
    more = read_scheme(sensitive, "quantization.sensitive_scheme") if sensitive is not None else None
    return Recipe(
        scheme,
        config.skip_modules,
        config.keep_lm_head,
        config.keep_embeddings,
        tuple(
            (pattern, read_scheme(name, f"quantization.overrides {pattern!r}"))
            for pattern, name in config.overrides
        ),
        more,
        keep_sensitive=sensitive is not None and more is None,
    )


def uniform_near(config: QuantizationConfig) -> QuantizationConfig:
    """A target as the narrowest affine scheme of as many bits, to plan with before anything is measured."""
    if config.bits_per_weight is None:
        return config
    group_size = config.group_size or 64
    affine = [Scheme(f"int{bits}", "affine", bits, group_size) for bits in (2, 3, 4, 5, 6, 8)]
    enough = [scheme for scheme in affine if scheme.bits_per_weight() >= config.bits_per_weight]
    changes = {"scheme": (enough or affine[-1:])[0].name, "bits": None, "mode": None, "bits_per_weight": None}
    return config.model_copy(update=changes)


def read_scheme(text: str, where: str) -> Scheme | None:
    """The scheme of a layer, as `spelled`; None for ``none``.

    Raises:
        ConfigError: there is none of that name, or not with that group size.
    """
    match = _SPELLED.fullmatch(text)
    name, group_size = match.groups() if match else (text, None)
    try:
        return resolve(QuantizationConfig(scheme=name, group_size=int(group_size) if group_size else None))
    except (ConfigError, ValueError) as error:  # a group of 0 is no configuration
        what = error.what if isinstance(error, ConfigError) else "A group has at least one weight."
        raise ConfigError(what, where=where) from None


def spelled(scheme: Scheme | None) -> str:
    """The shortest text that `read_scheme` reads as `scheme`: int8, int8-g32, none."""
    if scheme is None:
        return "none"
    is_default = resolve(QuantizationConfig(scheme=scheme.name)) == scheme
    return scheme.name if is_default else f"{scheme.name}-g{scheme.group_size}"


def decide_all(
    model: nn.Module, recipe: Recipe | Scheme, skip_modules: Sequence[str] = ()
) -> dict[str, Decision]:
    """A decision for every layer of an unquantized model that MLX can quantize, by path.

    The rule for a plain scheme is mlx-lm's: the last dimension must be whole groups, and the model's own
    ``quant_predicate`` may keep a layer or give it other bits. What the recipe says of a layer by name comes
    before the bits that the architecture asks for; what the architecture keeps stays unquantized.

    Args:
        recipe: A scheme alone is a recipe for all layers but those in `skip_modules`.

    Raises:
        ConfigError: an override matches no layer, or no layer is known as sensitive; all are listed.
    """
    if isinstance(recipe, Scheme):
        recipe = Recipe(recipe, tuple(skip_modules))
    layers = {path: module for path, module in model.named_modules() if hasattr(module, "to_quantized")}
    _check_overrides(list(layers), recipe)
    kept = _kept(layers, recipe)
    has_more = recipe.keep_sensitive or recipe.sensitive_scheme is not None
    sensitive = _sensitive(layers) if has_more else frozenset()
    predicate: Callable[[str, nn.Module], Any] | None = getattr(model, "quant_predicate", None)
    return {
        path: Decision(None, kept[path])
        if path in kept
        else _decide(path, module, recipe, path in sensitive, predicate)
        for path, module in layers.items()
    }


def _decide(
    path: str,
    module: nn.Module,
    recipe: Recipe,
    is_sensitive: bool,
    predicate: Callable[[str, nn.Module], Any] | None,
) -> Decision:
    override = next((pair for pair in reversed(recipe.overrides) if is_named(path, pair[0])), None)
    scheme = recipe.scheme if override is None else override[1]
    rule = BY_SCHEME if override is None else f"overrides {override[0]!r}"
    if scheme is None:
        return Decision(None, rule)
    width = module.weight.shape[-1]
    if width % scheme.group_size:
        said = "" if override is None else f" ({rule})"
        return Decision(None, f"its {width} inputs are no multiple of the group of {scheme.group_size}{said}")
    own = predicate(path, module) if predicate is not None else True
    if not own:
        return Decision(None, "the architecture keeps it")
    if override is None and isinstance(own, Mapping):
        wanted = Scheme("own", own.get("mode", "affine"), own["bits"], own["group_size"])
        return Decision(checked(wanted), "the architecture asks for it", own)
    if override is None and is_sensitive and recipe.keep_sensitive:
        return Decision(None, "sensitive_scheme")
    more = recipe.sensitive_scheme
    if override is None and is_sensitive and more is not None and width % more.group_size == 0:
        scheme, rule = more, "sensitive_scheme"
    return Decision(scheme, rule, None if scheme == recipe.scheme else scheme.config())


def is_named(path: str, name: str) -> bool:
    """Whether `name` is the path, its end after a dot, a part of it, or a pattern that matches it."""
    return path == name or path.endswith(f".{name}") or f".{name}." in f".{path}." or fnmatchcase(path, name)


def _kept(layers: Mapping[str, nn.Module], recipe: Recipe) -> dict[str, str]:
    """Path → rule of the layers that the recipe keeps as they are."""
    embeddings = [path for path, module in layers.items() if isinstance(module, nn.Embedding)]
    kept = dict.fromkeys(embeddings, "keep_embeddings") if recipe.keep_embeddings else {}
    if recipe.keep_lm_head:
        kept |= {p: "keep_lm_head" + " (it is the head too)" * (p in embeddings) for p in _heads(layers)}
    skipped = [path for path in layers if any(is_named(path, name) for name in recipe.skip_modules)]
    return kept | dict.fromkeys(skipped, "asked to be skipped")


def _heads(layers: Mapping[str, nn.Module]) -> list[str]:
    """What makes logits: outside of the blocks, as many outputs as there are tokens.

    Where no linear layer does, the token embedding is the head too.
    """
    outside = {path: module for path, module in layers.items() if _BLOCK.search(path) is None}
    embeddings = [path for path, module in outside.items() if isinstance(module, nn.Embedding)]
    vocabulary = max((outside[path].weight.shape[0] for path in embeddings), default=0)
    of_its_size = [path for path, module in outside.items() if module.weight.shape[0] == vocabulary]
    return [path for path in of_its_size if path not in embeddings] or of_its_size


def _sensitive(layers: Mapping[str, nn.Module]) -> frozenset[str]:
    """Layers that suffer most, by what is known of such models.

    Source: the choice of llama.cpp's Q4_K_M, which mlx-lm's mixed recipes follow; what is so for a model at
    hand, bits_per_weight measures.
    """
    blocks = {path: int(match[1]) for path in layers if (match := _BLOCK.search(path)) is not None}
    count = max(blocks.values(), default=-1) + 1
    eighth = max(1, count // 8)
    favoured = {i for i in range(count) if i < eighth or i >= count - eighth or (i - eighth) % 3 == 2}
    named = {
        path
        for path in blocks
        if any(path.endswith(f".{end}") for end in SENSITIVE_LAYERS) and blocks[path] in favoured
    }
    if not named:
        raise ConfigError(
            "No layer of this model has a name that is known as sensitive "
            f"({', '.join(SENSITIVE_LAYERS)}); it has {', '.join(_short_names(list(layers)))}.",
            where="quantization.sensitive_scheme",
            run="mlx-qlora train --set quantization.overrides={NAME: int8} …",
        )
    return frozenset(named | set(_heads(layers)))


def _check_overrides(paths: list[str], recipe: Recipe) -> None:
    unmatched = [name for name, _ in recipe.overrides if not any(is_named(path, name) for path in paths)]
    if not unmatched:
        return
    short = _short_names(paths)
    problems = []
    for name in unmatched:
        near = get_close_matches(name, [*paths, *short], n=2) or get_close_matches(
            name.rpartition(".")[2], short, n=2
        )
        problems.append(f"{name}: matches no layer" + (f"; near: {', '.join(near)}" if near else ""))
    raise ConfigError(
        f"{len(unmatched)} override(s) name nothing in this model:\n{listed(problems)}\n"
        f"Its layers are called {', '.join(short)}.",
        where="quantization.overrides",
        run=f'mlx-qlora train --set quantization.overrides={{"*.{short[-1]}": int8}} …',
    )


def _short_names(paths: list[str]) -> list[str]:
    return sorted({path.rpartition(".")[2] for path in paths})
