"""One configuration tree: the same keys in YAML, in Python, on the command line and in saved adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PlainSerializer,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from mlx_qlora.errors import ConfigError, listed


class Config(BaseModel):
    """Frozen, validated at birth; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class ModelConfig(Config):
    """Which base model, and how it is loaded."""

    path: str | None = None
    """Hub id or folder of the base model."""

    revision: str | None = None
    """Branch, tag or commit on the hub."""

    trust_remote_code: bool = False
    """Allow a model folder to run its own Python code."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of activations and 16-bit weights. auto: the checkpoint's own on a GPU; float32 on the CPU,
    where MLX computes bfloat16 about eight times slower."""

    offload: bool = False
    """Leave decoder layers that do not fit in memory in their files, and read each when it is called: the
    same numbers, slower."""

    offload_budget_gib: PositiveFloat | None = None
    """What the weights may take of memory then; None: 60 % of what this device has left."""


def _pairs(overrides: Any) -> Any:
    """A mapping as pairs: their order has a meaning, and two mappings are equal in any order."""
    if not isinstance(overrides, Mapping):
        return overrides
    for pattern, name in overrides.items():
        if not isinstance(name, str | None):
            raise ValueError(f"{pattern}: {name!r} is no scheme's name, such as int{name}")
    return tuple((pattern, "none" if name is None else name) for pattern, name in overrides.items())


Overrides = Annotated[
    tuple[tuple[str, str], ...],
    BeforeValidator(_pairs),
    PlainSerializer(dict, return_type=dict[str, str], when_used="json"),
]
"""Path pattern → name of a scheme; a mapping in YAML, pairs in Python."""


class QuantizationConfig(Config):
    """How the frozen base is stored. A scheme names all of it; bits, group_size and mode change one part.

    The other keys say which layers get something else. Of those that name a layer, the first here wins:
    skip_modules, keep_lm_head and keep_embeddings, overrides, what the architecture asks for,
    sensitive_scheme, scheme.
    """

    scheme: str = "int4"
    """int4, int8, … (see `mlx_qlora.quantization.schemes`); none keeps the checkpoint as it is."""

    bits: PositiveInt | None = None
    """Bits per weight; None is the scheme's own."""

    group_size: PositiveInt | None = None
    """Consecutive input features that share one scale; None is the scheme's own."""

    mode: str | None = None
    """affine, mxfp4, …; None is the scheme's own."""

    skip_modules: tuple[str, ...] = ()
    """Names or path patterns of layers that stay unquantized, such as lm_head."""

    overrides: Overrides = ()
    """Names or path patterns → scheme, with its group size if that is another: {"*.down_proj": int8,
    "layers.0.*": int6-g32, v_proj: none}. Where two match a layer, the later one wins."""

    keep_lm_head: bool = False
    """Leave the output head as it is; where it is the token embedding too (tied), that."""

    keep_embeddings: bool = False
    """Quantize linear layers only, as bitsandbytes and torchao do."""

    sensitive_scheme: str | None = None
    """Scheme of the layers that are known to suffer most: value and down projections in the first eighth of
    the blocks, in the last eighth and in every third block between, and the output head."""

    bits_per_weight: PositiveFloat | None = None
    """Stored bits per weight of the whole model, at most. The scheme of each layer that nothing above names
    is chosen by its measured error, and the choice is kept as overrides."""

    @model_validator(mode="after")
    def _one_judge_of_layers(self) -> QuantizationConfig:
        if self.bits_per_weight is not None and self.sensitive_scheme is not None:
            raise ValueError(
                "bits_per_weight measures which layers are sensitive; leave sensitive_scheme out"
            )
        return self


def _not_zero(count: int) -> int:
    if count == 0:
        raise ValueError("must be -1 (all) or at least 1")
    return count


class LoraConfig(Config):
    """The trainable low-rank update, W + (alpha / rank) · A B. Source: Hu et al. 2021, arXiv:2106.09685."""

    rank: PositiveInt = 8
    """Inner dimension of the update."""

    alpha: PositiveFloat = 16.0
    """Numerator of the update's scale, alpha / rank."""

    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability with which an input feature of the update is zeroed in training."""

    target_modules: tuple[str, ...] = Field(default=("q_proj", "k_proj", "v_proj"), min_length=1)
    """Short names (q_proj) or path patterns (model.layers.*.mlp.down_proj)."""

    num_layers: Annotated[int, AfterValidator(_not_zero)] = Field(default=-1, ge=-1)
    """How many of the last layers get an update; -1 is all."""

    bias: Literal["none"] = "none"
    """Biases are never trained."""

    variant: Literal["lora", "rslora", "dora"] = "lora"
    """rslora: the scale is alpha / √rank, so that a higher rank does not learn more slowly (Kalajdzievski
    2023, arXiv:2312.03732). dora: each row of the weight has a trained length beside its direction (Liu et
    al. 2024, arXiv:2402.09353)."""

    init: Literal["default", "pissa", "loftq"] = "default"
    """How A and B begin. pissa: along the principal directions of the weight, with what they begin with taken
    off again, so that the function is the base's (Meng et al. 2024, arXiv:2404.02948). loftq: as the best
    low-rank correction of what quantizing the base has lost; it needs the 16-bit weights (Li et al. 2023,
    arXiv:2310.08659)."""

    @model_validator(mode="after")
    def _init_fits_variant(self) -> LoraConfig:
        if self.variant == "dora" and self.init == "pissa":
            raise ValueError("init pissa goes with the variants lora and rslora; dora takes default or loftq")
        return self


class DataConfig(Config):
    """Which rows are trained on, and how they become tokens."""

    path: str | None = None
    """Folder with train/valid/test .jsonl, a single .jsonl or .csv file, or the id of a hub data set."""

    max_seq_length: int = Field(default=512, ge=2)
    """Tokens per example, at most."""

    loss_on: Literal["assistant", "all"] = "assistant"
    """Which tokens are targets. Rows of plain text are always targets as a whole."""

    truncation: Literal["keep_eos", "drop"] = "keep_eos"
    """A row longer than max_seq_length is cut and ends in EOS, or is left out; either is counted."""

    skip_bad_rows: bool = False
    """Go on without the rows that cannot be used."""

    system_prompt: str | None = None
    """Put before every conversation that has no system turn of its own."""

    prompt_template: str | None = None
    """How a conversation is written, in place of the model's own chat template: words such as
    "### Pergunta:\\n{question}\\n### Resposta:\\n{answer}", a chat template in Jinja, or a file with either.
    It is kept in the adapter. None: the model's own; for a base model that has none, "User: {question}",
    a new line and "Assistant: {answer}"."""

    valid_fraction: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share held out, by seed, when the data has no valid file."""

    columns: dict[str, str] = Field(default_factory=dict)
    """The data's own column names: {question: pergunta, answer: resposta}."""

    packing: bool = False
    """Fill rows of max_seq_length with as many examples as fit: fewer, fuller updates to an epoch. Without it
    an update has the same examples as ever, and is laid out without padding where that is cheaper."""

    max_valid_examples: PositiveInt | None = None
    """Validate on the first so many rows; None is all."""

    @field_validator("prompt_template")
    @classmethod
    def _text_of_template(cls, template: str | None) -> str | None:
        """The text itself: what runs and resumes does not depend on a file that may change."""
        if template is None or "\n" in template or "{" in template:
            return template
        try:
            with Path(template).expanduser().open("rb") as file:
                content = file.read(2**20 + 1)
            if len(content) > 2**20:
                raise ValueError(f"{template} is larger than 1 MiB")
            return content.decode("utf-8-sig").removesuffix("\n")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise ValueError(
                f"{template!r} has no {{question}}, so it names a file, and that cannot be read: {why}"
            ) from None


class TrainingConfig(Config):
    """One training run; saved beside its checkpoints."""

    num_epochs: PositiveInt = 3
    """Passes over the training data; max_steps, when given, decides instead."""

    max_steps: PositiveInt | None = None
    """Optimizer updates, not micro-batches."""

    batch_size: PositiveInt = 2
    """Examples in a micro-batch: what is in memory at once."""

    gradient_accumulation: PositiveInt = 2
    """Micro-batches per optimizer update."""

    learning_rate: PositiveFloat = 2.0e-4
    """Peak learning rate."""

    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the rate falls after warm-up."""

    warmup_steps: NonNegativeInt = 100
    """Optimizer updates over which the rate rises linearly. A run that is shorter than its warm-up
    uses a tenth of its steps for it, and says so."""

    optimizer: Literal["adamw", "adam", "sgd", "adafactor", "lion"] = "adamw"
    """AdamW and Adam correct the bias of their early moments."""

    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay (adamw, lion, sgd, adafactor)."""

    lora_plus_ratio: PositiveFloat = 1.0
    """LoRA+: B learns at this multiple of the learning rate, A at the rate itself; 16 is the authors' choice
    with a lower learning_rate (Hayou et al. 2024, arXiv:2402.12354)."""

    max_grad_norm: PositiveFloat | None = 1.0
    """Gradients are scaled down to this global norm; None never clips."""

    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, more time."""

    cache_frozen_prefix: bool = False
    """Where only the last layers have an update (lora.num_layers): run those below once for each example and
    keep what they give on disk, 2 bytes for each hidden feature of a token. Exact where activations have 16
    bits; the hidden states of a float32 model are rounded to bfloat16."""

    seed: NonNegativeInt = 0
    """Everything random is a function of this and of the step."""

    steps_per_report: PositiveInt = 10
    """Optimizer updates between two report lines."""

    steps_per_validation: PositiveInt = 200
    """Optimizer updates between two validations; one more is made at the end."""

    steps_per_checkpoint: PositiveInt = 200
    """Optimizer updates between two checkpoints."""

    keep_checkpoints: PositiveInt = 3
    """The newest so many are kept, and the best."""

    early_stopping_patience: PositiveInt | None = None
    """Stop after so many validations without a new best."""

    memory_budget_gib: PositiveFloat | None = None
    """Warn when the process footprint passes this; None is the device's own limit. 1 GiB is 1024³ bytes."""

    compile: bool | None = None
    """Trace the step with mx.compile. None: yes on a GPU, no on the CPU, where tracing costs more."""

    report_samples: NonNegativeInt = 3
    """So many held-out prompts are answered at the end, with the adapter and without, for the report."""

    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Where metrics go besides metrics.jsonl, at each checkpoint: what may still be undone is not sent.
    Servers and keys are each tracker's own environment variables."""

    tracker_project: str = Field(default="mlx-qlora", min_length=1)
    """The project (wandb, trackio) or experiment (mlflow) that runs are filed under."""


class RunConfig(Config):
    """A whole run."""

    model: ModelConfig = ModelConfig()
    quantization: QuantizationConfig = QuantizationConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()


def build_config(*trees: dict[str, Any], where: str = "configuration") -> RunConfig:
    """One RunConfig from trees of keys; a later tree wins, key by key.

    Raises:
        ConfigError: any key is unknown or any value does not fit; all of them are listed.
    """
    merged: dict[str, Any] = {}
    for tree in trees:
        merged = merge_trees(merged, tree)
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(
            f"The configuration has {error.error_count()} problem(s):\n{listed(_problems(error))}",
            where=where,
            run="mlx-qlora presets --yaml auto   # prints a valid configuration",
        ) from None


def read_config(path: str | Path) -> dict[str, Any]:
    """The tree of keys in a YAML file.

    Raises:
        ConfigError: the file is missing, is not YAML, or holds no mapping.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read the configuration: {error.strerror}", where=str(path)) from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"The configuration is not valid YAML: {error}", where=str(path)) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError("The configuration is not a mapping of keys.", where=str(path))
    return tree


def parse_assignment(assignment: str) -> dict[str, Any]:
    """The tree of one ``a.b=value``; the value is read as YAML.

    Raises:
        ConfigError: there is no ``=`` or the value is not YAML.
    """
    keys, separator, text = assignment.partition("=")
    if not separator or not keys.strip():
        raise ConfigError(
            f"--set takes key=value, not {assignment!r}.", run="mlx-qlora train --set lora.rank=16 …"
        )
    try:
        tree: Any = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"The value is not valid YAML: {error}", where=f"--set {assignment}") from None
    for key in reversed(keys.strip().split(".")):
        tree = {key: tree}
    return tree


def merge_trees(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, mappings merged key by key."""
    merged = dict(base)
    for key, value in over.items():
        both_are_trees = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge_trees(merged[key], value) if both_are_trees else value
    return merged


def difference(old: Config, new: Config) -> list[str]:
    """One line per key whose value differs: ``lora.rank: 8 → 16``."""
    before, after = _flat(old.model_dump()), _flat(new.model_dump())
    return [
        f"{key}: {before.get(key)} → {after.get(key)}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    ]


def to_yaml(config: Config) -> str:
    """The configuration as YAML, keys in their documented order."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Quotes text with a next-line character, which plain YAML would read back as a line break."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\x85" in text else None)


_Dumper.add_representer(str, _represent_text)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _problems(error: ValidationError) -> list[str]:
    lines = []
    for problem in error.errors():
        key = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            lines.append(f"{key}: no such key; there are {', '.join(_known_keys(problem['loc'][:-1]))}")
        else:
            lines.append(f"{key}: {problem['msg']} (got {problem['input']!r})")
    return lines


def _known_keys(path: tuple[int | str, ...]) -> list[str]:
    config: type[BaseModel] = RunConfig
    for key in path:
        annotation = config.model_fields[str(key)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        config = annotation
    return list(config.model_fields)
