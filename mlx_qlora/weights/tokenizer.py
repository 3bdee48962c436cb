"""A model folder's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_qlora.errors import ModelError


def read_tokenizer(folder: Path, eos_token_ids: Any = None) -> Any:
    """mlx-lm's wrapper of the tokenizer in a folder.

    Args:
        eos_token_ids: What ends an answer, one id or several; None takes the tokenizer's own.

    Raises:
        ModelError: it cannot be loaded.
    """
    from mlx_lm.utils import load_tokenizer

    try:
        return load_tokenizer(folder, eos_token_ids=eos_token_ids)
    except Exception as error:  # whatever transformers makes of files it does not expect
        raise ModelError(
            f"The model's tokenizer cannot be loaded ({type(error).__name__}): {str(error)[:500]}",
            where=str(folder),
        ) from error
