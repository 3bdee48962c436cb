"""The topic on memory: the course's table, then what inference and training take besides."""

from __future__ import annotations

from typing import Any

from mlx_qlora.lab.calculator import (
    COURSE_BILLIONS,
    FORMAT_BITS,
    MODELS,
    adam_bytes,
    devices,
    lora_plan,
    num_devices,
    stored_bytes,
    weight_bytes,
)
from mlx_qlora.lab.finding import Finding, Table
from mlx_qlora.memory.plan import GIB, mac_budget

CONTEXT, ROW = 4096, 512


def memory(seed: int) -> Finding:  # noqa: ARG001  # nothing is drawn
    """Weights by format, then inference, training by Adam, LoRA and QLoRA, and devices for each."""
    course = [
        (f"{billions} B", *(weight_bytes(billions * 10**9, name) / 1e9 for name in FORMAT_BITS))
        for billions in COURSE_BILLIONS
    ]
    budget = mac_budget(64 * GIB)
    uses: list[tuple[Any, ...]] = []
    for shape in MODELS:
        cache = shape.kv_cache_bytes(CONTEXT)
        for name, num_bytes in (
            ("inference, 16 bits", stored_bytes(shape, None) + cache),
            ("inference, int4", stored_bytes(shape, "int4") + cache),
            ("training, Adam", adam_bytes(shape.num_parameters)),
            ("LoRA, 16 bits", lora_plan(shape, None, budget, num_tokens=ROW).needed_bytes),
            ("QLoRA, int4", lora_plan(shape, "int4", budget, num_tokens=ROW).needed_bytes),
        ):
            uses.append((shape.name, name, num_bytes / GIB, *(num_devices(num_bytes, d) for d in devices())))
    shapes = [
        (shape.name, shape.num_parameters, stored_bytes(shape, "int4") / GIB,
         8 * stored_bytes(shape, "int4") / shape.num_parameters,
         shape.kv_cache_bytes(1) / 1024, shape.kv_cache_bytes(CONTEXT) / GIB)
        for shape in MODELS
    ]  # fmt: skip
    by_use = {row[:2]: row for row in uses}
    seven, seventy = MODELS[1].name, MODELS[3].name
    return Finding(
        "memory",
        "The memory calculator",
        [
            Table(
                "Weights alone, GB of 10⁹ bytes",
                ("parameters", *FORMAT_BITS),
                course,
                ("", *(".1f",) * len(FORMAT_BITS)),
            ),
            Table(
                f"Known models: stored as int4 in groups of 64, and the cache of {CONTEXT} tokens in 16 bits",
                ("model", "parameters", "int4, GiB", "bits per weight", "cache per token, KiB", "cache, GiB"),
                shapes,
                ("", ",d", ".2f", ".2f", ".0f", ".2f"),
            ),
            Table(
                f"By use, and devices needed; LoRA of rank 8 on q, k, v with one row of {ROW} tokens",
                ("model", "use", "GiB", *(device.name for device in devices())),
                uses,
                ("", "", ".1f"),
            ),
        ],
        [
            f"{seven}: {by_use[seven, 'training, Adam'][2]:.0f} GiB to train all of it, "
            f"{by_use[seven, 'LoRA, 16 bits'][2]:.1f} by LoRA, "
            f"{by_use[seven, 'QLoRA, int4'][2]:.1f} by QLoRA.",
            f"{seventy}: {by_use[seventy, 'training, Adam'][6]} GPUs of 80 GB to train all of it, "
            f"{by_use[seventy, 'QLoRA, int4'][6]} by QLoRA.",
            "Activations are left out of Adam's line; in LoRA's they are predicted as by `mlx-qlora plan`, "
            "with scores and logits counted whole.",
        ],
        {"context": CONTEXT},
    )
