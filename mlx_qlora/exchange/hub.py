"""Send a folder's files to the hub as one commit, and say clearly why when it cannot be done."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from mlx_qlora.errors import ConfigError, MlxQloraError
from mlx_qlora.exchange.card_contents import PublishedFile
from mlx_qlora.exchange.card_source import REPOSITORY, License, license_of_card

WAITS_SECONDS = (1.0, 4.0, 15.0)
"""Before each new attempt at what failed for a reason that may pass."""

_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "adapters.safetensors")
_MAY_PASS = {408, 409, 412, 429, 500, 502, 503, 504}

T = TypeVar("T")


class HubError(MlxQloraError):
    """What the hub refused, or could not be asked."""


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What is on the hub now."""

    repo: str
    url: str
    commit: str
    """Digest of the commit that holds all the files."""
    files: tuple[str, ...]
    bytes: int
    private: bool
    removed: tuple[str, ...]
    """Weight files of an older push that would have been loaded with the new ones."""


def check_repo_id(repo: str) -> None:
    """Refuse what is no OWNER/NAME.

    Raises:
        ConfigError: it is none.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"--repo is no name on the hub: {error}") from None
    if not REPOSITORY.fullmatch(repo):
        raise ConfigError(
            f"--repo is OWNER/NAME, not {repo!r}.", run="hf auth whoami   # shows who you are there"
        )


def read_token(file: Path | None) -> str:
    """The token to push with: a file's, or that of ``hf auth login`` and HF_TOKEN.

    Raises:
        HubError: there is none.
    """
    if file is not None:
        try:
            token = file.expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise HubError(f"The token cannot be read: {error}", where=str(file)) from None
        if not token or len(token.split()) != 1:
            raise HubError("A token's file holds the token and nothing else.", where=str(file))
        return token
    from huggingface_hub import get_token

    found = get_token()
    if found is None:
        raise HubError(
            "There is no token to push with.", run="hf auth login   # or: mlx-qlora push … --token-file FILE"
        )
    return found


def check_online() -> None:
    """Refuse to go on when the hub's client is told to stay off-line.

    Raises:
        HubError: HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise HubError(
            "HF_HUB_OFFLINE is set, and a push needs the hub.",
            run="unset HF_HUB_OFFLINE   # or: mlx-qlora push … --dry-run, which needs no network",
        )


def license_on_hub(base_model: str, token: str | None) -> License | None:
    """The licence that the base model's card on the hub names; None if it names none or is not to be seen."""
    try:
        with _said_clearly(base_model, ""):
            card = _api(token).model_info(base_model).card_data
    except HubError:
        return None
    found_in = f"{base_model} on the hub"
    return license_of_card(dict(card.to_dict()), found_in) if card is not None else None


def push(
    repo: str,
    files: Sequence[PublishedFile],
    *,
    token: str,
    private: bool = False,
    message: str = "Published with mlx_qlora",
    on_note: Callable[[str], None] | None = None,
    waits_seconds: Sequence[float] = WAITS_SECONDS,
) -> Pushed:
    """Make the repository if need be, and commit all files to it at once.

    Large files are sent before the commit, and the hub keeps those that arrived: after a failure the
    repository is as it was, and the same push goes on where it stopped. What is there unchanged is not sent.

    Args:
        private: Only its owner may see it. A repository that is public already is then refused.
        on_note: Told when an attempt failed and is made again.

    Raises:
        HubError: the hub refused, or cannot be reached; the message says what to do.
    """
    check_online()
    size = _size(files)
    again = f"mlx-qlora push … --repo {repo}   # again: what arrived is not sent again"
    with _said_clearly(repo, again):
        api = _api(token)
        _retried(
            lambda: api.create_repo(repo, private=private or None, exist_ok=True),
            waits=waits_seconds,
            on_note=on_note,
        )
        is_private = _visibility(api, repo, private)
        commit, removed = _retried(
            lambda: _commit(api, repo, files, message), waits=waits_seconds, on_note=on_note
        )
    return Pushed(
        repo=repo,
        url=f"{api.endpoint}/{repo}",
        commit=commit,
        files=tuple(file.path for file in files),
        bytes=size,
        private=is_private,
        removed=tuple(removed),
    )


def _size(files: Sequence[PublishedFile]) -> int:
    try:
        return sum(file.num_bytes for file in files)
    except OSError as error:
        raise HubError(f"A file cannot be read: {error.strerror}.", where=str(error.filename)) from None


def _visibility(api: Any, repo: str, private: bool) -> bool:
    """Whether a repository is private; `create_repo` leaves one that was there before as it was."""
    is_private = bool(api.model_info(repo).private)
    if private and not is_private:
        raise HubError(
            f"{repo} is there already, and everybody can read it; nothing was sent.",
            run=f"hf repos settings {repo} --private   # or choose another --repo",
        )
    return is_private


def _commit(api: Any, repo: str, files: Sequence[PublishedFile], message: str) -> tuple[str, list[str]]:
    """One commit on top of what is there now; after another writer's in between the hub refuses ours."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    head = api.model_info(repo).sha
    there = api.list_repo_files(repo, revision=head) if head else []
    ours = {file.path for file in files}
    old = [name for name in there if name not in ours and any(fnmatchcase(name, each) for each in _WEIGHTS)]
    operations: list[Any] = [CommitOperationAdd(file.path, file.content) for file in files]
    operations += [CommitOperationDelete(name) for name in old]
    done = api.create_commit(repo, operations, commit_message=message, parent_commit=head)
    return str(done.oid), old


def _api(token: str | None) -> Any:
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="mlx_qlora")


def _retried(
    call: Callable[[], T], *, waits: Sequence[float], on_note: Callable[[str], None] | None = None
) -> T:
    for wait in waits:
        try:
            return call()
        except Exception as error:
            if not _may_pass(error):
                raise
            if on_note is not None:
                on_note(f"{_short(error)}; again in {wait:g} s")
            time.sleep(wait)
    return call()


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """The HTTP status an error is about, if it is about one."""
    responses = (getattr(cause, "response", None) for cause in _causes(error))
    return next((each.status_code for each in responses if each is not None), None)


def _is_network(error: BaseException) -> bool:
    """Whether a connection failed; the hub's client raises httpx's own errors, and its Rust part others."""
    for cause in _causes(error):
        module = type(cause).__module__.split(".")[0]
        if module in ("httpx", "httpx2", "httpcore"):
            return True
        # Between us and the hub a proxy may answer with a page where JSON is expected.
        if isinstance(cause, ConnectionError | TimeoutError | json.JSONDecodeError):
            return True
    return False


def _may_pass(error: BaseException) -> bool:
    status = _status(error)
    return status in _MAY_PASS if status is not None else _is_network(error)


def _short(error: BaseException) -> str:
    status = _status(error)
    return f"the hub answered {status}" if status is not None else f"no connection ({type(error).__name__})"


@contextmanager
def _said_clearly(repo: str, again: str) -> Iterator[None]:
    """Turn what the hub's client raises into a HubError with the next step to take."""
    try:
        yield
    except MlxQloraError:
        raise
    except Exception as error:
        said, status = _reason(error), _status(error)
        if status is None and not _is_network(error) and not _is_the_hubs(error):
            raise
        raise _explained(repo, status, said, again, error) from error


def _is_the_hubs(error: BaseException) -> bool:
    """Whether the hub's client raised it: also for what it says in ValueError and RuntimeError."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = str(trace.tb_frame.f_globals.get("__name__", "")) if trace is not None else ""
    return module.split(".")[0] in ("huggingface_hub", "hf_xet")


def _explained(repo: str, status: int | None, said: str, again: str, error: Exception) -> HubError:
    owner = repo.split("/")[0]
    lower = said.lower()
    if status in (402, 413, 507) or "storage limit" in lower or "quota" in lower:
        return HubError(
            f"The hub has no room left for {owner}; nothing was committed.",
            where=said,
            run="make room or enlarge it at https://huggingface.co/settings/billing, then push again",
        )
    if status == 401:
        return HubError(
            "The hub does not know this token; nothing was sent.",
            where=repo,
            run="hf auth login   # with a token that may write, from https://huggingface.co/settings/tokens",
        )
    if status in (403, 404):
        return HubError(
            f"This token may not write to {repo}: it belongs to {owner}, or the token may only read.",
            where=repo,
            run="hf auth whoami   # then push to your own name, or with a token that may write there",
        )
    if status in (409, 412):
        return HubError(f"{repo} was changed by somebody else meanwhile.", where=repo, run=again)
    if status == 400 or isinstance(error, ValueError):
        return HubError(f"The hub refuses what was sent: {said}", where=repo, run=again)
    what = f"the hub answered {status}" if status is not None else f"no connection ({type(error).__name__})"
    return HubError(
        f"The push did not succeed: {what}. The repository is as it was before.", where=repo, run=again
    )


def _reason(error: BaseException) -> str:
    """What the hub said, in one line; else what its client did."""
    answers = (getattr(cause, "server_message", None) for cause in _causes(error))
    said = next((answer for answer in answers if answer), None) if not isinstance(error, ValueError) else None
    return " ".join(str(said or error).split()) or type(error).__name__
