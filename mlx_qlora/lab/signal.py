"""Quantization as signal processing sees it: y = x + e, and what the noise e is like.

The usual model takes e as uniform over ±Δ/2, white and unrelated to x. Then its power is Δ²/12, and each bit
gives 20 · log₁₀ 2 = 6.02 dB. The model holds where the signal crosses many steps between samples, and fails
for few bits and for tones; dither makes it true again. Sources: Bennett 1948; Widrow & Kollár 2008;
Lipshitz, Wannamaker & Vanderkooy 1992 (dither).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mlx_qlora.errors import ConfigError
from mlx_qlora.lab.libraries import lab_library

DB_PER_BIT = 20 * np.log10(2)
Dither = Literal["none", "subtractive", "triangular"]


def sampled_signal(name: str, num_samples: int, rng: np.random.Generator) -> np.ndarray:
    """Samples within −1 … 1, but for the last kind.

    ``uniform`` noise; ``sine`` of full scale whose frequency is no fraction of the sampling rate; ``tone``,
    whose period is 64 samples; ``gaussian`` noise with σ = 1/4: one sample in 16,000 is outside.

    Raises:
        ConfigError: there is no signal of that name.
    """
    n = np.arange(num_samples)
    signals = {
        "uniform": lambda: rng.uniform(-1, 1, num_samples),
        "sine": lambda: np.sin(2 * np.pi * n * (np.sqrt(5) - 1) / 20 + rng.uniform(0, 2 * np.pi)),
        "tone": lambda: np.sin(2 * np.pi * n / 64 + 0.3),
        "gaussian": lambda: rng.normal(0, 0.25, num_samples),
    }
    if name not in signals:
        raise ConfigError(f"There is no signal {name!r}; there are {', '.join(signals)}.", where="signal")
    made: np.ndarray = signals[name]()
    return made


def step_size(bits: int) -> float:
    """Δ of 2^bits levels over −1 … 1."""
    return 2.0 / 2**bits


def requantized(
    x: np.ndarray, bits: int, dither: Dither = "none", rng: np.random.Generator | None = None
) -> np.ndarray:
    """x at 2^bits levels, evenly spaced over −1 … 1, each in the middle of its cell.

    Args:
        dither: ``subtractive`` adds noise uniform over ±Δ/2 before and takes it off after; ``triangular``
            adds the sum of two such noises and leaves it in.
        rng: Draws the dither.

    Raises:
        ConfigError: no such dither, or no generator for it.
    """
    step, levels = step_size(bits), 2**bits
    if dither == "none":
        noise = np.zeros(np.shape(x))
    elif rng is None or dither not in ("subtractive", "triangular"):
        raise ConfigError(f"{dither!r} is no dither, or there is nothing to draw it from.", where="dither")
    else:
        noise = rng.uniform(-step / 2, step / 2, np.shape(x))
        if dither == "triangular":
            noise = noise + rng.uniform(-step / 2, step / 2, np.shape(x))
    cells = np.clip(np.floor((x + noise) / step), -levels / 2, levels / 2 - 1)
    y: np.ndarray = (cells + 0.5) * step
    return y - noise if dither == "subtractive" else y


def snr_db(signal: np.ndarray, restored: np.ndarray) -> float:
    """Signal power over noise power in decibels; infinite where they are the same."""
    power, noise = float(np.sum(np.square(signal))), float(np.sum(np.square(signal - restored)))
    return float("inf") if noise == 0 else 10 * float(np.log10(power / noise)) if power else float("-inf")


def slope_db_per_bit(bits: list[int], snr: list[float]) -> float:
    """The least-squares slope of SNR over bits."""
    return float(np.polyfit(bits, snr, 1)[0])


@dataclass(frozen=True)
class NoiseReport:
    """How well e fits the usual model."""

    power_ratio: float
    """Mean of e² over Δ²/12: 1 by the model."""
    uniform_p: float
    """Of Kolmogorov and Smirnov's test that e is uniform over ±Δ/2."""
    chi_square_p: float
    """Of the same by χ² over 32 cells."""
    correlation: float
    """Of e with x: 0 by the model."""
    tonality_db: float
    """The highest line of e's spectrum over its mean: about 9 dB for white noise of this length."""

    @property
    def is_uniform(self) -> bool:
        """Whether neither test finds fault at the level of 0.1 %."""
        return min(self.uniform_p, self.chi_square_p) > 1e-3


def noise_report(x: np.ndarray, y: np.ndarray, bits: int, *, num_cells: int = 32) -> NoiseReport:
    """Test e = y − x against the model; wants thousands of samples that do not saturate.

    Raises:
        ConfigError: scipy is not installed.
    """
    stats = lab_library("scipy.stats")
    e, step = y - x, step_size(bits)
    # Outside ±Δ/2 (saturation, triangular dither) e falls into the outermost cells, and the test says no.
    counts = np.histogram(np.clip(e, -step / 2, step / 2), num_cells, (-step / 2, step / 2))[0]
    spectrum = np.square(np.abs(np.fft.rfft((e - e.mean()) * np.hanning(len(e)))))[1:]
    spread = float(np.std(x) * np.std(e))
    return NoiseReport(
        power_ratio=float(np.mean(np.square(e)) / (step**2 / 12)),
        uniform_p=float(stats.kstest(e, "uniform", args=(-step / 2, step)).pvalue),
        chi_square_p=float(stats.chisquare(counts).pvalue),
        correlation=float(np.mean((x - x.mean()) * (e - e.mean())) / spread) if spread else 0.0,
        tonality_db=10 * float(np.log10(spectrum.max() / spectrum.mean())),
    )
