"""``tokenizer.ggml.pre``: which of llama.cpp's ways to split text a byte-level BPE tokenizer needs.

llama.cpp's converter encodes one text and looks the digest of the token ids up. Source of the text and of the
digests: ggml-org/llama.cpp, conversion/base.py (before: convert_hf_to_gguf.py), ``get_vocab_base_pre``; here
are those of architectures that we export.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from mlx_qlora.errors import ModelError
from mlx_qlora.weights.gguf_tokenizer import _is_known

CHECK_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) "
    "✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作"
    "1314151天～ ------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told "
    "he's there, 'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)

KNOWN = {
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",
    "c136ed14d01c2745d4f60a9596ae66800e2b61fa45643e72436041855ad4089d": "smaug-bpe",
    "049ecf7629871e3041641907f3de7c733e4dbfdc736f57d882ba0b0845599754": "deepseek-llm",
    "347715f544604f9118bb75ed199f68779f423cabb20db6de6f31b908d04d7821": "deepseek-coder",
    "9d032fcbd5501f4a38150912590928bfb36091efb5df11b8e2124b0390e3fb1e": "falcon3",
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",
    "d4c8f286ea6b520b3d495c4455483cfa2302c0cfcd4be05d781b6a8a0a7cdaf1": "megrez",
    "b0a6b1c0bd5998ebd9df08611efde34a4ff03faed45ae09c43e6b31ebd4b94cf": "a.x-4.0",
    "a8594e3edff7c29c003940395316294b2c623e09894deebbc65f33f1515df79e": "dbrx",
    "ccc2ef013c104be7bae2965776d611e1d7a8a2a9c547dd93a682c9a9fc80352e": "gpt-4o",
    "fcace8b9cac38ce847670c970cd5892031a753a1ef381abd1d9af00f713da085": "phi-2",
    "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",
    "0e9433cbbb161f89e264eb32e8e64bfe69e834973ffca5d41d3948a604a3e2a3": "pixtral",
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",
    "d5f1dd6f980fec569fb218a81a7658ac45fc56b38c5a0adeb1c232fbe04ef5ec": "seed-coder",
    "1431a23e583c97432bc230bff598d103ddb5a1f89960c8f1d1051aaa944d0b35": "minerva-7b",
    "7fc505bd3104ca1083b150b17d088b59534ede9bde81f0dd2090967d7fe52cee": "viking",
    "f6791d196f87ce6b56a7d234be618e0d58f8cda3549416635b2bebcd22cd95c4": "midm-2.0",
    "1994ffd01900cfb37395608534236ecd63f2bd5995d6cb1004dda1af50240f15": "trillion",
    "a1e163ecab2e718a4c829d1148b6e86824ec36163bb71941c3dca9cd5ac25756": "mellum",
}
"""SHA-256 of the check text's token ids, written as a Python list → llama.cpp's name."""

CANDIDATES = ("gpt-2", "llama-bpe", "qwen2", "smollm", "tekken", "gpt-4o")
"""Ways to split that between them cover what is in use; tried for a hint where the digest is unknown."""

Encode = Callable[[str], Sequence[int]]


def digest_of(ids: Sequence[int]) -> str:
    """As llama.cpp's converter writes and hashes a list of ids."""
    return hashlib.sha256(str(list(ids)).encode()).hexdigest()


def find_pre(encode: Encode, bos: int | None) -> str | None:
    """The name whose digest the check text's ids have, with BOS before them or without; None if unknown."""
    ids = list(encode(CHECK_TEXT))
    for variant in (ids, [bos, *ids]):
        if (name := KNOWN.get(digest_of([token for token in variant if token is not None]))) is not None:
            return name
    return None


def settled_pre(
    asked: str | None,
    encode: Encode,
    bos: int | None,
    rebuilt: Callable[[str], Encode],
    where: str,
) -> str:
    """The way to split text: the known one, or the one that was asked for unless it gives other tokens.

    Args:
        encode: Text to ids by the model's own tokenizer, without BOS and EOS.
        rebuilt: Name → the same vocabulary, split as llama.cpp does under that name.

    Raises:
        ModelError: it is not known and none was asked for, or the one asked for gives other tokens.
    """
    found = find_pre(encode, bos)
    if found is not None and asked in (None, found):
        return found
    if asked is not None and not _is_known(asked):
        if asked in KNOWN.values():
            return asked  # llama.cpp has it, and we cannot try it
        raise ModelError(f"We do not know how llama.cpp splits text under the name {asked!r}.", where=where)
    own = list(encode(CHECK_TEXT))
    if asked is not None:
        if list(rebuilt(asked)(CHECK_TEXT)) == own:
            return asked
        raise ModelError(
            f"Split as {asked!r}, llama.cpp's check text gives other tokens than this tokenizer does.",
            where=where,
            run=_hint(own, rebuilt),
        )
    raise ModelError(
        "Which of llama.cpp's ways to split text this tokenizer needs is not known: the digest of its tokens "
        f"({digest_of(own)[:16]}…) is in no table.",
        where=where,
        run=_hint(own, rebuilt),
    )


def _hint(own: list[int], rebuilt: Callable[[str], Encode]) -> str:
    for name in CANDIDATES:
        if list(rebuilt(name)(CHECK_TEXT)) == own:
            return f"the same command with --pre {name}   # gives the same tokens for llama.cpp's check text"
    return "the same command with --pre NAME, if you know it; of the usual ones none gives the same tokens"
