"""From a hub id or a path, of a folder or of a GGUF file, to a folder that holds a model we can read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mlx_qlora.errors import ModelError
from mlx_qlora.storage import cache_root
from mlx_qlora.weights.links import check_links
from mlx_qlora.weights.shards import TensorInfo, read_checkpoint

PATTERNS = [
    "*.json",
    "model*.safetensors",
    "tokenizer.model",
    "*.tiktoken",
    "*.txt",
    "*.jinja",
    "README.md",
]
"""What is fetched from the hub: never pickle, and code only when it is trusted. README.md names the licence,
which a card of ours hands on."""

ADAPTER_PATTERNS = ["adapters.safetensors", "adapter_config.json"]

_SAMPLE_BYTES = 4096
MOST_LAYERS = 10_000
_COUNT = re.compile(r"(layers?|blocks|experts|depth)$")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class ModelSource:
    """A model folder on this machine."""

    folder: Path
    name: str
    """Hub id or absolute path, of the folder or of the GGUF file it was made from."""
    revision: str | None
    config: dict[str, Any]
    """Its config.json."""

    @property
    def is_quantized(self) -> bool:
        """Whether the weights are stored in a quantized format already."""
        text = self.config.get("text_config")
        configs = [self.config, text] if isinstance(text, dict) else [self.config]
        named = any(config.get(key) for config in configs for key in ("quantization", "quantization_config"))
        return named or (self.folder / "hf_quant_config.json").is_file()  # NVIDIA ModelOpt's


def resolve_model(
    model: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    *,
    needs_weights: bool = True,
    on_bytes: Callable[[int, int], None] | None = None,
) -> ModelSource:
    """The folder of a model, fetched from the hub when `model` is no folder.

    A GGUF file, ``path/to/file.gguf`` or ``OWNER/NAME:file.gguf`` on the hub, is imported into the user's
    cache the first time, and is a folder like any other from then on.

    Args:
        on_bytes: Called with (bytes read, bytes to read) while a GGUF file is imported.
        needs_weights: Without them the configuration is enough, and only small files are fetched.

    Raises:
        ModelError: not found, not allowed, of an unknown architecture, in need of its own code, or
            without safetensors; or it has a link to somebody else's file.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        folder, name = path.resolve(), str(path.resolve())
    elif path.suffix == ".gguf":
        folder, name = _from_gguf(model, revision, on_bytes)
    elif path.is_file() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ModelError(
            "There is no model folder here.",
            where=model,
            run="mlx-qlora quantize OWNER/NAME …   # a hub id, or a folder that is there",
        )
    else:
        folder, name = _from_hub(model, revision, trust_remote_code, needs_weights), model
    check_links(folder)
    config = _read_config(folder)
    _check_size(config, folder)
    _check_code(config, folder, trust_remote_code)
    _check_architecture(config, folder)
    if needs_weights:
        _check_weights(folder)
    return ModelSource(folder, name, revision, config)


def resolve_adapter(adapter: str | Path, revision: str | None = None) -> Path:
    """The folder of an adapter, fetched from the hub when `adapter` is no folder but OWNER/NAME.

    What is no hub id is given back as it is: whoever reads it says what is missing there.

    Raises:
        ModelError: the hub has no such repository, or cannot be reached.
    """
    name, folder = str(adapter), Path(adapter).expanduser()
    if folder.exists() or folder.parent.is_dir() or not _REPOSITORY.fullmatch(name):
        return folder
    from huggingface_hub import snapshot_download

    with _hub_errors_said(name, f"hf download {name}"):
        return Path(snapshot_download(name, revision=revision, allow_patterns=ADAPTER_PATTERNS))


def resolve_gguf(model: str, revision: str | None = None) -> tuple[Path, str]:
    """A GGUF file and its name; it is fetched from the hub when `model` is ``OWNER/NAME:file.gguf``.

    Raises:
        ModelError: there is no such file.
    """
    path = Path(model).expanduser()
    if path.is_file():
        return path.resolve(), str(path.resolve())
    repository, _, file = model.partition(":")
    if file and _REPOSITORY.fullmatch(repository):
        return _file_from_hub(repository, file, revision), model
    raise ModelError(
        "There is no GGUF file here.",
        where=model,
        run="mlx-qlora train --model OWNER/NAME:FILE.gguf …   # one on the hub",
    )


def fingerprint(folder: Path) -> str:
    """Digest of a checkpoint's tensors: name, type, shape, first and last 4 KiB of each.

    It does not depend on how tensors are spread over files, and reads a few megabytes at most.
    """
    digest = hashlib.sha256()
    for name, info in sorted(read_checkpoint(folder).items()):
        digest.update(f"{name} {info.dtype} {list(info.shape)}\n".encode())
        digest.update(_sample(info))
    return f"sha256:{digest.hexdigest()}"


def _sample(info: TensorInfo) -> bytes:
    with info.file.open("rb") as file:
        file.seek(info.start)
        first = file.read(min(_SAMPLE_BYTES, info.num_bytes))
        file.seek(info.start + max(0, info.num_bytes - _SAMPLE_BYTES))
        return first + file.read(min(_SAMPLE_BYTES, info.num_bytes))


def _from_gguf(
    model: str, revision: str | None, on_bytes: Callable[[int, int], None] | None
) -> tuple[Path, str]:
    """The folder in the cache that a GGUF file was imported to, and the model's name."""
    from mlx_qlora.weights.gguf import import_gguf, is_imported

    path, name = resolve_gguf(model, revision)
    state = path.stat()
    key = repr([name, revision, state.st_size, state.st_mtime_ns])
    short = hashlib.sha256(key.encode()).hexdigest()[:12]
    folder = cache_root() / f"{path.stem}-gguf-{short}"
    if not is_imported(folder):
        import_gguf(path, folder, on_bytes, name=name, replace_damaged=True)
    return folder, name


def _file_from_hub(repository: str, file: str, revision: str | None) -> Path:
    from huggingface_hub import errors, hf_hub_download

    where = f"{repository}:{file}" + (f" (revision {revision})" if revision else "")
    with _hub_errors_said(where, f"hf download {repository} {file}"):
        try:
            return Path(hf_hub_download(repository, file, revision=revision))
        except errors.RemoteEntryNotFoundError:
            raise ModelError("The model has no such file.", where=where) from None


def _from_hub(model: str, revision: str | None, trust_remote_code: bool, needs_weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*PATTERNS, "*.py"] if trust_remote_code else [*PATTERNS]
    if not needs_weights:
        patterns = [pattern for pattern in patterns if not pattern.endswith(".safetensors")]
    where = model + (f" (revision {revision})" if revision else "")
    with _hub_errors_said(where, f"hf download {model}"):
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))


@contextmanager
def _hub_errors_said(where: str, fetch: str) -> Iterator[None]:
    """Turn what the hub's client raises into a ModelError with the next step to take."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise ModelError(
            "The model's owner asks for an agreement first: accept it on the model's page, then sign in.",
            where=where,
            run="hf auth login",
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise ModelError(
            "There is no such model on the hub, and no such folder here.",
            where=where,
            run="hf auth login   # if the model is private",
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelError("The model has no such revision.", where=where) from None
    except (
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
        errors.HfHubHTTPError,
        OSError,
    ) as error:
        raise ModelError(
            f"The model is not in the cache and the hub cannot be reached ({type(error).__name__}).",
            where=where,
            run=f"{fetch}   # with a connection, and without HF_HUB_OFFLINE",
        ) from None


def _read_config(folder: Path) -> dict[str, Any]:
    from mlx_lm.utils import load_config

    path = folder / "config.json"
    try:
        config = load_config(folder)  # with the end-of-text tokens of generation_config.json
    except OSError:
        raise ModelError("This folder holds no model: there is no config.json.", where=str(folder)) from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"The model's config.json is broken: {error}", where=str(path)) from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError("config.json does not say which architecture this is (model_type).", where=str(path))
    return config


def _check_size(config: dict[str, Any], folder: Path) -> None:
    """Layers and experts are built one by one, before a single tensor is read."""
    text = config.get("text_config")
    for tree in (config, text if isinstance(text, dict) else {}):
        for key, value in tree.items():
            if _COUNT.search(key) and isinstance(value, int) and value > MOST_LAYERS:
                raise ModelError(
                    f"{key} is {value}: no model has so many.", where=str(folder / "config.json")
                )


def _check_code(config: dict[str, Any], folder: Path, trust_remote_code: bool) -> None:
    brings_code = config.get("model_file") is not None or ("auto_map" in config and not _is_known(config))
    if brings_code and not trust_remote_code:
        raise ModelError(
            "This model brings its own Python code, which is not run unless you trust it.",
            where=str(folder / "config.json"),
            run="the same command with --trust-remote-code, if you do",
        )


def _check_architecture(config: dict[str, Any], folder: Path) -> None:
    if _is_known(config) or config.get("model_file") is not None:
        return
    near = get_close_matches(config["model_type"], _architectures(), n=3, cutoff=0.5)
    hint = f" Near it are {', '.join(near)}." if near else ""
    raise ModelError(
        f"The architecture {config['model_type']!r} is not known to mlx-lm.{hint}",
        where=str(folder / "config.json"),
        run="pip install -U mlx-lm   # if the model is newer than your mlx-lm",
    )


def _is_known(config: dict[str, Any]) -> bool:
    return config["model_type"] in _architectures()


def _architectures() -> list[str]:
    import pkgutil

    import mlx_lm.models
    from mlx_lm.utils import MODEL_ARCHITECTURE_REMAPPING, MODEL_REMAPPING

    modules = [module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)]
    return [*MODEL_REMAPPING, *(name for name, _ in MODEL_ARCHITECTURE_REMAPPING), *modules]


def _check_weights(folder: Path) -> None:
    if any(folder.glob("model*.safetensors")):
        return
    pickled = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)]
    if pickled:
        raise ModelError(
            f"The weights are pickled ({pickled[0]}), which can run code and is never read.",
            where=str(folder),
            run="convert them to safetensors first: https://huggingface.co/spaces/safetensors/convert",
        )
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise ModelError(f"There are no weights (model*.safetensors) here; there is {there}.", where=str(folder))
