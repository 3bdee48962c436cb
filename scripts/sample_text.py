"""Text that a model itself writes, as rows to score its quantized copies on.

    python scripts/sample_text.py MODEL --rows 32 --output stories.jsonl

For a model whose training data is not at hand: each row is drawn at temperature 1, so the float model's loss
on them is its own entropy, and a quantized copy's excess over it is its Kullback-Leibler divergence but for
chance. The same seed gives the same rows on the same machine. On any other text a tiny model is lost, and so
are the differences.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import mlx_qlora  # noqa: F401  # before MLX: it brings a fast BLAS

# isort: split
import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_sampler

from mlx_qlora.inference.generate import load_assistant
from mlx_qlora.storage import write_text


def sampled(model: Any, tokenizer: Any, num_tokens: int) -> str:
    """One text, from its beginning to the end-of-text token or to `num_tokens`."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    tokens: list[int] = []
    steps = generate_step(mx.array([first]), model, max_tokens=num_tokens, sampler=make_sampler(temp=1.0))
    for token, _ in steps:
        if token in tokenizer.eos_token_ids or token == tokenizer.bos_token_id:
            break
        tokens.append(int(token))
    return tokenizer.decode(tokens).strip()


def main() -> None:
    """Parse, draw, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="hub id or folder")
    parser.add_argument("--output", type=Path, required=True, help="a .jsonl file")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=200, help="of each row, at most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    assistant = load_assistant(options.model)
    mx.random.seed(options.seed)
    texts: list[str] = []
    while len(texts) < options.rows:
        if text := sampled(assistant.model, assistant.tokenizer, options.tokens):
            texts.append(text)
            if len(texts) % 16 == 0:
                print(f"{len(texts)} of {options.rows} rows", file=sys.stderr, flush=True)
    write_text(options.output, "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts))


if __name__ == "__main__":
    main()
