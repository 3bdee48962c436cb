"""Symbolic links in folders of others: none may bring in a file that its author cannot have meant to give."""

from __future__ import annotations

from pathlib import Path

from mlx_qlora.errors import ModelError

TENSOR_SUFFIXES = (".safetensors", ".gguf")
"""Read as numbers behind a checked header: a link to one brings in no text."""


def check_links(folder: Path) -> None:
    """Refuse links to small files elsewhere.

    They are read as configuration or text, copied beside every model that is made of this one, and published
    with it: a link ``added_tokens.json -> ~/.ssh/id_rsa`` in somebody's archive would leave with them. Links
    within the folder, those that the hub's own cache consists of, and links to tensors are followed.

    Raises:
        ModelError: there is another one.
    """
    here = folder.resolve()
    blobs = here.parent.parent / "blobs"  # of the hub's cache, beside snapshots/REVISION
    for path in sorted(folder.iterdir()):
        if not path.is_symlink() or path.suffix in TENSOR_SUFFIXES:
            continue
        target = path.resolve()
        is_blob = here.parent.name == "snapshots" and target.parent == blobs
        if not is_blob and not target.is_relative_to(here):
            raise ModelError(
                f"{path.name} is a link to a file outside of the folder, {target}, which is not followed.",
                where=str(folder),
                run=f"cp -L {path} FILE && mv FILE {path}   # if it belongs to the model",
            )
