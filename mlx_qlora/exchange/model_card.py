"""The model card of what is published: metadata for the hub, and what a person needs to use and judge it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_qlora.errors import ConfigError
from mlx_qlora.exchange.card_contents import PICTURE
from mlx_qlora.exchange.card_run import RunFacts
from mlx_qlora.exchange.card_source import License, Publication
from mlx_qlora.storage import read_json
from mlx_qlora.weights.shards import INDEX

UNKNOWN_LICENSE = "unknown: set --license"
_MAX_ROWS = 16
_FUSE_LOSS = {
    "weight_error": "error of the fused weights, relative to the adapter's update",
    "delta_survived": "share of the update that is in the weights",
}
_VARIANTS = {"lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA"}


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card says beyond the folder itself."""

    repo: str
    license: License | None
    languages: Sequence[str] = ()
    """ISO 639 codes."""
    run: RunFacts | None = None
    run_config: str = ""
    """The run's configuration as YAML, fit to be shown."""
    has_picture: bool = False
    summary: str = ""
    """A sentence of the author's own."""


def write_card(publication: Publication, facts: CardFacts) -> str:
    """README.md for the hub: YAML front matter, then Markdown. The same facts always give the same text.

    Raises:
        ConfigError: the hub's client refuses the metadata.
    """
    sections = [
        f"# {facts.repo.split('/')[-1]}",
        _headline(publication),
        facts.summary,
        f"![Loss, learning rate and memory over the run]({PICTURE})" if facts.has_picture else "",
        *_usage(publication, facts.repo),
        *_run_sections(publication, facts),
        *_fused_sections(publication.manifest),
        *_format_sections(publication),
        "## Licence",
        _license_line(publication, facts.license),
    ]
    text = "\n\n".join(section for section in sections if section) + "\n"
    return f"---\n{_metadata(publication, facts)}\n---\n\n{text}"


def _metadata(publication: Publication, facts: CardFacts) -> str:
    from huggingface_hub import ModelCardData

    licence = facts.license
    kind = {"adapter": ["lora", "qlora"], "quantized": ["quantized"], "finetune": ["fine-tuned"]}
    try:
        data = ModelCardData(
            base_model=publication.base_model,
            base_model_relation=publication.relation,
            language=list(facts.languages) or None,
            library_name="mlx",
            license=licence.id if licence else None,
            license_name=licence.name if licence else None,
            license_link=licence.link if licence else None,
            pipeline_tag="text-generation",
            tags=["mlx", "mlx-qlora", *kind[publication.relation]],
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"The hub's client refuses the card's metadata: {error}") from None
    return str(data)


def _headline(publication: Publication) -> str:
    at = f" at revision `{publication.base_revision}`" if publication.base_revision else ""
    base = f"[{publication.base_model}](https://huggingface.co/{publication.base_model}){at}"
    if publication.adapter is not None:
        lora, stored = publication.adapter.lora, publication.adapter.quantization
        held = f"stored as {stored.scheme}" if stored.scheme != "none" else "as it is"
        what = f"{_VARIANTS[lora.variant]} adapter of rank {lora.rank}"
        return f"A {what} for {base}, trained with the base {held} and frozen."
    if publication.relation == "quantized":
        return f"{base}, quantized tensor by tensor, for MLX."
    made = "with an adapter fused into its weights" if publication.manifest.get("adapter") else "fine-tuned"
    return f"{base}, {made}, for MLX."


def _usage(publication: Publication, repo: str) -> list[str]:
    name = repo.split("/")[-1]
    option = "--adapter-path" if publication.adapter else "--model"
    python = f'adapter_path="{repo}"' if publication.adapter else f'"{repo}"'
    sections = [
        "## Use it",
        f'With mlx_qlora:\n\n```sh\npip install mlx-qlora\nmlx-qlora infer "…" {option} {repo}\n```',
        "```python\nimport mlx_qlora as mq\n\n"
        f'model, tokenizer = mq.load({python})\nprint(mq.generate(model, tokenizer, prompt="…"))\n```',
    ]
    sections += _usage_in_mlx_lm(publication, repo, name)
    if publication.adapter is not None:
        sections.append(
            "With PEFT and the same base model on PyTorch, after turning the adapter into PEFT's layout:\n\n"
            f"```sh\nhf download {repo} --local-dir {name}\n"
            f"mlx-qlora export-peft {name} --output {name}-peft\n```"
        )
    return sections


def _usage_in_mlx_lm(publication: Publication, repo: str, name: str) -> list[str]:
    """How mlx-lm runs it; nothing where mlx-lm has no such format."""
    if publication.adapter is None:
        if _modes(publication) & {"nf4", "nf4-dq"}:
            return ["The weights are in bitsandbytes' NF4 format, which mlx-lm does not read."]
        return [f'With mlx-lm:\n\n```sh\nmlx_lm.generate --model {repo} --prompt "…"\n```']
    said = " It knows nothing of the adapter's system prompt." if publication.adapter.system_prompt else ""
    return [
        "With mlx-lm, which takes adapters from a folder and the chat template from the base model."
        f"{said}\n\n```sh\nhf download {repo} --local-dir {name}\n"
        f'mlx_lm.generate --model {publication.base_model} --adapter-path {name} --prompt "…"\n```'
    ]


def _modes(publication: Publication) -> set[str]:
    """Every mode of quantization that a model's config.json names."""
    tree = publication.config.get("quantization") or {}
    parts = (
        [tree, *(part for part in tree.values() if isinstance(part, dict))] if isinstance(tree, dict) else []
    )
    return {str(part["mode"]) for part in parts if "mode" in part}


def _run_sections(publication: Publication, facts: CardFacts) -> list[str]:
    run, sections = facts.run, list[str]()
    if run is not None and run.validations:
        sections += [
            "## Losses",
            _losses(run),
            "Nats per target token; train is the mean since the row before.",
        ]
    if run is not None and run.rows:
        sections += ["## Time and memory, as measured", _table(("", ""), run.rows)]
    if run is not None and run.data:
        sections += [
            "## Data",
            "The data itself is not published.",
            "\n".join(f"- {each}" for each in run.data),
        ]
    if facts.run_config:
        sections += ["## Configuration", f"```yaml\n{facts.run_config}```"]
    if publication.adapter is not None:
        sections.append(f"Fingerprint of the base's unquantized weights: `{publication.adapter.fingerprint}`")
    return sections


def _fused_sections(manifest: dict[str, Any]) -> list[str]:
    """What was fused, and what was lost by it as measured then."""
    adapter, loss = manifest.get("adapter") or {}, manifest.get("loss") or {}
    lora = adapter.get("lora") or {}
    rows = [(key, str(lora[key])) for key in ("variant", "rank", "alpha") if key in lora]
    rows += [
        (name, f"{loss[key]:.4f}") for key, name in _FUSE_LOSS.items() if isinstance(loss.get(key), float)
    ]
    return ["## The fused adapter", _table(("", ""), rows)] if rows else []


def _format_sections(publication: Publication) -> list[str]:
    """Format and size of a quantized model; what is not known is left out."""
    stored = publication.config.get("quantization") or publication.config.get("quantization_config") or {}
    rows = [(key, str(stored[key])) for key in ("mode", "bits", "group_size") if key in stored]
    others = sum(isinstance(part, dict) for part in stored.values())
    if others:
        rows.append(("layers with a format of their own", str(others)))
    try:
        size = read_json(publication.folder / INDEX)["metadata"]
        bits = size["total_size"] * 8 / size["total_parameters"]
        rows += [
            ("parameters", f"{size['total_parameters']:,}"),
            ("bits per weight, all tensors", f"{bits:.3f}"),
        ]
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        pass
    kept = [f"- `{each['layer']}`: {each['reason']}" for each in publication.manifest.get("skipped", ())]
    sections = ["## Format", _table(("", ""), rows)] if rows else []
    return [*sections, "Kept as they were:\n\n" + "\n".join(kept)] if kept else sections


def _license_line(publication: Publication, licence: License | None) -> str:
    if licence is None:
        return (
            f"Licence **{UNKNOWN_LICENSE}**. The terms of the base model, {publication.base_model}, "
            "apply to it in any case."
        )
    name = licence.name or licence.id
    shown = f"[{name}]({licence.link})" if licence.link else name
    return f"{shown} (from {licence.found_in}). The terms of the base model apply."


def _losses(run: RunFacts) -> str:
    every = max(1, math.ceil(len(run.validations) / _MAX_ROWS))
    last = len(run.validations) - 1
    rows = [
        (str(step), _number(train), _number(loss), _perplexity(loss), "best" if step == run.best_step else "")
        for index, (step, train, loss) in enumerate(run.validations)
        if index % every == 0 or index == last or step == run.best_step
    ]
    return _table(("step", "train", "validation", "perplexity", ""), rows)


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.4f}"


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.2f}" if math.isfinite(loss) and loss < 50 else "–"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )
