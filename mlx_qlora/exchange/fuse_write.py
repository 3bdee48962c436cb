"""The folder of a fused model: layer by layer, with where it comes from, published by one rename."""

from __future__ import annotations

import glob
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_qlora.dataset.render import template_of
from mlx_qlora.errors import StorageError
from mlx_qlora.exchange.fuse_base import FuseBase
from mlx_qlora.exchange.fuse_plan import FuseFormat
from mlx_qlora.exchange.fuse_report import FuseLoss
from mlx_qlora.lora.adapter import CONFIG, WEIGHTS, AdapterInfo
from mlx_qlora.storage import new_folder, plain_json, sha256_of, write_json, write_text
from mlx_qlora.weights.output_folder import MANIFEST, copy_small_files
from mlx_qlora.weights.plan import QuantizationPlan
from mlx_qlora.weights.shards import INDEX
from mlx_qlora.weights.stream import SPARE_BYTES, OnBytes, write_shard
from mlx_qlora.weights.tokenizer import read_tokenizer

FORMAT_VERSION = 1
TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class Fusing:
    """What one fusing is put together from."""

    base: FuseBase
    adapter_path: Path
    info: AdapterInfo
    form: FuseFormat


def write_fused(
    fusing: Fusing, plan: QuantizationPlan, output: Path, loss: FuseLoss, on_bytes: OnBytes | None
) -> None:
    """Write the folder; it has its name when it is whole.

    Args:
        on_bytes: Called with (bytes written, bytes to write).

    Raises:
        StorageError: the disk is full, or gone.
    """
    from mlx_lm.utils import _encode_tagged_floats

    with new_folder(output) as folder:
        shards: dict[str, Any] = {}
        done = 0
        for index, jobs in enumerate(plan.shards):

            def on_read(read: int, before: int = done) -> None:
                if on_bytes is not None:
                    on_bytes(before + read, plan.output_bytes)

            shard = folder / plan.shard_name(index)
            write_shard(shard, jobs, on_read)
            shards[shard.name] = {"bytes": shard.stat().st_size, "sha256": sha256_of(shard)}
            done += sum(job.num_bytes for job in jobs)
        write_json(folder / "config.json", _encode_tagged_floats(plan.config))
        weight_map = {
            job.name: plan.shard_name(index) for index, jobs in enumerate(plan.shards) for job in jobs
        }
        metadata = {"total_size": plan.output_bytes, "total_parameters": plan.num_parameters}
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map})
        copied = [path.name for path in copy_small_files(fusing.base.folder, folder)]
        if template_of(read_tokenizer(fusing.base.folder)) != fusing.info.chat_template:
            write_text(folder / TEMPLATE, fusing.info.chat_template)
            copied = sorted({*copied, TEMPLATE})
        files = {name: sha256_of(folder / name) for name in ("config.json", INDEX, *copied)}
        write_json(folder / MANIFEST, {**_manifest(fusing, plan, loss), "shards": shards, "files": files})


def _manifest(fusing: Fusing, plan: QuantizationPlan, loss: FuseLoss) -> dict[str, Any]:
    """Where the weights come from. Without a ``source_fingerprint``: no adapter of the base belongs here."""
    base, info = fusing.base, fusing.info
    return {
        "format_version": FORMAT_VERSION,
        "kind": "fused",
        "source": base.source.name,
        "revision": base.source.revision,
        "base_fingerprint": base.fingerprint,
        "base_quantization": info.quantization.model_dump(mode="json"),
        "adapter": {
            "path": str(fusing.adapter_path),
            "weights_sha256": sha256_of(fusing.adapter_path / WEIGHTS),
            "config_sha256": sha256_of(fusing.adapter_path / CONFIG),
            "lora": info.lora.model_dump(mode="json"),
            "system_prompt": info.system_prompt,
        },
        "scheme": plan.config.get("quantization"),
        "loss": plain_json(loss.as_dict()),
        "finished": True,
    }


def check_free_name(output: Path) -> None:
    """Raise StorageError if there is something under the output's name."""
    if output.exists():
        raise StorageError(
            "There is something here already; nothing was touched.",
            where=str(output),
            run="choose another --output, or remove this one",
        )


def check_room(plan: QuantizationPlan, output: Path) -> None:
    """Raise StorageError if the disk has no room for all that is planned."""
    there = next(folder for folder in output.parents if folder.is_dir())
    free, needed = shutil.disk_usage(there).free, plan.output_bytes + SPARE_BYTES
    if free < needed:
        raise StorageError(
            f"The disk has {free / 1e9:.2f} GB free, and {needed / 1e9:.2f} GB are needed.",
            where=str(output),
            run="make room, or choose another --output; then run the same command again",
        )


def sweep(output: Path) -> None:
    """Remove what a killed run of the same output left; the caller holds its lock."""
    for left_over in output.parent.glob(f".{glob.escape(output.name)}.*.tmp"):
        shutil.rmtree(left_over, ignore_errors=True)
