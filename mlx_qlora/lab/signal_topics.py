"""The topics about quantization as noise."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlx_qlora.lab.finding import Finding, Table
from mlx_qlora.lab.signal import (
    DB_PER_BIT,
    Dither,
    noise_report,
    requantized,
    sampled_signal,
    slope_db_per_bit,
    snr_db,
    step_size,
)

SIGNALS = ("uniform", "sine", "gaussian")
DITHERS: tuple[Dither, ...] = ("none", "subtractive", "triangular")


def snr(seed: int) -> Finding:
    """Signal-to-noise ratio over bits, measured, and the slope fitted to it."""
    rng = np.random.default_rng(seed)
    bits = list(range(1, 17))
    measured = {}
    for name in SIGNALS:
        x = sampled_signal(name, 100_000, rng)
        measured[name] = [snr_db(x, requantized(x, b)) for b in bits]
    rows = [(b, *(measured[name][i] for name in SIGNALS)) for i, b in enumerate(bits)]
    slopes = {name: slope_db_per_bit(bits[4:], values[4:]) for name, values in measured.items()}
    offset = float(np.mean(np.array(measured["sine"]) - DB_PER_BIT * np.array(bits)))
    fits = [(name, slope, slope - DB_PER_BIT) for name, slope in slopes.items()]
    return Finding(
        "snr",
        "SNR against bits: 6 dB a bit",
        [
            Table("SNR in dB", ("bits", *SIGNALS), rows, ("", ".2f", ".2f", ".2f")),
            Table(
                "Slope from 5 to 16 bits, dB per bit",
                ("signal", "measured", "less 20 log10 2"),
                fits,
                ("", ".4f", "+.4f"),
            ),
        ],
        [
            f"A sine of full scale: {slopes['sine']:.3f} dB a bit, and {offset:+.2f} dB beside 6.02 b "
            "on average; the rule is +1.76.",
            "The normal signal leaves the line: beyond 4σ it clips, and no number of bits helps. The gain "
            f"of a bit is below 3 dB from {_bend(bits, measured['gaussian'])} bits on.",
        ],
        {"bits": bits, "measured": measured},
    )


def noise(seed: int) -> Finding:
    """Whether e(n) is uniform, white and unrelated to the signal; and dither where it is not."""
    rng = np.random.default_rng(seed)
    cases: list[tuple[str, int, Dither]] = [
        *((name, bits, "none") for name in ("uniform", "sine", "tone") for bits in (2, 4, 8, 12)),
        *(("tone", bits, dither) for dither in ("subtractive", "triangular") for bits in (2, 4, 8)),
    ]
    rows: list[tuple[Any, ...]] = []
    num_samples, errors = 16384, {}
    for name, bits, dither in cases:
        # Half a step of room on each side, and a whole one for triangular dither: clipping is another matter.
        x = sampled_signal(name, num_samples, rng) * (1 - 2 * step_size(bits) if bits > 2 else 0.5)
        y = requantized(x, bits, dither, rng)
        report = noise_report(x, y, bits)
        errors[name, bits, dither] = (y - x) / step_size(bits)
        rows.append(
            (name, bits, dither, report.power_ratio, report.correlation, report.uniform_p,
             report.chi_square_p, report.tonality_db, report.is_uniform)
        )  # fmt: skip
    by_case = {row[:3]: row for row in rows}
    plain, dithered = by_case["tone", 4, "none"], by_case["tone", 4, "subtractive"]
    return Finding(
        "noise",
        "Quantization noise e(n): uniform or not",
        [
            Table(
                f"{num_samples} samples; p below 0.001 is taken for not uniform",
                ("signal", "bits", "dither", "power / (Δ²/12)", "correlation with x", "KS p", "χ² p",
                 "peak / mean, dB", "uniform"),
                rows,
                ("", "", "", ".3f", "+.4f", ".2g", ".2g", ".1f", ""),
            )
        ],
        [
            f"The tone at 4 bits leaves noise whose highest line is {plain[7]:.1f} dB over the mean: "
            f"harmonics. With subtractive dither it is {dithered[7]:.1f} dB, as in white noise, "
            f"and p by χ² is {dithered[6]:.2g} against {plain[6]:.2g}.",
            f"Triangular dither takes {by_case['tone', 8, 'triangular'][3]:.2f} times the noise power, and "
            "that no longer follows the signal; its error is not uniform, nor meant to be.",
        ],
        {
            "spectra": {dither: _spectrum_db(errors["tone", 4, dither]) for dither in DITHERS},
            "histograms": {
                "uniform noise, 8 bits": errors["uniform", 8, "none"],
                "tone, 4 bits": errors["tone", 4, "none"],
                "tone, 4 bits, subtractive dither": errors["tone", 4, "subtractive"],
            },
        },
    )  # fmt: skip


def _spectrum_db(e: np.ndarray) -> np.ndarray:
    """Mean power spectrum of 32 pieces, in dB over that of white noise of Δ²/12; e in steps."""
    pieces = e.reshape(32, -1)
    window = np.hanning(pieces.shape[1])
    power = np.mean(np.square(np.abs(np.fft.rfft(pieces * window, axis=1))), axis=0)
    shown: np.ndarray = 10 * np.log10(np.maximum(power / (np.square(window).sum() / 12), 1e-6))
    return shown


def _bend(bits: list[int], snr: list[float]) -> int:
    """The first width that gives less than half of the rule's 6 dB."""
    gains = zip(bits[1:], np.diff(snr), strict=True)
    return next((b for b, gain in gains if gain < DB_PER_BIT / 2), bits[-1])
