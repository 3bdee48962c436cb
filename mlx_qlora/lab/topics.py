"""The lab's table of contents. A topic's module is imported when it is run."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from mlx_qlora.errors import ConfigError
from mlx_qlora.lab.finding import Finding

TOPICS = {
    "linear": ("theory", "scale and zero point; symmetric, asymmetric; per tensor, channel, group"),
    "eight-bit": ("experiments", "the 8-bit quantizer for any model with linear layers"),
    "companding": ("theory", "μ-law and A-law against a straight line"),
    "codebooks": ("theory", "k-means code-books, and NF4 from the normal distribution"),
    "packing": ("theory", "codes in words: aligned and dense"),
    "accumulators": ("theory", "int32 sums: the bound, and a real overflow"),
    "snr": ("signal_topics", "signal-to-noise ratio against bits: 6 dB a bit, measured"),
    "noise": ("signal_topics", "quantization noise e(n): uniform or not, and dither"),
    "networks": ("experiments", "iris, wine, breast cancer, digits: accuracy and calibration by scheme"),
    "activations": ("experiments", "calibrated activations and integer products"),
    "pruning": ("pillars", "single weights and whole units"),
    "distillation": ("pillars", "small students of larger teachers"),
    "pillars": ("pillars", "quantization, pruning and distillation together"),
    "memory": ("memory_topic", "the memory calculator: 1 to 70 B, inference to QLoRA, devices"),
}
"""Name → module, what it is about."""


def find(topic: str, seed: int, datasets: Sequence[str] = ()) -> Finding:
    """Run one topic; the same seed gives the same figures on the same machine.

    Args:
        datasets: What the topic `networks` is run on, if not on its own four; no other topic takes any.

    Raises:
        ConfigError: there is no such topic or set, or a library of the lab's is not installed.
        DataError: a set is on OpenML, and OpenML cannot be reached.
    """
    if topic not in TOPICS:
        raise ConfigError(f"There is no topic {topic!r}; there are {', '.join(TOPICS)}.", run="mlx-qlora lab")
    module = import_module(f"mlx_qlora.lab.{TOPICS[topic][0]}")
    if datasets and topic != "networks":
        raise ConfigError(f"The topic {topic!r} has data of its own.", run="mlx-qlora lab networks --data …")
    options = {"datasets": tuple(datasets)} if datasets else {}
    found: Finding = getattr(module, topic.replace("-", "_"))(seed, **options)
    return found
