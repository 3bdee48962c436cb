"""``mlx-qlora push``."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_qlora.commands.output import Json, gigabytes, print_json, say
from mlx_qlora.errors import ConfigError, MlxQloraError

if TYPE_CHECKING:
    from mlx_qlora.exchange.card_contents import PublishedFile
    from mlx_qlora.exchange.card_source import Publication


def push(
    folder: Annotated[Path, typer.Argument(help="An adapter, or a quantized or fused model.")],
    repo: Annotated[str, typer.Option(help="Where to: OWNER/NAME on the hub.")],
    private: Annotated[bool, typer.Option("--private", help="Only you may see it.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show files and card; send nothing, need no network.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Do not ask; required where there is no terminal.")
    ] = False,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the base model, when it was a folder here.")
    ] = None,
    license_id: Annotated[
        str | None, typer.Option("--license", help="apache-2.0, mit, …; the base model's if none.")
    ] = None,
    language: Annotated[
        list[str] | None, typer.Option(help="Language of the answers: pt, en. May be repeated.")
    ] = None,
    summary: Annotated[str, typer.Option(help="A sentence of yours for the card.")] = "",
    token_file: Annotated[
        Path | None, typer.Option(help="File that holds the token; that of `hf auth login` if none.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Publish an adapter or a model on the Hugging Face hub, with a model card written from its run.

    Example: mlx-qlora push adapters/farense --repo ana/farense --dry-run

    Without --private everybody can read it, and what was copied cannot be called back: look at --dry-run
    first. A push asks before it sends anything. Only files known to be needed are sent, never data, logs or
    checkpoints, and nothing at all when a token or the name of a folder of yours stands in one of them.
    All files arrive in one commit; after a failure the same command goes on where it stopped.
    """
    from mlx_qlora.exchange.card_source import describe
    from mlx_qlora.exchange.hub import check_online, check_repo_id, read_token
    from mlx_qlora.exchange.hub import push as push_files

    check_repo_id(repo)
    if not dry_run:
        check_online()
    token = read_token(token_file) if not dry_run or token_file else None
    publication = describe(folder, base_model)
    files, left_out, card = _prepared(
        publication, repo, license_id, language or [], summary, token=token, is_dry=dry_run
    )
    size = sum(file.num_bytes for file in files)
    if dry_run and as_json:
        tree = [{"path": file.path, "bytes": file.num_bytes} for file in files]
        print_json(
            {"repo": repo, "dry_run": True, "private": private, "files": tree, "bytes": size,
             "left_out": left_out, "card": card}
        )  # fmt: skip
        return
    if not as_json:
        _show(files, left_out, repo, private=private)
    if dry_run:
        print(f"\nREADME.md\n{'-' * 9}\n{card}")
        say("Nothing was sent. Without --dry-run it is.")
        return
    if not yes:
        _confirm(repo, private=private)
    pushed = push_files(repo, files, token=token or "", private=private, on_note=say)
    if as_json:
        print_json(
            {"repo": repo, "url": pushed.url, "commit": pushed.commit, "files": list(pushed.files),
             "bytes": pushed.bytes, "private": pushed.private, "removed": list(pushed.removed)}
        )  # fmt: skip
        return
    for name in pushed.removed:
        say(f"removed, it belonged to an older push: {name}")
    print(f"{pushed.url}\ncommit {pushed.commit}")
    option = "--adapter-path" if publication.adapter else "--model"
    say(f'Run: mlx-qlora infer "…" {option} {repo}')


def _prepared(
    publication: Publication,
    repo: str,
    license_id: str | None,
    language: list[str],
    summary: str,
    *,
    token: str | None,
    is_dry: bool,
) -> tuple[list[PublishedFile], list[str], str]:
    """All files with the card among them, what is left out, and the card's text; nothing private in any."""
    from mlx_qlora.exchange.card_contents import CARD, PICTURE, PublishedFile, gather, refuse_leaks
    from mlx_qlora.exchange.card_source import License, find_license, languages
    from mlx_qlora.exchange.hub import license_on_hub
    from mlx_qlora.exchange.model_card import UNKNOWN_LICENSE, CardFacts, write_card

    files, left_out = gather(publication)
    found = License(id=license_id, found_in="--license") if license_id else find_license(publication)
    if found is None and not is_dry:
        found = license_on_hub(publication.base_model, token)
    if found is None:
        asked = "; the push asks the hub for the base model's" if is_dry else ""
        say(f"licence {UNKNOWN_LICENSE}{asked}")
    has_picture = any(file.path == PICTURE for file in files)
    spoken = language or (languages(publication) if publication.relation == "quantized" else [])
    facts = CardFacts(
        repo=repo,
        license=found,
        languages=spoken,
        has_picture=has_picture,
        summary=summary,
        **_of_the_run(publication),
    )
    card = write_card(publication, facts)
    files = sorted([*files, PublishedFile(CARD, card.encode())], key=lambda file: file.path)
    folders = [publication.folder, Path.cwd(), *filter(None, [publication.base_folder])]
    refuse_leaks(files, folders, token)
    return files, [name for name in left_out if name != CARD], card


def _of_the_run(publication: Publication) -> dict[str, Any]:
    """What the run in the folder left to be told: its figures and its configuration."""
    from mlx_qlora.exchange.card_run import run_facts, shared_config
    from mlx_qlora.training.metrics import METRICS, read_metrics
    from mlx_qlora.training.report import REPORT
    from mlx_qlora.training.run import resumed_config

    folder = publication.folder
    entries = read_metrics(folder / METRICS)
    if publication.adapter is None or not entries:
        return {}
    report = (folder / REPORT).read_text(encoding="utf-8") if (folder / REPORT).is_file() else ""
    config = ""
    with suppress(MlxQloraError):  # written by another version; the adapter says what matters
        config = shared_config(resumed_config(folder), publication.base_model)
    return {"run": run_facts(entries, report), "run_config": config}


def _show(files: list[PublishedFile], left_out: list[str], repo: str, *, private: bool) -> None:
    """The tree as it will be, and what stays here."""
    seen = "only you can see it" if private else "public: everybody can read it"
    say(f"{repo} ({seen})")
    width = max(len(file.path) for file in files)
    for file in files:
        say(f"  {file.path:<{width}}  {_size(file.num_bytes):>10}")
    say(f"  {len(files)} files, {_size(sum(file.num_bytes for file in files))}")
    if left_out:
        say(f"stays here: {', '.join(left_out)}")


def _size(num_bytes: int) -> str:
    return gigabytes(num_bytes) if num_bytes >= 1024**2 else f"{num_bytes / 1024:.1f} KiB"


def _confirm(repo: str, *, private: bool) -> None:
    """Ask whether to send it.

    Raises:
        ConfigError: there is nobody to ask, or the answer was no.
    """
    if not sys.stdin.isatty():
        raise ConfigError(
            "Nothing was sent: without a terminal to ask on, a push needs --yes.",
            run=f"mlx-qlora push … --repo {repo} --yes   # after a look at --dry-run",
        )
    warning = "" if private else " Everybody will be able to read it; copies cannot be called back."
    print(f"Send this to {repo}?{warning} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise ConfigError("Nothing was sent.")
