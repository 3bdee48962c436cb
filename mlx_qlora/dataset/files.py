"""Which file is which split: a folder, a single file, or a data set on the hub."""

from __future__ import annotations

from pathlib import Path

from mlx_qlora.dataset.rows import SUFFIXES
from mlx_qlora.errors import ConfigError, DataError

SPLITS = {
    "train": ("train",),
    "valid": ("valid", "validation", "val", "dev"),
    "test": ("test",),
}
"""Each split's file names, without suffix."""


def find_files(place: str | None) -> dict[str, Path]:
    """The file of each split that there is; train is always among them.

    Raises:
        ConfigError: no place was named.
        DataError: there is no such place, or no data in it.
    """
    if place is None:
        raise ConfigError("There is no data.", run="mlx-qlora train --data D …")
    path = Path(place).expanduser()
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(f"A data file ends in {', '.join(SUFFIXES)}.", where=str(path))
        return {"train": path}
    if path.is_dir():
        return _in_folder(path)
    looks_local = path.suffix.lower() in (*SUFFIXES, ".txt", ".parquet") or place.startswith((".", "/", "~"))
    if looks_local or place.count("/") != 1:
        raise DataError("There is no such file or folder.", where=place)
    return _in_folder(_from_hub(place))


def _in_folder(folder: Path) -> dict[str, Path]:
    files = {name: file for name in SPLITS if (file := _split_file(folder, name)) is not None}
    if "train" in files:
        return files
    others = _data_files(folder)
    if not files and len(others) == 1:
        return {"train": others[0]}
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise DataError(f"There is no train.jsonl or train.csv here; there is {there}.", where=str(folder))


def _split_file(folder: Path, split: str) -> Path | None:
    names = [f"{name}{suffix}" for name in SPLITS[split] for suffix in SUFFIXES]
    places = (place / name for place in (folder, folder / "data") for name in names)
    return next((path for path in places if path.is_file()), None)


def _data_files(folder: Path) -> list[Path]:
    places = [place for place in (folder, folder / "data") if place.is_dir()]
    return sorted(
        path
        for place in places
        for path in place.iterdir()
        if path.is_file() and path.suffix.lower() in SUFFIXES and path.name != "dataset_infos.json"
    )


def _from_hub(name: str) -> Path:
    from huggingface_hub import errors, snapshot_download

    patterns = [f"{folder}*{suffix}" for folder in ("", "data/") for suffix in SUFFIXES]
    try:
        folder = Path(snapshot_download(name, repo_type="dataset", allow_patterns=patterns))  # nosec B615
    except (errors.RepositoryNotFoundError, errors.HFValidationError, errors.GatedRepoError):
        raise DataError(
            "There is no such folder here, and no such data set on the hub that you may read.",
            where=name,
            run="hf auth login   # if it is private",
        ) from None
    except (
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
        errors.HfHubHTTPError,
        OSError,
    ) as error:
        raise DataError(
            f"The data set is not in the cache and the hub cannot be reached ({type(error).__name__}).",
            where=name,
            run=f"hf download {name} --repo-type dataset   # with a connection",
        ) from None
    if not _data_files(folder):
        _refuse_other_formats(name)
    return folder


def _refuse_other_formats(name: str) -> None:
    from huggingface_hub import HfApi

    try:
        there = sorted(HfApi().list_repo_files(name, repo_type="dataset"))
    except Exception:  # offline: the cache does not say what else there is
        there = []
    if any(file.endswith(".parquet") for file in there):
        raise DataError(
            "The data set is kept as Parquet, which is not read here; export it to JSON lines first.",
            where=name,
            run='pip install datasets && python -c "from datasets import load_dataset; '
            f"load_dataset('{name}', split='train').to_json('train.jsonl')\"",
        )
    listing = ", ".join(there[:8]) or "nothing known"
    raise DataError(f"The data set has no .jsonl, .csv or .json file; there is {listing}.", where=name)
