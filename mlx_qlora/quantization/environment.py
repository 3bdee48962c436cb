"""``USE_QUANTIZATION`` and ``QUANTIZATION_BITS``, from the environment or a ``.env`` file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from mlx_qlora.config import QuantizationConfig
from mlx_qlora.errors import ConfigError
from mlx_qlora.quantization.translation import Translation

USE, BITS = "USE_QUANTIZATION", "QUANTIZATION_BITS"
_YES, _NO = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
_BITS = (2, 3, 4, 5, 6, 8)
_MAX_BYTES = 1024**2
_LINE = re.compile(r"\s*(?:export\s+)?(?P<name>[A-Za-z_][A-Za-z0-9_]*)\s*=[ \t]*(?P<value>.*)")


def quantization_from_environment(
    folder: str | Path = ".", environ: Mapping[str, str] | None = None
) -> Translation | None:
    """How the base is stored, by ``USE_QUANTIZATION`` (true, false) and ``QUANTIZATION_BITS`` (8, 4, …).

    Later wins, from the weakest: the preset or the default; ``.env`` in `folder`; the environment; a
    ``--config`` file, the configuration of a run that is resumed, or what an adapter was trained on;
    ``--set`` and arguments. The two variables are looked for one by one: each may come from another place.

    ============================  =======================================
    USE_QUANTIZATION is true      int4, or int8 and so on by the bits
    … is false                    none, whatever the bits
    … is not there, the bits are  as if it were true
    neither is there, or empty    None: others decide
    ============================  =======================================

    Args:
        environ: Takes the place of ``os.environ``.

    Raises:
        ConfigError: a value is neither; or ``.env`` cannot be read.
    """
    environ = os.environ if environ is None else environ
    path = Path(folder) / ".env"
    in_file = _read_env_file(path) if path.is_file() else {}
    found = {
        name: (environ[name], "the environment")
        if environ.get(name, "").strip()
        else (in_file[name], str(path))
        for name in (USE, BITS)
        if environ.get(name, "").strip() or in_file.get(name, "").strip()
    }
    if not found:
        return None
    bits = _bits(*found[BITS]) if BITS in found else 4
    is_used = _is_yes(*found[USE]) if USE in found else True
    said = ", ".join(f"{name}={value.strip()} ({where})" for name, (value, where) in found.items())
    scheme = f"int{bits}" if is_used else "none"
    return Translation(QuantizationConfig(scheme=scheme), (f"{said}: the scheme is {scheme}",))


def _bits(text: str, where: str) -> int:
    bits = int(text) if re.fullmatch(r"\s*[0-9]{1,3}\s*", text) else None
    if bits not in _BITS:
        raise ConfigError(
            f"{BITS} is one of {', '.join(map(str, _BITS))}, not {text.strip()!r}.",
            where=where,
            run=f"export {BITS}=4   # for 16 bits: export {USE}=false",
        )
    return bits


def _is_yes(text: str, where: str) -> bool:
    word = text.strip().lower()
    if word not in _YES + _NO:
        raise ConfigError(
            f"{USE} is true or false, not {text.strip()!r}.", where=where, run=f"export {USE}=true"
        )
    return word in _YES


def _read_env_file(path: Path) -> dict[str, str]:
    """The lines KEY=VALUE of a file, ``export`` before and comments after allowed, quotes taken off.

    Lines of another kind are other programs' business and are passed over; no variable is substituted, and
    nothing goes into the process environment.

    Raises:
        ConfigError: the file is no text, or of a size that no such file has.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES} bytes")
        text = content.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"The file cannot be read: {why}.", where=str(path)) from None
    matches = [_LINE.fullmatch(line) for line in text.splitlines()]
    return {match["name"]: _unquoted(match["value"]) for match in matches if match is not None}


def _unquoted(value: str) -> str:
    quoted = re.match(r"""(["'])(?P<text>.*?)\1\s*(?:#.*)?$""", value)
    return quoted["text"] if quoted else re.sub(r"(?:^|\s)#.*$", "", value).strip()
