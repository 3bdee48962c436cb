"""The memory calculator: weights, inference, training, LoRA and QLoRA of known models, and devices for them.

Weights, caches and optimizer state follow from shapes and are exact. LoRA and QLoRA are what
`memory.plan.plan_memory` predicts; ``mlx-qlora plan`` does the same for a model's own config.json and a run's
own settings.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_qlora.errors import ConfigError
from mlx_qlora.memory.plan import GIB, Budget, Plan, Step, Workload, mac_budget, parse_memory, plan_memory
from mlx_qlora.quantization.schemes import SCHEMES

FORMAT_BITS = {"FP32": 32, "FP16": 16, "BF16": 16, "INT8": 8, "INT4": 4}
"""Bits of the number alone; `Scheme.bits_per_weight` counts scales too."""
COURSE_BILLIONS = (1, 7, 13, 70)
ADAM_BYTES_PER_PARAMETER = 16
"""Weight, gradient and Adam's two moments in float32; in mixed precision it is 2 + 2 + 4 + 4 + 4, as much.
Source: Rajbhandari et al. 2020 (ZeRO), arXiv:1910.02054, section 3.1."""


@dataclass(frozen=True)
class ModelShape:
    """A decoder of Llama's kind: what its size follows from."""

    name: str
    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    vocabulary: int

    @property
    def kv_width(self) -> int:
        """Features of the keys of one token in one layer."""
        return self.hidden // self.num_heads * self.num_kv_heads

    @property
    def linear_parameters(self) -> int:
        """Of the layers' matrices and the head: what is quantized beside the embedding."""
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_width
        layer = attention + 3 * self.hidden * self.intermediate
        return self.num_layers * layer + self.vocabulary * self.hidden

    @property
    def num_parameters(self) -> int:
        """All of them: an embedding, a head of its own, and two norms a layer."""
        norms = (2 * self.num_layers + 1) * self.hidden
        return self.linear_parameters + self.vocabulary * self.hidden + norms

    def kv_cache_bytes(self, num_tokens: int, num_sequences: int = 1, bits: int = 16) -> int:
        """Keys and values of every layer: 2 · layers · kv width · tokens · sequences · bytes."""
        values = 2 * self.num_layers * self.kv_width * num_tokens * num_sequences
        return values * bits // 8


MODELS = (
    ModelShape("TinyLlama 1.1B", 22, 2048, 5632, 32, 4, 32000),
    ModelShape("Llama 2 7B", 32, 4096, 11008, 32, 32, 32000),
    ModelShape("Llama 2 13B", 40, 5120, 13824, 40, 40, 32000),
    ModelShape("Llama 2 70B", 80, 8192, 28672, 64, 8, 32000),
)
"""Sources: the models' config.json."""


@dataclass(frozen=True)
class Device:
    """What a model can be put on."""

    name: str
    usable_bytes: int


def devices() -> tuple[Device, ...]:
    """Macs by what their GPU may use, and two sizes of GPU with all they have."""
    macs = [Device(f"Mac {size}", mac_budget(parse_memory(size)).num_bytes) for size in ("16GB", "64GB")]
    return (*macs, Device("GPU 24 GB", 24 * GIB), Device("GPU 80 GB", 80 * GIB))


def num_devices(num_bytes: int, device: Device) -> int:
    """Devices that hold so much, were it to be split evenly and at no cost."""
    return -(-num_bytes // device.usable_bytes)


def weight_bytes(num_parameters: int, number_format: str) -> int:
    """Bytes of so many numbers of a format, without scales.

    Raises:
        ConfigError: there is no such format.
    """
    if number_format not in FORMAT_BITS:
        raise ConfigError(f"{number_format!r} is none of {', '.join(FORMAT_BITS)}.", where="format")
    return num_parameters * FORMAT_BITS[number_format] // 8


def stored_bytes(shape: ModelShape, scheme: str | None) -> int:
    """Bytes of a model whose matrices have a scheme of ours, and its norms 16 bits; None: all have 16.

    Raises:
        KeyError: there is no such scheme.
    """
    matrices = shape.linear_parameters + shape.vocabulary * shape.hidden
    norms = shape.num_parameters - matrices
    return (2 * matrices if scheme is None else SCHEMES[scheme].stored_bytes(matrices)) + 2 * norms


def adam_bytes(num_parameters: int) -> int:
    """Full training by Adam, activations left out."""
    return ADAM_BYTES_PER_PARAMETER * num_parameters


def lora_parameters(shape: ModelShape, rank: int) -> int:
    """Trained numbers with adapters on the queries, keys and values of every layer."""
    widths = (shape.hidden, shape.kv_width, shape.kv_width)
    return shape.num_layers * sum(rank * (shape.hidden + width) for width in widths)


def lora_plan(
    shape: ModelShape, scheme: str | None, budget: Budget, *, num_tokens: int = 512, rank: int = 8
) -> Plan:
    """Predicted memory of LoRA on a frozen base: 16 bits with scheme None (LoRA), else quantized (QLoRA).

    One row of `num_tokens`, layers recomputed in the backward pass, activations and adapters in 16 bits.
    Attention scores and logits are counted whole, which training makes in pieces: an upper bound.
    """
    trained = 2 * lora_parameters(shape, rank)
    outputs = 2 * shape.hidden + 2 * shape.kv_width + 2 * shape.intermediate + shape.hidden
    feature = 2 * num_tokens
    step = Step(
        num_layers=shape.num_layers,
        is_checkpointed=True,
        hidden=feature * shape.hidden,
        outputs=feature * outputs,
        adapter_inputs=feature * shape.hidden,
        dropped_inputs=0,
        scores=4 * shape.num_heads * num_tokens**2,
        are_scores_kept=False,
        logits=4 * num_tokens * shape.vocabulary,
        is_head_plain=True,
        head=0,
        head_float32=4 * shape.vocabulary * shape.hidden,
        unpacked=0,
    )
    work = Workload(
        weights_bytes=stored_bytes(shape, scheme),
        lora_bytes=trained,
        optimizer_bytes=2 * trained,
        step=step,
        num_layers=shape.num_layers,
        num_micro_batches=1,
    )
    return plan_memory(work, budget)
