"""What a GGUF file says of its model under ``general``: name, licence, where it is from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mlx_qlora.storage import read_json
from mlx_qlora.weights.output_folder import MANIFEST
from mlx_qlora.weights.source import ModelSource

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)


def general_metadata(
    source: ModelSource, architecture: str, name: str | None = None, license_name: str | None = None
) -> dict[str, Any]:
    """Keys under ``general``; a licence only where the model's own README.md or the caller names one."""
    origin = _origin(source)
    card = read_card(source)
    said: dict[str, Any] = {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": name or origin.rstrip("/").rpartition("/")[2],
    }
    texts = {
        "general.license": license_name or _text(card.get("license")),
        "general.license.name": _text(card.get("license_name")),
        "general.license.link": _text(card.get("license_link")),
    }
    said |= {key: text for key, text in texts.items() if text}
    if _REPOSITORY.fullmatch(origin):
        said["general.source.huggingface.repository"] = origin
    return said


def read_card(source: ModelSource) -> Mapping[str, Any]:
    """The front matter of the model's README.md; empty if there is none that can be read."""
    import yaml

    try:
        found = _FRONT_MATTER.match((source.folder / "README.md").read_text(encoding="utf-8"))
        card = yaml.safe_load(found[1]) if found else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return card if isinstance(card, Mapping) else {}


def _origin(source: ModelSource) -> str:
    """Hub id or path of the model; of one that was quantized here, of what it was made from."""
    try:
        return str(read_json(source.folder / MANIFEST)["source"])
    except (OSError, ValueError, KeyError, TypeError):
        return source.name


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
