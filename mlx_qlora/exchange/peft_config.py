"""PEFT's adapter_config.json: what of it an adapter here can be, and how ours is written in its words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from mlx_qlora.config import LoraConfig
from mlx_qlora.errors import AdapterError, listed
from mlx_qlora.lora.attach import layer_index
from mlx_qlora.storage import read_json

PEFT_CONFIG = "adapter_config.json"

_FREE = {
    "auto_mapping",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "runtime_config",
}
"""Keys that say how an adapter was made or where it runs, or that another key switches on."""

_UNUSED: tuple[Any, ...] = (None, False, "", "none", {}, [])
"""Values with which PEFT says that a part of it is not used."""

_OWN_BASE = ("pissa", "loftq", "olora", "corda", "lora_ga")
"""Ways to begin that change the base weights too, unless PEFT converted the adapter when it saved it."""


class PeftConfig(BaseModel):
    """The keys of PEFT's LoraConfig that are understood here; `refusals` names what else is set.

    Source: peft 0.21, peft.LoraConfig.
    """

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False, protected_namespaces=())

    peft_type: str
    """LORA; no other is understood."""
    task_type: str | None = None
    """CAUSAL_LM or nothing."""
    base_model_name_or_path: str | None = None
    """As it was given to transformers."""
    revision: str | None = None
    """Of the base model."""
    r: PositiveInt = 8
    """The rank."""
    lora_alpha: PositiveFloat = 8
    """Numerator of the scale."""
    lora_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """In training."""
    use_rslora: bool = False
    """The scale is alpha / √r."""
    use_dora: bool = False
    """Row lengths are trained too."""
    init_lora_weights: bool | str | None = True
    """How the matrices began."""
    target_modules: tuple[str, ...] | str | None = None
    """Names, a regular expression, or all-linear."""
    exclude_modules: tuple[str, ...] | str | None = None
    """Names or a regular expression of what is left out."""
    layers_to_transform: tuple[int, ...] | int | None = None
    """Indices of the blocks that have an update."""
    layers_pattern: tuple[str, ...] | str | None = None
    """What the list of blocks is called."""

    @property
    def variant(self) -> str:
        """The value of ``lora.variant`` here."""
        return "dora" if self.use_dora else "rslora" if self.use_rslora else "lora"

    def refusals(self) -> list[str]:
        """What this adapter is that an adapter here cannot be: ``key = value: why``."""
        problems = []
        if self.peft_type != "LORA":
            problems.append(f"peft_type = {self.peft_type!r}: only LORA can be brought over")
        if self.task_type not in (None, "CAUSAL_LM"):
            problems.append(f"task_type = {self.task_type!r}: only CAUSAL_LM can be brought over")
        if self.use_dora and self.use_rslora:
            problems.append("use_rslora = true with use_dora = true: one variant at a time")
        if str(self.init_lora_weights).lower().startswith(_OWN_BASE):
            problems.append(
                f"init_lora_weights = {self.init_lora_weights!r}: the base was changed too; let PEFT convert "
                "it: save_pretrained(…, path_initial_model_for_weight_conversion=…)"
            )
        problems += [
            f"{key} = {value!r}"
            for key, value in (self.model_extra or {}).items()
            if key not in _FREE and value not in _UNUSED
        ]
        return problems

    def named_paths(self, paths: Iterable[str]) -> list[str] | None:
        """Those of `paths` that PEFT would put an update on; None where a pattern would have to be run."""
        if self.target_modules is None or isinstance(self.target_modules, str):
            return None  # a regular expression of a stranger's may run for ever
        if isinstance(self.exclude_modules, str):
            return None
        left_out = self.exclude_modules or ()
        chosen = self.layers_to_transform
        blocks = {chosen} if isinstance(chosen, int) else set(chosen or ())
        return [
            path
            for path in paths
            if _is_named(path, self.target_modules)
            and not _is_named(path, left_out)
            and (not blocks or layer_index(path) in blocks)
        ]


def read_peft_config(folder: Path) -> PeftConfig:
    """The configuration of a PEFT adapter.

    Raises:
        AdapterError: it is missing or broken, or it is one of another tool.
    """
    path = folder / PEFT_CONFIG
    try:
        tree = read_json(path)
        if isinstance(tree, dict) and "fine_tune_type" in tree and "peft_type" not in tree:
            raise AdapterError(
                "This adapter is in mlx-lm's format already; there is nothing to import.",
                where=str(path),
                run=f"mlx-qlora export-peft {folder} --output DIR   # the other way",
            )
        return PeftConfig.model_validate(tree)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, each['loc'])) or 'it'}: {each['msg']}" for each in error.errors()]
        raise AdapterError(
            f"The PEFT configuration is broken:\n{listed(problems)}", where=str(path)
        ) from None
    except OSError as error:
        raise AdapterError(
            f"There is no PEFT adapter here: {error.strerror or error}.",
            where=str(path),
            run="mlx-qlora import-peft FOLDER --output A   # FOLDER holds adapter_config.json",
        ) from None
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"The PEFT configuration is no JSON: {error}", where=str(path)) from None


def peft_config(
    lora: LoraConfig, base: str | None, revision: str | None, paths: Sequence[str], all_paths: Sequence[str]
) -> dict[str, Any]:
    """adapter_config.json for PEFT.

    Args:
        base: Hub id or folder of the model that PEFT shall put the adapter on.
        paths: Of the layers that have an update.
        all_paths: Of all layers that could have one: short names are written where they mean the same.
    """
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "revision": revision,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.variant == "rslora",
        "use_dora": lora.variant == "dora",
        "bias": "none",
        "lora_bias": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        **_targets(paths, all_paths),
        "exclude_modules": None,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layer_replication": None,
        "target_parameters": None,
        "trainable_token_indices": None,
        "use_qalora": False,
    }


def _targets(paths: Sequence[str], all_paths: Sequence[str]) -> dict[str, Any]:
    """``target_modules`` and ``layers_to_transform`` that mean exactly `paths`, short where they can be."""
    names = sorted({path.rpartition(".")[2] for path in paths})
    blocks = sorted({index for path in paths if (index := layer_index(path)) is not None})
    containers = {match.group(1) for path in paths if (match := re.search(r"([^.]+)\.\d+\.", path))}
    pattern = containers.pop() if len(containers) == 1 else None
    for layers, own_pattern in ((None, None), (blocks, pattern)):
        short: dict[str, Any] = {"target_modules": names, "layers_to_transform": layers}
        short["layers_pattern"] = own_pattern
        meant = PeftConfig(peft_type="LORA", **short).named_paths(all_paths)
        if meant is not None and set(meant) == set(paths):
            return short
    return {"target_modules": sorted(paths), "layers_to_transform": None, "layers_pattern": None}


def _is_named(path: str, names: Sequence[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)
