"""The tokens on which a fused model is compared with base and adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_qlora.config import DataConfig
from mlx_qlora.dataset import Example, ensure_chat_template, load_dataset, tokenizer_sha256
from mlx_qlora.errors import DataError
from mlx_qlora.lora.adapter import AdapterInfo

MAX_TOKENS = 1024
"""Positions that are compared, at most, unless more are asked for: hidden states of all are kept, thrice."""

MAX_WIDTH = 256
"""Tokens of a row of the built-in text."""

TEXT = (
    "The committee met on the first Monday of March to decide whether the old bridge should be repaired or "
    "replaced. Two engineers had measured the arches during the winter; their report, which ran to forty "
    "pages, said that the stones were sound but that the mortar had washed out below the waterline.",
    "Question: A train leaves the station at 14:05 and arrives at 16:50. It stops twice, for ten minutes "
    "each time. How long was it moving? Answer: From 14:05 to 16:50 there are 165 minutes. Without the two "
    "stops of ten minutes that leaves 145 minutes, or 2 hours and 25 minutes.",
    "def moving_average(values, width):\n    total = sum(values[:width])\n    averages = [total / width]\n"
    "    for old, new in zip(values, values[width:]):\n        total += new - old\n"
    "        averages.append(total / width)\n    return averages\n",
    "O clube foi fundado em 1926 por um grupo de pescadores e jogou os primeiros anos num campo junto ao "
    "rio. Die Zugvögel kamen in diesem Jahr früher als sonst, und niemand im Dorf wusste, warum. "
    "La recette est simple : de la farine, deux œufs, un peu de lait et une pincée de sel.",
)
"""Prose, reasoning, code and other languages: what is compared where there is no data."""


@dataclass(frozen=True)
class Sample:
    """Rows of tokens, and the positions whose prediction of the next token counts."""

    tokens_BT: np.ndarray
    """int32, padded on the right; what is predicted of padding is not looked at."""
    counted_BT: np.ndarray
    """bool: whether the token after this one is predicted."""
    is_validation: bool
    """Whether these are rows of the user's data; else the built-in text."""

    @property
    def num_tokens(self) -> int:
        """Positions that count."""
        return int(self.counted_BT.sum())


def text_sample(tokenizer: Any) -> Sample:
    """The built-in text as a tokenizer spells it; all positions count."""
    rows = [np.array(tokenizer.encode(text)[:MAX_WIDTH], np.int32) for text in TEXT]
    return _sample([(row, np.ones(len(row), bool)) for row in rows if len(row) > 1], is_validation=False)


def validation_sample(
    data: str, tokenizer: Any, info: AdapterInfo, max_tokens: int = MAX_TOKENS, max_seq_length: int = 512
) -> Sample:
    """The first validation rows of a data set, rendered as in training; answers count.

    Raises:
        DataError: there are no validation rows, or the data cannot be read.
    """
    config = DataConfig(path=data, max_seq_length=max_seq_length, system_prompt=info.system_prompt)
    info.check_tokenizer(tokenizer_sha256(tokenizer))
    ensure_chat_template(tokenizer, info.chat_template)
    rows = load_dataset(config, tokenizer, seed=0).valid
    if not rows:
        raise DataError(
            "The data has no validation rows to measure on.",
            where=data,
            run="mlx-qlora fuse … --data FOLDER   # with a valid.jsonl in it",
        )
    return _sample(_first(rows, max_tokens), is_validation=True)


def _first(examples: Sequence[Example], max_tokens: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Whole rows while their tokens are within the limit; one at least."""
    taken: list[tuple[np.ndarray, np.ndarray]] = []
    room = max_tokens
    for example in examples:
        if taken and len(example.tokens) > room:
            break
        taken.append((example.tokens, example.targets_mask))
        room -= len(example.tokens)
    return taken


def _sample(rows: Sequence[tuple[np.ndarray, np.ndarray]], *, is_validation: bool) -> Sample:
    if not rows:
        raise DataError("The tokenizer makes less than two tokens of any text.", where="tokenizer.json")
    width = max(len(tokens) for tokens, _ in rows)
    tokens_BT = np.zeros((len(rows), width), np.int32)
    counted_BT = np.zeros((len(rows), width), bool)
    for row, (tokens, targets) in enumerate(rows):
        tokens_BT[row, : len(tokens)] = tokens
        counted_BT[row, : len(tokens) - 1] = targets[1:]
    return Sample(tokens_BT, counted_BT, is_validation)
