"""What must not be published: tokens, keys, and paths that tell of a machine and its user."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

_SECRETS = {
    "a Hugging Face token": r"hf_[A-Za-z0-9]{16,}",
    "an API key": r"sk-[A-Za-z0-9_-]{20,}",
    "a GitHub token": r"(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})",
    "a GitLab token": r"glpat-[\w-]{20,}",
    "a Slack token": r"xox[abprs]-[\w-]{10,}",
    "an AWS key": r"AKIA[0-9A-Z]{16}",
    "a Google key": r"AIza[\w-]{35}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
_HOMES = r"(?<![\w.])/(?:home|Users)/[\w.-]+|[A-Za-z]:\\+Users\\+[\w.-]+"

_SECRET = re.compile("|".join(rf"(?P<s{i}>(?<![A-Za-z0-9]){p})" for i, p in enumerate(_SECRETS.values())))
_HOME = re.compile(_HOMES)


def find_leaks(
    name: str, text: str, private: Sequence[str] = (), *, is_vocabulary: bool = False
) -> list[str]:
    """Every token, key, home folder or private text in a file, as ``file:line: what``; no secret is repeated.

    Args:
        private: Texts that must not appear: the token in use, folders of this machine.
        is_vocabulary: The file lists pieces of words, among which ``/home/ana`` is no one's folder.
    """
    found = []
    for match in _SECRET.finditer(text):
        kind = list(_SECRETS)[int(str(match.lastgroup)[1:])]
        found.append((match.start(), f"{kind} ({match.group()[:6]}…)"))
    if not is_vocabulary:
        found += [(match.start(), f"a home folder ({match.group()})") for match in _HOME.finditer(text)]
    for word in private:
        for spelled in {word, word.replace("/", "\\/")}:
            at = text.find(spelled)
            if at >= 0:
                shown = f"a folder of this machine ({word})" if word.startswith("/") else "your own token"
                found.append((at, shown))
    return [f"{name}:{text.count(chr(10), 0, at) + 1}: {what}" for at, what in sorted(set(found))]


def private_texts(folders: Iterable[Path], token: str | None) -> list[str]:
    """What no published file may contain: this user's home, these folders, and the token."""
    paths = {str(path) for each in (Path.home(), *folders) for path in (each.absolute(), each.resolve())}
    # A folder such as /data says nothing, and is part of many innocent words.
    long_enough = sorted(path for path in paths if path.count("/") > 1)
    return [*long_enough, *([token] if token else [])]
