"""Whether the hub answers, and takes the token. The token is never shown."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from mlx_qlora.machine.finding import Finding
from mlx_qlora.machine.system import GIB

SECONDS = 4.0
"""So long the hub is waited for, looking up its name included."""

OFFLINE = "offline by HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE: only what is in the cache can be used"


def hub(seconds: float = SECONDS) -> Iterator[Finding]:
    """Ask the endpoint (HF_ENDPOINT) who one is, or for any model; once, and not for long.

    Offline by HF_HUB_OFFLINE nothing is asked. Without an answer, what is on this machine still works: that
    is a warning.
    """
    from huggingface_hub import constants, get_token

    url, token = constants.ENDPOINT.rstrip("/"), get_token()
    endpoint = _without_password(url)
    facts: dict[str, Any] = {"endpoint": endpoint, "has_token": token is not None}
    if constants.is_offline_mode():
        yield Finding(
            "hub", "ok", OFFLINE, "unset HF_HUB_OFFLINE TRANSFORMERS_OFFLINE", {**facts, "is_offline": True}
        )
        return
    path = "/api/whoami-v2" if token else "/api/models?limit=1"
    status, said = _asked(url + path, token, seconds)
    facts["status"] = status
    if status is None:
        yield Finding(
            "hub",
            "warning",
            f"{endpoint} does not answer ({said}); what is on this machine still works",
            f"curl -sSI --max-time 10 {endpoint}   # a proxy? HTTPS_PROXY; a mirror? HF_ENDPOINT",
            facts,
        )
    elif token and status == 401:
        text = f"{endpoint} answers, and refuses the token: public models only"
        yield Finding("hub", "warning", text, "hf auth login", facts)
    elif status >= 400:
        yield Finding(
            "hub",
            "warning",
            f"{endpoint} answers with status {status}",
            f"curl -sSI --max-time 10 {endpoint}",
            facts,
        )
    elif token:
        yield Finding("hub", "ok", f"{endpoint} answers, signed in as {said or 'somebody'}", None, facts)
    else:
        text = f"{endpoint} answers; not signed in, so public models only"
        yield Finding("hub", "ok", text, "hf auth login   # for private and gated models", facts)


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _asked(url: str, token: str | None, seconds: float) -> tuple[int | None, str]:
    """Status and user's name, or None and why there is no answer."""
    answer: tuple[int | None, str] | None = _in_time(lambda: _fetched(url, token, seconds), seconds)
    return answer or (None, f"no answer in {seconds:g} s")


def _fetched(url: str, token: str | None, seconds: float) -> tuple[int | None, str]:
    from huggingface_hub import get_session

    headers = {"authorization": f"Bearer {token}"} if token else {}
    try:
        answer = get_session().get(url, headers=headers, timeout=seconds)
    except Exception as error:  # of the network; its kinds depend on the client's version
        return None, type(error).__name__
    try:
        value = answer.json()
    except ValueError:
        return answer.status_code, ""
    return answer.status_code, str(value.get("name", "")) if isinstance(value, dict) else ""


def download(model: str, seconds: float = SECONDS) -> Iterator[Finding]:
    """How much of a model's weights is still to be fetched, and whether the hub's cache has room for them.

    Nothing is said of a folder, nor when the hub does not tell.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.hf_api import RepoFile

    if Path(model).expanduser().exists() or ":" in model or constants.is_offline_mode():
        return
    try:
        files = _in_time(lambda: list(HfApi().list_repo_tree(model)), seconds) or []
    except (HfHubHTTPError, HFValidationError, OSError):
        return  # whoever reads its config.json says what is wrong
    sizes = {
        file.path: file.size
        for file in files
        if isinstance(file, RepoFile) and fnmatch(file.path, "model*.safetensors")
    }
    missing = sum(
        size for name, size in sizes.items() if not isinstance(try_to_load_from_cache(model, name), str)
    )
    if not missing:
        return
    folder = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(p for p in (folder, *folder.absolute().parents) if p.exists())).free
    facts = {"download_bytes": missing, "free_bytes": free}
    text = f"{missing / GIB:.1f} GiB of weights to fetch; {free / GIB:.1f} GiB are free in the hub's cache"
    if missing > free:
        run = "hf cache ls   # then: hf cache rm model/OWNER/NAME, or: export HF_HUB_CACHE=FOLDER"
        yield Finding("download", "problem", text, run, facts)
    else:
        yield Finding(
            "download", "ok", text, f"hf download {model}   # now; otherwise when a run begins", facts
        )


def _in_time(ask: Callable[[], Any], seconds: float) -> Any:
    """What `ask` gives, or None after so many seconds; what it raises is raised.

    A thread of its own: looking up a name knows no time limit. It does not hold up the end of the process.
    """
    answer: list[Any] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            answer.append(ask())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds + 0.5)
    if failure:
        raise failure[0]
    return answer[0] if answer else None
