"""What several ranks are asked together, and what each of them says of itself at the end."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mlx_qlora.config import QuantizationConfig
from mlx_qlora.errors import AdapterError
from mlx_qlora.inference.generate import Sampling
from mlx_qlora.inference.sharded import AUTO, FUSE
from mlx_qlora.inference.sharded_links import Message
from mlx_qlora.lora.adapter import read_adapter_info
from mlx_qlora.weights.source import resolve_adapter


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked, of what model; every rank is told all of it. See `load_assistant`."""

    messages: Sequence[dict[str, str]]
    model: str | None = None
    adapter_path: str | Path | None = None
    quantization: QuantizationConfig | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    system: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    sharding: str = AUTO

    def message(self) -> Message:
        """As it is sent: folders by their whole paths, and one seed from which all ranks draw.

        Raises:
            AdapterError: there is no adapter, or it is one that reads whole weights.
        """
        sampling = asdict(self.sampling)
        if sampling["seed"] is None:
            sampling["seed"] = secrets.randbelow(2**31)
        adapter = resolve_adapter(self.adapter_path).resolve() if self.adapter_path is not None else None
        if adapter is not None:
            _check_adapter(adapter)
        model = self.model
        if model is not None and Path(model).expanduser().exists():
            model = str(Path(model).expanduser().resolve())
        return {
            "messages": list(self.messages),
            "options": {
                "model": model,
                "adapter_path": str(adapter) if adapter is not None else None,
                "revision": self.revision,
                "trust_remote_code": self.trust_remote_code,
            },
            "quantization": self.quantization.model_dump(mode="json") if self.quantization else None,
            "system": self.system,
            "sampling": sampling,
            "sharding": self.sharding,
        }


def _check_adapter(folder: Path) -> None:
    """Before any rank reads every layer to know its lengths."""
    if read_adapter_info(folder).lora.variant == "dora":
        raise AdapterError(
            "DoRA needs the length of whole rows, and cannot be spread over ranks.",
            where=str(folder),
            run=FUSE.replace(" A ", f" {folder} "),
        )


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What one rank had to hold."""

    rank: int
    sharding: str
    """tensor or pipeline."""
    weights_bytes: int
    """Of MLX's active memory when its part was read."""
    peak_memory_bytes: int
    """The most MLX held from the first weight to the last token; excludes its cache."""
