"""Single values of a GGUF file's metadata, checked when they are asked for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mlx_qlora.errors import ModelError
from mlx_qlora.weights.gguf_file import GgufFile

_MOST = 2**31 - 1


class Metadata:
    """A file's metadata; keys of `integer` and `real` are the architecture's, without its name."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.architecture = self.text("general.architecture")
        if self.architecture is None:
            raise ModelError("The file does not say its architecture.", where=str(file.path))

    def text(self, key: str) -> str | None:
        """A text under its full key, or None."""
        value = self.file.metadata.get(key)
        return value if isinstance(value, str) else None

    def integer(self, key: str, default: int | None = None, *, most: int = _MOST) -> int:
        """A natural number; a list of one repeated number counts as that number."""
        value = self._one(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
            raise self._wrong(key, value, f"a number from 0 to {most}")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A finite number, as the shortest decimal that is the same float32."""
        value = self._one(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._wrong(key, value, "a finite number")
        return float(str(np.float32(value)))

    def has(self, key: str) -> bool:
        """Whether the architecture's `key` is there."""
        return f"{self.architecture}.{key}" in self.file.metadata

    def _one(self, key: str, default: Any) -> Any:
        value = self.file.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, np.ndarray):
            values = np.unique(value).tolist()
            if len(values) != 1:
                raise self._wrong(key, values[:8], "the same for every layer, as mlx-lm's models need")
            return values[0]
        return value

    def _wrong(self, key: str, value: Any, wanted: str) -> ModelError:
        said = "is missing" if value is None else f"is {str(value)[:80]}"
        return ModelError(
            f"{self.architecture}.{key} {said}; it has to be {wanted}.", where=str(self.file.path)
        )


def special_token(file: GgufFile, name: str) -> int | None:
    """The id of bos, eos, eot, unknown or padding; None when there is none, or one outside the vocabulary."""
    value = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(value, int) or isinstance(value, bool) or not isinstance(tokens, list):
        return None
    return value if 0 <= value < len(tokens) else None
