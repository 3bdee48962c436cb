"""LoRA on the 16-bit base beside QLoRA in each scheme: the same data, the same seeds, everything measured."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_qlora.config import QuantizationConfig, RunConfig, build_config
from mlx_qlora.dataset.files import find_files
from mlx_qlora.errors import ConfigError, DataError, Interrupted, MlxQloraError, ModelError, listed
from mlx_qlora.inference.comparison import FLOAT_NAMES
from mlx_qlora.inference.comparison_worker import Task
from mlx_qlora.quantization.policy import read_scheme
from mlx_qlora.storage import (
    make_folder,
    plain_json,
    read_json,
    said_clearly,
    sha256_of,
    sweep,
    write_json,
)
from mlx_qlora.studies.training_runs import Told, TrainedVariant, trained, variant_of, weighed
from mlx_qlora.studies.training_worker import BaseFigures
from mlx_qlora.training.report import environment
from mlx_qlora.training.run import with_absolute_paths
from mlx_qlora.weights.source import fingerprint, resolve_model

RESULTS = "comparison.json"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is compared, and how often."""

    config: RunConfig
    """Of every run; its scheme and seed are exchanged."""
    schemes: tuple[str, ...]
    """As quantization.scheme takes them, with a group size if it is another (int4-g32), or `FLOAT_NAMES`."""
    seeds: tuple[int, ...] = (0,)
    repeat: int = 1
    """Each run so often, for its times: all else comes out the same."""
    split: str | None = None
    """Rows that the trained models are asked about; None: the first of test, valid, train that has any."""
    max_rows: int | None = None
    batch_size: int = 4
    generated_tokens: int = 64
    max_questions: int = 100


@dataclass(frozen=True, kw_only=True)
class Row:
    """One scheme: its base, its runs, or why there are none."""

    scheme: str
    base: BaseFigures | None = None
    runs: tuple[TrainedVariant, ...] = ()
    problems: tuple[str, ...] = ()
    """What could not be done, and why; of a run with its seed."""

    @property
    def is_lora(self) -> bool:
        """Whether the base is not quantized for it."""
        return self.scheme in FLOAT_NAMES


@dataclass(frozen=True, kw_only=True)
class TrainingComparison:
    """All schemes, in the order they were asked for."""

    model: str
    """As it was asked for; so is the data."""
    data: str
    seeds: tuple[int, ...]
    repeat: int
    digest: str
    """Of everything the figures depend on but scheme, seed and repeat: settings, weights, rows, versions."""
    rows: tuple[Row, ...]
    environment: dict[str, str] = field(default_factory=environment)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        tree: dict[str, Any] = plain_json(asdict(self))
        return tree


def compare_training(request: Request, output: str | Path, told: Told | None = None) -> TrainingComparison:
    """Train and ask each scheme with each seed, one process after another, and keep all of it in `output`.

    What is finished there already is not done again, and a run that was stopped goes on from its last
    checkpoint, where settings, weights, rows and versions are the same. What fails is a problem of its row,
    and the others go on. `RESULTS` in `output` is written anew after every run.

    Raises:
        ConfigError: a scheme does not exist, or no model or no data is named.
        ModelError: the base is quantized already, or cannot be found.
        DataError: there is no such data, or it cannot be used.
        Interrupted: Ctrl-C; run it again, and it goes on.
    """
    output, told = Path(output).resolve(), told or Told()
    configs = _configs(request)
    digest = _digest(request)
    found = TrainingComparison(
        model=str(request.config.model.path),
        data=str(request.config.data.path),
        seeds=request.seeds,
        repeat=request.repeat,
        digest=digest,
        rows=tuple(Row(scheme=name) for name in configs),
    )
    with _work_folder(output) as work:
        try:
            for row in found.rows:
                found = _replaced(found, _weighed(row, configs[row.scheme], output, digest, work, told))
            # Repeats and seeds outside, schemes inside: what drifts over hours then drifts for all of them.
            for repeat in range(1, request.repeat + 1):
                for seed in request.seeds:
                    for row in found.rows:
                        if row.base is None:
                            continue
                        config = _seeded(configs[row.scheme], seed)
                        folder = output / _folder_name(row.scheme, seed, repeat, digest)
                        task = _task(request, row.base)
                        done = _with_run(row, config, repeat, folder, task, work, told)
                        found = _replaced(found, done)
                        write_json(output / RESULTS, found.as_dict())
        except KeyboardInterrupt:
            raise _interrupted(found, request, 2) from None
        except Interrupted as error:
            raise _interrupted(found, request, error.exit_code - 128) from None
    write_json(output / RESULTS, found.as_dict())
    return found


def _weighed(row: Row, config: RunConfig, output: Path, digest: str, work: Path, told: Told) -> Row:
    try:
        kept = output / f"{row.scheme}-base-{digest[:8]}.json"
        return replace(row, base=weighed(config, row.scheme, kept, work, told))
    except Interrupted:
        raise
    except MlxQloraError as error:
        return replace(row, problems=(error.what,))


def _with_run(
    row: Row, config: RunConfig, repeat: int, folder: Path, task: Task, work: Path, told: Told
) -> Row:
    seed = config.training.seed
    name = f"{row.scheme}, seed {seed}" + (f", time {repeat}" if repeat > 1 else "")
    try:
        run = trained(config, name, repeat, folder, task, work, told)
    except (Interrupted, DataError):  # the rows are everyone's
        raise
    except MlxQloraError as error:
        return replace(row, problems=(*row.problems, f"seed {seed}: {error.what}"))
    problems = (f"seed {seed}: trained, but not asked: {run.problem}",) if run.problem else ()
    return replace(row, runs=(*row.runs, run), problems=(*row.problems, *problems))


def _replaced(found: TrainingComparison, row: Row) -> TrainingComparison:
    return replace(found, rows=tuple(row if old.scheme == row.scheme else old for old in found.rows))


def _configs(request: Request) -> dict[str, RunConfig]:
    """A configuration for each scheme, by its name.

    Raises:
        ConfigError: schemes do not exist (all are listed), none is named, or the base's is not up for choice.
        ModelError: the base is quantized already.
    """
    base = with_absolute_paths(request.config)
    run = "mlx-qlora compare-training --schemes none,int8,int4,nf4 …"
    if base.quantization.bits_per_weight is not None:
        raise ConfigError(
            "bits_per_weight chooses each layer's scheme; here they are compared.",
            where="quantization.bits_per_weight",
            run=run,
        )
    if not request.schemes or not request.seeds:
        raise ConfigError("There is no scheme, or no seed, to compare.", where="--schemes, --seeds", run=run)
    configs, problems = {}, []
    for name in dict.fromkeys(request.schemes):
        try:
            configs[name] = _with_scheme(base, name)
        except ConfigError as error:
            problems.append(error.what)
    if problems:
        raise ConfigError(
            f"{len(problems)} scheme(s) cannot be compared:\n{listed(problems)}", where="--schemes", run=run
        )
    find_files(base.data.path)
    source = resolve_model(str(base.model.path), base.model.revision, base.model.trust_remote_code)
    if source.is_quantized:
        raise ModelError(
            "This model is quantized already; schemes are compared from the checkpoint it was made from.",
            where=str(source.folder),
            run="mlx-qlora compare-training --model OWNER/NAME …   # of 16 or 32 bits",
        )
    return configs


def _with_scheme(base: RunConfig, name: str) -> RunConfig:
    """`base` in one scheme; which layers are left out, and what each override says, stays."""
    if name in FLOAT_NAMES:
        return base.model_copy(update={"quantization": QuantizationConfig(scheme="none")})
    scheme = read_scheme(name, "--schemes")
    if scheme is None:
        return base.model_copy(update={"quantization": QuantizationConfig(scheme="none")})
    keys = {"scheme": scheme.name, "group_size": scheme.group_size, "bits": None, "mode": None}
    return build_config(base.model_dump(mode="json"), {"quantization": keys}, where="--schemes")


def _seeded(config: RunConfig, seed: int) -> RunConfig:
    return config.model_copy(update={"training": config.training.model_copy(update={"seed": seed})})


def _task(request: Request, base: BaseFigures) -> Task:
    data = request.config.data
    return Task(
        folder=base.folder,
        reference="",
        is_reference=True,  # nothing is compared with another model's logits
        data=with_absolute_paths(request.config).data.model_dump(mode="json", exclude={"valid_fraction"})
        | {"packing": False, "max_valid_examples": None, "skip_bad_rows": data.skip_bad_rows},
        split=request.split,
        trust_remote_code=request.config.model.trust_remote_code,
        max_rows=request.max_rows,
        batch_size=request.batch_size,
        generated_tokens=request.generated_tokens,
        max_questions=request.max_questions,
    )


def _digest(request: Request) -> str:
    """Of everything but scheme, seed and repeat. Where files lie does not count, but what is in them."""
    config = with_absolute_paths(request.config)
    tree = config.model_dump(mode="json")
    model = config.model
    tree["model"]["path"] = fingerprint(
        resolve_model(str(model.path), model.revision, model.trust_remote_code).folder
    )
    tree["data"]["path"] = {name: sha256_of(path) for name, path in find_files(str(config.data.path)).items()}
    for key in ("scheme", "bits", "group_size", "mode"):
        del tree["quantization"][key]
    del tree["training"]["seed"]
    asked = {
        name: getattr(request, name)
        for name in ("split", "max_rows", "batch_size", "generated_tokens", "max_questions")
    }
    versions = {name: version(name) for name in ("mlx-qlora", "mlx", "mlx-lm")}
    text = json.dumps([tree, asked, versions, environment()["device"]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _folder_name(scheme: str, seed: int, repeat: int, digest: str) -> str:
    return f"{scheme}-seed{seed}" + (f"-time{repeat}" if repeat > 1 else "") + f"-{digest[:8]}"


def _interrupted(found: TrainingComparison, request: Request, signal_number: int) -> Interrupted:
    done = sum(len(row.runs) for row in found.rows)
    total = len(found.rows) * len(request.seeds) * request.repeat
    return Interrupted(
        f"Stopped. {done} of {total} runs are finished and kept.",
        signal_number=signal_number,
        run="the same command again; it goes on from there",
    )


@contextmanager
def _work_folder(output: Path) -> Iterator[Path]:
    """A folder in `output` for what lasts no longer than a process; those of killed comparisons go now."""
    with said_clearly(output):
        make_folder(output)
        sweep(output)
        with tempfile.TemporaryDirectory(dir=output, prefix=".work-", suffix=".tmp") as folder:
            yield Path(folder)


def read_comparison(path: Path) -> TrainingComparison:
    """What `compare_training` left in `RESULTS`, or printed as JSON.

    Raises:
        ConfigError: it is no such file.
    """
    try:
        tree = read_json(path)
        rows = tuple(
            Row(
                scheme=row["scheme"],
                base=BaseFigures(**row["base"]) if row["base"] else None,
                runs=tuple(variant_of(run) for run in row["runs"]),
                problems=tuple(row["problems"]),
            )
            for row in tree["rows"]
        )
        return TrainingComparison(**{**tree, "seeds": tuple(tree["seeds"]), "rows": rows})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"This is no comparison of training runs ({type(error).__name__}: {error}).",
            where=str(path),
            run="mlx-qlora compare-training … --json > FILE",
        ) from None


def schemes_of(names: Sequence[str]) -> tuple[str, ...]:
    """Names as they were asked for, each once."""
    return tuple(dict.fromkeys(name.strip() for name in names if name.strip()))
