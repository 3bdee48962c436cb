"""The storage formats of a frozen base, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches

from mlx_qlora.config import QuantizationConfig
from mlx_qlora.errors import ConfigError

NESTED_BLOCK = 256
"""Scales that share one of their own, where they are quantized too."""

UNQUANTIZED = ("none", "fp16", "bf16", "float16", "bfloat16")
"""Names that keep a checkpoint as it is."""

_POSSIBLE: dict[str, dict[int, tuple[int, ...]]] = {
    "affine": dict.fromkeys((2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": {4: (32,)},
    "mxfp8": {8: (32,)},
    "nvfp4": {4: (16,)},
    "nf4": {4: (32, 64)},
    "nf4-dq": {4: (32, 64)},
}
"""Mode → bits → group sizes that MLX quantizes and multiplies; of NF4 that we do."""


@dataclass(frozen=True)
class Scheme:
    """One storage format: groups of `group_size` consecutive input features share their scale.

    affine stores w ≈ scale · q + bias, q unsigned; mxfp4, mxfp8 and nvfp4 store small floats and one
    8-bit scale. nf4 stores the nearest of sixteen values and a float32 scale, nf4-dq the scale in 8 bits too:
    for compatibility with bitsandbytes and for memory, not for accuracy, and mlx-lm reads neither.
    Sources: MLX's ``mx.quantize``; OCP Microscaling Formats 1.0; `mlx_qlora.quantization.nf4`.
    """

    name: str
    mode: str
    bits: int
    group_size: int

    @property
    def is_codebook(self) -> bool:
        """Whether each weight is one of sixteen values: layers of our own, which mlx-lm does not know."""
        return self.mode in ("nf4", "nf4-dq")

    def config(self) -> dict[str, int | str]:
        """The keys in a quantized model's config.json, as mlx-lm writes them; it refuses our own modes."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def bits_per_weight(self, scale_bits: int = 16) -> float:
        """Stored bits per weight of one large layer, scales included.

        Args:
            scale_bits: Width of affine scales and biases; those of nf4 have 32 bits, all others 8.
        """
        shared = {"affine": 2.0 * scale_bits, "nf4": 32.0, "nf4-dq": 8 + 32 / NESTED_BLOCK}.get(
            self.mode, 8.0
        )
        return self.bits + shared / self.group_size

    def stored_bytes(self, weights: int, scale_bits: int = 16) -> int:
        """Bytes that so many weights of one layer take."""
        if self.mode != "nf4-dq":
            return round(weights * self.bits_per_weight(scale_bits) / 8)
        blocks = weights // self.group_size
        return weights // 2 + blocks + 4 * -(-blocks // NESTED_BLOCK) + 4  # and the mean


SCHEMES: dict[str, Scheme] = {
    **{f"int{bits}": Scheme(f"int{bits}", "affine", bits, 64) for bits in _POSSIBLE["affine"]},
    "mxfp4": Scheme("mxfp4", "mxfp4", 4, 32),
    "mxfp8": Scheme("mxfp8", "mxfp8", 8, 32),
    "nvfp4": Scheme("nvfp4", "nvfp4", 4, 16),
    "nf4": Scheme("nf4", "nf4", 4, 64),
    "nf4-dq": Scheme("nf4-dq", "nf4-dq", 4, 64),
}


def scheme_named(name: str) -> Scheme:
    """The scheme of that name.

    Raises:
        ConfigError: there is none; the message lists those that exist.
    """
    if name not in SCHEMES:
        near = get_close_matches(name, SCHEMES, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"There is no scheme {name!r}; there are {', '.join([*SCHEMES, 'none'])}.{hint}",
            where="quantization.scheme",
        )
    return SCHEMES[name]


def resolve(config: QuantizationConfig) -> Scheme | None:
    """The scheme a configuration asks for; None keeps the checkpoint as it is.

    Raises:
        ConfigError: no such scheme, or MLX has no such mode, bits and group size together.
    """
    if config.scheme in UNQUANTIZED:
        return None
    scheme = scheme_named(config.scheme)
    mode = config.mode or scheme.mode
    bits = config.bits or (scheme.bits if mode == scheme.mode else _default_bits(mode, scheme.bits))
    default_group = scheme.group_size if mode == scheme.mode else _default_group(mode, bits)
    return checked(replace(scheme, bits=bits, mode=mode, group_size=config.group_size or default_group))


def checked(scheme: Scheme) -> Scheme:
    """`scheme` under its own name, if MLX has it.

    Raises:
        ConfigError: it has not; the message lists what is possible.
    """
    by_bits = _POSSIBLE.get(scheme.mode)
    if by_bits is None:
        raise ConfigError(
            f"There is no mode {scheme.mode!r}; there are {', '.join(_POSSIBLE)}.", where="quantization.mode"
        )
    if scheme.bits not in by_bits:
        raise ConfigError(
            f"{scheme.mode} has {', '.join(map(str, by_bits))} bits, not {scheme.bits}.",
            where="quantization.bits",
        )
    groups = by_bits[scheme.bits]
    if scheme.group_size not in groups:
        raise ConfigError(
            f"{scheme.mode} with {scheme.bits} bits has groups of {', '.join(map(str, groups))}, "
            f"not {scheme.group_size}.",
            where="quantization.group_size",
        )
    name = f"int{scheme.bits}" if scheme.mode == "affine" else scheme.mode
    return replace(scheme, name=name)


def _default_bits(mode: str, wanted: int) -> int:
    widths = _POSSIBLE.get(mode, {wanted: ()})
    return wanted if wanted in widths else next(iter(widths))


def _default_group(mode: str, bits: int) -> int:
    groups = _POSSIBLE.get(mode, {}).get(bits, (64,))
    return 64 if 64 in groups else groups[0]
