"""Which files of a folder are published: an allow-list, local paths taken out, and all of it read through."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_qlora.errors import MlxQloraError, StorageError, listed
from mlx_qlora.exchange.card_secrets import find_leaks, private_texts
from mlx_qlora.exchange.card_source import Publication
from mlx_qlora.lora.adapter import CONFIG, OURS, WEIGHTS
from mlx_qlora.storage import read_json
from mlx_qlora.weights.links import check_links
from mlx_qlora.weights.output_folder import MANIFEST

CARD, PICTURE = "README.md", "loss.png"

_OF_BOTH = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md")
_OF_ADAPTER = (WEIGHTS, CONFIG, PICTURE)
_OF_MODEL = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    MANIFEST,
)
_VOCABULARIES = {"tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json"}
_LOCAL_KEYS = ("_name_or_path", "name_or_path")
_LOCAL_SETTINGS = ("offload", "offload_budget_gib")  # of this machine's memory, not of the adapter


@dataclass(frozen=True)
class PublishedFile:
    """One file of the repository to be."""

    path: str
    """In the repository."""
    content: bytes | Path
    """What is sent: a file of the folder as it is, or bytes made for this."""

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def gather(publication: Publication) -> tuple[list[PublishedFile], list[str]]:
    """The files to publish, without the card, and the names in the folder that are left out.

    Raises:
        MlxQloraError: a file cannot be read, or is a link to one outside of the folder.
    """
    check_links(publication.folder)
    patterns = [*_OF_BOTH, *(_OF_ADAPTER if publication.adapter else _OF_MODEL)]
    if publication.config.get("model_file") or publication.config.get("auto_map"):
        patterns.append("*.py")  # the model does not load without its code
    folder = publication.folder
    chosen = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    left_out = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if path not in chosen)
    return [PublishedFile(path.name, _content(path, publication)) for path in chosen], left_out


def refuse_leaks(files: Sequence[PublishedFile], folders: Sequence[Path], token: str | None) -> None:
    """Read every text, and the metadata of every weight file, for what must not be published.

    Args:
        folders: Folders of this machine whose names are nobody's business.

    Raises:
        StorageError: something was found; all places are listed.
    """
    private = private_texts(folders, token)
    problems = [
        problem
        for file in files
        if (text := _text_of(file)) is not None
        for problem in find_leaks(
            file.path,
            text,
            private,
            is_vocabulary=file.path in _VOCABULARIES or file.path.endswith(".tiktoken"),
        )
    ]
    if problems:
        raise StorageError(
            f"Nothing was sent: these would have been published with the files.\n{listed(problems)}",
            run="take them out of the files (of the system prompt, if they are there), then push again",
        )


def _content(path: Path, publication: Publication) -> bytes | Path:
    if path.suffix != ".json" or path.name in _VOCABULARIES:
        return path
    try:
        tree = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError(f"This file is broken: {error}", where=str(path)) from None
    cleaned = _for_everyone(tree, publication)
    if path.name == MANIFEST:
        cleaned = _without_folders(cleaned)
        if isinstance(cleaned.get("loss"), dict):
            cleaned["loss"].pop("notes", None)  # free text, in which a path of the data may stand
    if path.name == CONFIG and publication.adapter is not None:
        cleaned["model"] = publication.base_model
        model = {
            **cleaned[OURS]["model"],
            "path": publication.base_model,
            "revision": publication.base_revision,
        }
        cleaned[OURS]["model"] = {key: value for key, value in model.items() if key not in _LOCAL_SETTINGS}
    if cleaned == tree:
        return path
    return (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()


def _for_everyone(tree: Any, publication: Publication) -> Any:
    """`tree` with the base model's hub id where its local folder stood."""
    if isinstance(tree, dict):
        return {
            key: publication.base_model
            if key in _LOCAL_KEYS and isinstance(value, str) and _is_local(value)
            else _for_everyone(value, publication)
            for key, value in tree.items()
        }
    if isinstance(tree, list):
        return [_for_everyone(each, publication) for each in tree]
    source = publication.manifest.get("source")
    is_base = isinstance(tree, str) and _is_local(tree) and tree in (source, str(publication.base_folder))
    return publication.base_model if is_base else tree


def _without_folders(tree: Any) -> Any:
    """`tree` with the last name of every local path in place of it, such as that of a fused adapter."""
    if isinstance(tree, dict):
        return {key: _without_folders(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_without_folders(each) for each in tree]
    return Path(tree).name if isinstance(tree, str) and Path(tree).is_absolute() else tree


def _is_tiktoken(name: str) -> bool:
    return name.endswith(".tiktoken")


def _is_local(name: str) -> bool:
    return Path(name).is_absolute() or name.startswith(("~", ".")) or "\\" in name


def _text_of(file: PublishedFile) -> str | None:
    """What of a file is to be read through; None for pictures and other binary files."""
    if file.path.endswith(".safetensors") and isinstance(file.content, Path):
        return _safetensors_metadata(file.content)
    if file.path.endswith((".png", ".model")):
        return None
    raw = file.content if isinstance(file.content, bytes) else file.content.read_bytes()
    return raw.decode("utf-8", errors="replace")


def _safetensors_metadata(path: Path) -> str:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return json.dumps(json.loads(file.read(length)).get("__metadata__", {}), ensure_ascii=False)
    except (OSError, ValueError, AttributeError, MlxQloraError) as error:
        raise StorageError(f"These weights cannot be read: {error}", where=str(path)) from None
