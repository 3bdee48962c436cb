"""Small codes in large words: packing, unpacking, and how many weights a word holds.

Two layouts, both with the first code in the lowest bits:

- aligned: no code crosses the border of a word, so ``word_bits mod bits`` bits of each word stay empty;
- dense: one stream of bits without a gap, which is how MLX stores 3, 5 and 6 bits.

For 2, 4 and 8 bits they are the same.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from mlx_qlora.errors import ConfigError

WordBits = Literal[8, 16, 32, 64]
_WORDS: dict[int, type[np.unsignedinteger]] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


def weights_per_word(bits: int, word_bits: WordBits = 32) -> int:
    """Whole codes that one word holds, ⌊word_bits / bits⌋.

    Raises:
        ConfigError: a code has no bits, or more than the word.
    """
    if word_bits not in _WORDS:
        raise ConfigError(f"A word has 8, 16, 32 or 64 bits, not {word_bits}.", where="word_bits")
    if not 1 <= bits <= word_bits:
        raise ConfigError(f"A code of {bits} bits does not fit a word of {word_bits}.", where="bits")
    return word_bits // bits


def words_needed(num_codes: int, bits: int, word_bits: WordBits = 32, *, dense: bool = False) -> int:
    """Words that so many codes take in either layout."""
    per_word = weights_per_word(bits, word_bits)
    return -(-num_codes * bits // word_bits) if dense else -(-num_codes // per_word)


def pack(codes: np.ndarray, bits: int, word_bits: WordBits = 32) -> np.ndarray:
    """Codes as words, aligned; the last word is filled up with zeros.

    Args:
        codes: Unsigned integers below 2^bits, any shape; taken in row-major order.

    Raises:
        ConfigError: a code does not fit.
    """
    per_word, word = weights_per_word(bits, word_bits), _WORDS[word_bits]
    flat = _checked(codes, bits).astype(word)
    rows = np.zeros((words_needed(flat.size, bits, word_bits), per_word), word)
    rows.reshape(-1)[: flat.size] = flat
    shifts = (np.arange(per_word) * bits).astype(word)
    packed: np.ndarray = np.bitwise_or.reduce(rows << shifts, axis=1)
    return packed


def unpack(words: np.ndarray, bits: int, num_codes: int) -> np.ndarray:
    """The first `num_codes` codes of `pack`'s words, in the smallest unsigned type."""
    word_bits = words.dtype.itemsize * 8
    per_word = weights_per_word(bits, word_bits)  # type: ignore[arg-type]
    shifts = (np.arange(per_word) * bits).astype(words.dtype)
    mask = words.dtype.type(2**bits - 1)
    codes: np.ndarray = ((words[:, None] >> shifts) & mask).reshape(-1)[:num_codes]
    return codes.astype(_code_type(bits))


def pack_dense(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes as a stream of bits, in bytes; the last byte is filled up with zeros.

    Raises:
        ConfigError: a code does not fit.
    """
    weights_per_word(bits, 64)
    flat = _checked(codes, bits).astype("<u8")
    stream = np.unpackbits(flat.view(np.uint8).reshape(-1, 8), axis=1, count=bits, bitorder="little")
    return np.packbits(stream.reshape(-1), bitorder="little")


def unpack_dense(stream: np.ndarray, bits: int, num_codes: int) -> np.ndarray:
    """The first `num_codes` codes of `pack_dense`'s bytes, in the smallest unsigned type."""
    weights_per_word(bits, 64)
    single = np.unpackbits(stream, count=num_codes * bits, bitorder="little").reshape(num_codes, bits)
    padded = np.zeros((num_codes, 64), np.uint8)
    padded[:, :bits] = single
    codes = np.packbits(padded, axis=1, bitorder="little").view("<u8").reshape(-1)
    return codes.astype(_code_type(bits))


def _checked(codes: np.ndarray, bits: int) -> np.ndarray:
    flat = np.asarray(codes).reshape(-1)
    if flat.size and (int(flat.min()) < 0 or int(flat.max()) >= 2**bits):
        raise ConfigError(
            f"Codes from {flat.min()} to {flat.max()} do not fit {bits} bits: 0 to {2**bits - 1} do.",
            where="codes",
        )
    return flat


def _code_type(bits: int) -> type[np.unsignedinteger]:
    return next(kind for width, kind in _WORDS.items() if bits <= width)
