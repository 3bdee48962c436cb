"""Weights made of integers alone, so that every machine makes the same, and what bitsandbytes stores of them.

``nf4_vectors.json`` was written by ``python -m tests.unit.quantization.nf4_vectors``, with the extra
`peers` installed: bitsandbytes 0.50.2 on a CPU, one torch thread. test_nf4_peers.py compares it with what is
there.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).with_suffix(".json")
SHAPES = {
    "whole": (64, 448),
    "short last block": (7, 33),
    "one value": (1, 1),
    "many": (512, 1024),
    "zeros": (2, 128),
}


def vector_weight(name: str) -> np.ndarray:
    """(rows, width) float32 in ±8, small values more often; one with zeros, a huge and a tiny value."""
    shape = SHAPES[name]
    place = np.arange(np.prod(shape), dtype=np.uint64)
    mixed = (place * np.uint64(2654435761) + np.uint64(12345)) % np.uint64(2**32)
    weight = ((mixed.astype(np.float64) / 2**31 - 1) ** 3 * 8).astype(np.float32).reshape(shape)
    if name == "zeros":
        weight[:] = 0
    if name == "whole":
        weight[2] = 0
        weight[3, 5], weight[4, 6] = 1e30, 1e-30
    return weight


def digest(array: Any) -> str:
    """Of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def by_bitsandbytes(weight: np.ndarray, block: int) -> dict[str, np.ndarray]:
    """What bitsandbytes stores: codes and absmax, and of the absmax codes, nested absmax and offset."""
    import bitsandbytes.functional as bnb
    import torch

    tensor, before = torch.from_numpy(weight), torch.get_num_threads()
    torch.set_num_threads(1)  # several sum the mean in another order
    try:
        packed, plain = bnb.quantize_4bit(tensor, blocksize=block, quant_type="nf4")
        _, double = bnb.quantize_4bit(tensor, blocksize=block, quant_type="nf4", compress_statistics=True)
    finally:
        torch.set_num_threads(before)
    stored = {
        "packed": packed.reshape(-1),
        "absmax": plain.absmax,
        "codes": double.absmax,
        "nested_absmax": double.state2.absmax,
        "offset": double.offset,
    }
    return {name: array.numpy() for name, array in stored.items()}


if __name__ == "__main__":
    table = {
        f"{name}, {block}": {k: digest(a) for k, a in by_bitsandbytes(vector_weight(name), block).items()}
        for name in SHAPES
        for block in (32, 64)
    }
    FILE.write_text(json.dumps(table, indent=1) + "\n")
