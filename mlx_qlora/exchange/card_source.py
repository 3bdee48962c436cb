"""What a folder is that is to be published: adapter, quantized or fused model; its base and its licence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlx_qlora.errors import ConfigError, ModelError
from mlx_qlora.lora.adapter import WEIGHTS, AdapterInfo, read_adapter_info
from mlx_qlora.storage import read_json
from mlx_qlora.weights.output_folder import MANIFEST
from mlx_qlora.weights.shards import read_checkpoint, read_header

Relation = Literal["adapter", "quantized", "finetune"]

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""A hub id: owner/name."""
_CACHED = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})")
_FIRST_LINES = {
    "apache license": "apache-2.0",
    "mit license": "mit",
    "gnu general public license": "gpl-3.0",
    "bsd 3-clause license": "bsd-3-clause",
    "gemma terms of use": "gemma",
    "llama 2 community license agreement": "llama2",
    "meta llama 3 community license agreement": "llama3",
    "llama 3.1 community license agreement": "llama3.1",
    "llama 3.2 community license agreement": "llama3.2",
    "llama 3.3 community license agreement": "llama3.3",
}


@dataclass(frozen=True, kw_only=True)
class License:
    """Under which terms something may be used, as the hub writes it."""

    id: str
    """The hub's word, such as apache-2.0 or other."""
    name: str | None = None
    """With ``other``: what the licence calls itself."""
    link: str | None = None
    found_in: str
    """Where it was read."""


@dataclass(frozen=True, kw_only=True)
class Publication:
    """A folder that may be published, and where it comes from."""

    folder: Path
    relation: Relation
    """To the base model, as the hub calls it."""
    base_model: str
    """Hub id."""
    base_revision: str | None
    base_folder: Path | None
    """The base model on this machine, when it is known where."""
    adapter: AdapterInfo | None
    config: dict[str, Any]
    """config.json of a model."""
    manifest: dict[str, Any]
    """What mlx_qlora wrote down when it made the model; empty if it did not."""


def describe(folder: Path, base_model: str | None = None) -> Publication:
    """Find out what `folder` holds, and check that its weights are whole.

    Args:
        base_model: Hub id of its base model; None reads it from the folder.

    Raises:
        MlxQloraError: there is neither adapter nor model, it is broken, or the base has no known hub id.
    """
    if base_model is not None and not REPOSITORY.fullmatch(base_model):
        raise ConfigError(f"--base-model is a hub id, OWNER/NAME, not {base_model!r}.")
    if (folder / WEIGHTS).is_file():
        return _adapter(folder, base_model)
    if (folder / "config.json").is_file():
        return _model(folder, base_model)
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) if folder.is_dir() else ""
    raise ModelError(
        f"There is neither an adapter ({WEIGHTS}) nor a model (config.json) here; "
        f"there is {there or 'nothing'}.",
        where=str(folder),
        run="mlx-qlora push adapters/NAME --repo OWNER/NAME --dry-run",
    )


def find_license(publication: Publication) -> License | None:
    """The licence that files on this machine name: the model's own, or else its base model's."""
    for folder in _license_folders(publication):
        card = folder / "README.md"
        if card.is_file() and (found := license_of_card(_front_matter(card), str(card.name))):
            return found
        for path in sorted([*folder.glob("LICENSE*"), *folder.glob("LICENCE*")]):
            if path.is_file() and (name := _recognized(path)):
                return License(id=name, found_in=path.name)
    stated = publication.config.get("license")
    return License(id=stated, found_in="config.json") if isinstance(stated, str) else None


def license_of_card(front_matter: dict[str, Any], found_in: str) -> License | None:
    """The licence in a model card's metadata."""
    said = front_matter.get("license")
    if not isinstance(said, str) or not said:
        return None
    name, link = front_matter.get("license_name"), front_matter.get("license_link")
    # A link to a file of the base's repository would point at nothing in ours.
    link = link if isinstance(link, str) and link.startswith("https://") else None
    return License(id=said, name=name if isinstance(name, str) else None, link=link, found_in=found_in)


def languages(publication: Publication) -> list[str]:
    """Languages that the base model's card names, where it is on this machine."""
    for folder in _license_folders(publication):
        card = folder / "README.md"
        said = _front_matter(card).get("language") if card.is_file() else None
        if said:
            return [said] if isinstance(said, str) else [str(each) for each in said]
    return []


def _adapter(folder: Path, base_model: str | None) -> Publication:
    info = read_adapter_info(folder)
    read_header(folder / WEIGHTS)
    path = info.model.path or ""
    local = Path(path) if Path(path).is_absolute() else None
    found = _hub_id(path)
    if local is not None and found is None and (manifest := _manifest(local)):
        # A quantized copy: which one the adapter is to be used with, its author decides.
        source = _hub_id(str(manifest.get("source", "")))
        raise_unless(base_model, path, "adapter", suggestion=source[0] if source else None)
    elif found is None:
        raise_unless(base_model, path, "adapter")
    chosen, revision = (base_model, None) if base_model else found or ("", None)
    return Publication(
        folder=folder,
        relation="adapter",
        base_model=chosen,
        base_revision=revision or (info.model.revision if local is None and chosen == path else None),
        base_folder=local if local is not None and local.is_dir() else None,
        adapter=info,
        config={},
        manifest={},
    )


def raise_unless(base_model: str | None, path: str, what: str, suggestion: str | None = None) -> None:
    """Ask for the base model's hub id, unless it was given.

    Raises:
        ConfigError: it was not.
    """
    if base_model is None:
        raise ConfigError(
            f"The {what}'s base model is a folder on this machine, which nobody else has; say its hub id.",
            where=path or None,
            run=f"mlx-qlora push … --base-model {suggestion or 'OWNER/NAME'}",
        )


def _model(folder: Path, base_model: str | None) -> Publication:
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"The model's config.json is broken: {error}", where=str(folder)) from None
    if not isinstance(config, dict):
        raise ModelError("The model's config.json is no object.", where=str(folder))
    read_checkpoint(folder)
    manifest = _manifest(folder)
    source = str(manifest.get("source") or config.get("_name_or_path") or "")
    found = _hub_id(source)
    if found is None:
        raise_unless(base_model, source, "model")
    chosen, revision = (base_model, None) if base_model else found or ("", None)
    is_fused = bool(manifest.get("adapter") or manifest.get("fused"))
    is_quantized = bool(config.get("quantization") or config.get("quantization_config"))
    local = Path(source) if Path(source).is_absolute() else None
    return Publication(
        folder=folder,
        relation="quantized" if is_quantized and not is_fused else "finetune",
        base_model=str(chosen),
        base_revision=revision or (manifest.get("revision") if chosen == source else None),
        base_folder=local if local is not None and local.is_dir() else None,
        adapter=None,
        config=config,
        manifest=manifest,
    )


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = read_json(folder / MANIFEST)
    except (OSError, ValueError, RecursionError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _hub_id(name: str) -> tuple[str, str | None] | None:
    """Hub id and revision of a model by its name: an id, a GGUF file's, a folder in the hub's own cache."""
    if cached := _CACHED.search(name):
        return f"{cached[1]}/{cached[2]}", cached[3]
    repository = name.partition(":")[0] if name.endswith(".gguf") else name
    return (repository, None) if REPOSITORY.fullmatch(repository) and not Path(name).exists() else None


def _license_folders(publication: Publication) -> Iterator[Path]:
    if publication.relation != "adapter":
        yield publication.folder
    if publication.base_folder is not None:
        yield publication.base_folder
    from huggingface_hub import try_to_load_from_cache

    for name in ("README.md", "LICENSE", "config.json"):
        found = try_to_load_from_cache(publication.base_model, name, revision=publication.base_revision)
        if isinstance(found, str):
            yield Path(found).parent


def _front_matter(card: Path) -> dict[str, Any]:
    import yaml

    text = card.read_text(encoding="utf-8", errors="replace")
    begin, _, rest = text.partition("---\n")
    block, end, _ = rest.partition("\n---")
    if begin.strip() or not end:
        return {}
    try:
        read = yaml.safe_load(block)
    except yaml.YAMLError:
        return {}
    return read if isinstance(read, dict) else {}


def _recognized(path: Path) -> str | None:
    lines = path.read_text(encoding="utf-8", errors="replace")[:2000].lower().splitlines()
    first = " ".join(line.strip() for line in lines[:6])
    return next((name for words, name in _FIRST_LINES.items() if words in first), None)
