"""Whether a tokenizer is the one an adapter was trained with."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from mlx_qlora.dataset.encoding import inner_of

_PROBE = "Em 1926, o «clube» não perdeu:  3.5 + 42%?\n\n\tThe cat's \"naïve\" I'll-be_back(x) 日本 😀 ###\r\n"
"""Spaces, numbers, contractions, accents, other scripts: where tokenizers of one vocabulary differ."""


def tokenizer_sha256(tokenizer: Any) -> str:
    """Digest of what turns a prompt into tokens: the vocabulary, how a probe comes out, and BOS and EOS.

    Tokens added to the vocabulary do not count, so that a padding token may be added later.
    """
    inner = inner_of(tokenizer)
    added = set(getattr(inner, "get_added_vocab", dict)())
    pieces = sorted(item for item in inner.get_vocab().items() if item[0] not in added)
    names = [(name, inner.convert_tokens_to_ids(name)) for name in (inner.bos_token, inner.eos_token) if name]
    seen = [pieces, list(inner(_PROBE, verbose=False)["input_ids"]), names]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()
