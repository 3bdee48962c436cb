"""The topics about numbers alone: each measures what the theory says, on arrays drawn by a seed."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlx_qlora.lab.accumulators import CodeRange, accumulated, bits_needed, safe_terms, worst_codes
from mlx_qlora.lab.bitpack import WordBits, pack, pack_dense, unpack, unpack_dense, weights_per_word
from mlx_qlora.lab.finding import Finding, Table
from mlx_qlora.lab.linear import LinearScheme, quantize
from mlx_qlora.lab.nonlinear import (
    MU,
    UNIFORM,
    A,
    Compander,
    a_law,
    codebook_quantize,
    kmeans_levels,
    mu_law,
    normal_float_levels,
    normal_float_quantize,
    uniform_levels,
)
from mlx_qlora.lab.signal import (
    DB_PER_BIT,
    snr_db,
)


def uneven_matrix(seed: int) -> np.ndarray:
    """(64, 256) normal weights whose rows differ in size, with one large weight in 2,000."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(0, 0.02, (64, 256)) * np.exp(rng.normal(0, 0.7, (64, 1)))
    return np.where(rng.random(weight.shape) < 1 / 2000, weight * 12, weight)


def linear(seed: int) -> Finding:
    """Error by bits and granularity; symmetric against asymmetric on values of one sign."""
    weight = uneven_matrix(seed)
    positive = np.maximum(np.random.default_rng([seed, 1]).normal(0.3, 0.5, (64, 256)), 0)
    rows, shares = [], []
    for bits in (2, 3, 4, 6, 8):
        for per in ("tensor", "channel", "group"):
            codes = quantize(weight, LinearScheme(bits, True, per))
            error = np.abs(codes.dequantized() - weight)
            shares.append(float((error / codes.steps()).max()))
            relative = float(np.linalg.norm(error) / np.linalg.norm(weight))
            rows.append((bits, per, relative, float(error.max()), 8 * codes.stored_bytes() / weight.size))
    by_sign = []
    for bits in (2, 3, 4, 6, 8):
        errors = []
        for is_symmetric in (True, False):
            codes = quantize(positive, LinearScheme(bits, is_symmetric, "tensor"))
            errors.append(float(np.sqrt(np.mean(np.square(codes.dequantized() - positive)))))
        by_sign.append((bits, *errors, errors[0] / errors[1]))
    # Three bits, so that the steps can be seen.
    line = np.linspace(-0.5, 2.0, 1001)
    stairs = {
        name: quantize(line, LinearScheme(3, is_symmetric, "tensor"))
        for name, is_symmetric in (("symmetric", True), ("asymmetric", False))
    }
    example = Table(
        "Scale and zero point for r from -0.5 to 2.0, 3 bits",
        ("kind", "S", "Z", "largest error", "largest error / S"),
        [
            (
                name,
                float(codes.scale[0, 0]),
                int(codes.zero_point[0, 0]),
                float(np.abs(codes.dequantized() - line).max()),
                float(np.abs(codes.dequantized() - line).max() / codes.scale[0, 0]),
            )
            for name, codes in stairs.items()
        ],
    )
    return Finding(
        "linear",
        "Linear quantization, r = S · (Q - Z)",
        [
            example,
            Table(
                "Symmetric, a 64 x 256 weight with uneven rows and a few outliers",
                ("bits", "S shared per", "relative error", "largest error", "bits per weight"),
                rows,
                ("", "", ".4f", ".4f", ".3f"),
            ),
            Table(
                "Values of one sign (after a ReLU), per tensor",
                ("bits", "symmetric RMS error", "asymmetric RMS error", "ratio"),
                by_sign,
                ("", ".5f", ".5f", ".2f"),
            ),
        ],
        [
            f"No error is above {max(shares):.4f} steps: rounding to the nearest code allows a half.",
            f"On values of one sign the symmetric grid errs {by_sign[-1][3]:.2f} times as much at 8 bits and "
            f"{by_sign[0][3]:.2f} times at 2: half its codes are never used.",
        ],
        {"line": line, "stairs": {name: codes.dequantized() for name, codes in stairs.items()}},
    )


def companding(seed: int) -> Finding:
    """SNR of 8 bits over the level of the signal: a straight line, μ-law and A-law."""
    rng = np.random.default_rng(seed)
    loud = np.clip(rng.laplace(0, 1, 100_000) / 8, -1, 1)
    loud = loud / np.sqrt(np.mean(np.square(loud)))
    curves: tuple[Compander, ...] = (UNIFORM, mu_law(MU), a_law(A))
    levels = list(range(-60, -11, 4))
    rows: list[tuple[Any, ...]] = []
    for level in levels:
        x = np.clip(loud * 10 ** (level / 20), -1, 1)
        rows.append((level, *(snr_db(x, curve.quantized(x, 8)) for curve in curves)))
    names = tuple(curve.name for curve in curves)
    # Jayant & Noll 1984, section 5.5: SNR does not depend on the level where the curve is logarithmic.
    plateau = 8 * DB_PER_BIT + 10 * np.log10(3) - 20 * np.log10(np.log1p(MU))
    measured = [row[2] for row in rows if -36 <= row[0] <= -20]
    spans = [max(column) - min(column) for column in zip(*[row[1:] for row in rows], strict=True)]
    x = np.linspace(-1, 1, 801)
    return Finding(
        "companding",
        "Companding: μ-law and A-law",
        [
            Table(
                "SNR in dB of a Laplacian signal, 8 bits",
                ("level, dB of full scale", *names),
                rows,
                ("", ".1f", ".1f", ".1f"),
            )
        ],
        [
            f"Over {levels[-1] - levels[0]} dB of level the SNR moves by {spans[0]:.1f} dB on the straight "
            f"line, {spans[1]:.1f} dB with μ-law and {spans[2]:.1f} dB with A-law.",
            f"Where μ-law is flat it gives {np.mean(measured):.1f} dB; "
            f"6.02 b + 4.77 - 20 log10 ln(1 + μ) = {plateau:.1f} dB.",
        ],
        {
            "x": x,
            "compressed": {curve.name: curve.compress(x) for curve in curves},
            "four_bits": {curve.name: curve.quantized(x, 4) for curve in curves},
            "plateau_db": float(plateau),
        },
    )


def codebooks(seed: int) -> Finding:
    """NF4 from the normal distribution; its error, k-means' and the even grid's, by the shape of the data."""
    rng = np.random.default_rng(seed)
    num_values = 64 * 512
    data = {
        "normal": rng.normal(0, 1, num_values),
        "uniform": rng.uniform(-1, 1, num_values),
        "Laplace": rng.laplace(0, 1, num_values),
        "two humps": np.concatenate(
            [rng.normal(-1, 0.15, num_values // 2), rng.normal(1, 0.15, num_values // 2)]
        ),
    }
    rows: list[tuple[Any, ...]] = []
    levels = {}
    for name, values in data.items():
        evenly, found = uniform_levels(values, 16), kmeans_levels(values, 16)
        levels[name] = found
        blocks = values.reshape(-1, 64)
        restored = {
            "even": codebook_quantize(values, evenly).dequantized(),
            "k-means": codebook_quantize(values, found).dequantized(),
            "int4": quantize(blocks, LinearScheme(4)).dequantized(),
            "int4 asym": quantize(blocks, LinearScheme(4, is_symmetric=False)).dequantized(),
            "NF4": normal_float_quantize(values, 64).dequantized(),
        }
        rows.append((name, *(_relative(values, back.reshape(-1)) for back in restored.values())))
    nf4 = normal_float_levels()
    normal = rows[0]
    return Finding(
        "codebooks",
        "Code-books: k-means, and NF4 from the normal distribution",
        [
            Table(
                "Relative error of 16 levels: the first two for all values at once, the rest in blocks of 64",
                ("distribution", "even grid", "k-means", "int4 sym", "int4 asym", "NF4"),
                rows,
                ("", *(".4f",) * 5),
            ),
            Table(
                "NF4's levels",
                ("code", "level"),
                [(code, float(level)) for code, level in enumerate(nf4)],
                ("", ".9f"),
            ),
        ],
        [
            f"In blocks of 64 normal values NF4 errs {normal[5] / normal[3]:.3f} times as much as symmetric "
            f"int4 and {normal[5] / normal[4]:.3f} times as much as asymmetric int4, "
            "which has a zero point to store.",
            f"On uniform values NF4 is the worse one, {rows[1][5] / rows[1][3]:.2f} times int4's error: "
            "it is made for one distribution.",
        ],
        {
            "nf4": nf4,
            "kmeans": levels["normal"] / np.abs(data["normal"]).max(),
            "normal": data["normal"] / np.abs(data["normal"]).max(),
            "blocks": (
                data["normal"].reshape(-1, 64) / np.abs(data["normal"].reshape(-1, 64)).max(1)[:, None]
            ),
        },
    )


def packing(seed: int) -> Finding:
    """How many codes a word holds, aligned and dense; every packing undone and compared."""
    rng = np.random.default_rng(seed)
    rows: list[tuple[Any, ...]] = []
    num_codes = 4096
    words: tuple[WordBits, ...] = (8, 32, 64)
    for bits in range(1, 9):
        codes = rng.integers(0, 2**bits, num_codes)
        packed, stream = pack(codes, bits, 32), pack_dense(codes, bits)
        is_same = bool(
            (unpack(packed, bits, num_codes) == codes).all()
            and (unpack_dense(stream, bits, num_codes) == codes).all()
        )
        held = tuple(weights_per_word(bits, word) for word in words)
        rows.append((bits, *held, packed.nbytes, stream.nbytes, 32 % bits, is_same))
    by_bits = {row[0]: row for row in rows}
    return Finding(
        "packing",
        "Packing codes into words",
        [
            Table(
                f"{num_codes} codes",
                ("bits", "in a byte", "in 32 bits", "in 64 bits", "aligned bytes", "dense bytes",
                 "bits lost of 32", "comes back"),
                rows,
            )
        ],
        [
            f"A 32-bit word holds {by_bits[2][2]} codes of 2 bits, {by_bits[4][2]} of 4 and "
            f"{by_bits[8][2]} of 8.",
            f"3 bits aligned take {by_bits[3][4] / by_bits[3][5]:.3f} times the bytes of the dense "
            f"stream, and 5 bits {by_bits[5][4] / by_bits[5][5]:.3f} times.",
        ],
    )  # fmt: skip


def accumulators(seed: int) -> Finding:
    """How many products an accumulator holds: derived, then overflowed for real."""
    pairs = {
        "int8 x int8": (CodeRange.signed(8), CodeRange.signed(8)),
        "int8 x int8, without -128": (CodeRange.signed(8, is_restricted=True),) * 2,
        "uint8 x int8": (CodeRange.unsigned(8), CodeRange.signed(8)),
        "int4 x int8": (CodeRange.signed(4), CodeRange.signed(8)),
        "int4 x int4": (CodeRange.signed(4), CodeRange.signed(4)),
    }
    rows: list[tuple[Any, ...]] = []
    for width in (16, 32):
        for name, (a, b) in pairs.items():
            num_terms = safe_terms(a, b, width)
            for count in (num_terms, num_terms + 1):
                x, y = worst_codes(count, a, b)
                true, got = accumulated(x, y, 64), accumulated(x, y, width)
                rows.append((name, width, count, true, got, true == got))
    rng = np.random.default_rng(seed)
    lengths = [2**k for k in range(6, 19)]
    a, b = pairs["int8 x int8"]
    typical = []
    for length in lengths:
        x = rng.integers(-128, 128, (16, length)).astype(np.int64)
        y = rng.integers(-128, 128, (16, length)).astype(np.int64)
        typical.append(float(np.abs((x * y).sum(axis=1)).max()))
    return Finding(
        "accumulators",
        "int32 accumulators and when they overflow",
        [
            Table(
                "The last safe number of products, and one more, in NumPy's own integers",
                ("codes", "accumulator bits", "products", "true sum", "sum in the accumulator", "right"),
                rows,
            )
        ],
        [
            f"int8 x int8 in int32 is safe to K = {safe_terms(a, b)}, "
            f"and a layer of 4,096 inputs needs {bits_needed(4096, a, b)} bits.",
            f"Random codes stay far below the bound: the largest of 16 sums of {lengths[-1]:,} products "
            f"is {typical[-1]:.3g}, and int32 ends at {2**31 - 1:.3g}.",
        ],
        {"lengths": lengths, "typical": typical, "worst": [length * 128 * 128 for length in lengths]},
    )


def _relative(values: np.ndarray, restored: np.ndarray) -> float:
    return float(np.linalg.norm(restored - values) / np.linalg.norm(values))
