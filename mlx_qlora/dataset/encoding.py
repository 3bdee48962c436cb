"""From text to tokens, so that nobody writes a control token by typing its name."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from mlx_qlora.dataset.rows import BadRow

# Unicode noncharacters: never part of text that is exchanged.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_HIDDEN = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
# What a continuation is tokenized behind, so that it does not begin like a sentence of its own.
_GUARDS = ("\n", "|", "x")


class Encoder:
    """A Hugging Face tokenizer that tells a template's control tokens from the same letters in a turn.

    Text without such letters is tokenized as the tokenizer does it. Otherwise a twin is used whose
    control tokens have names nobody can type: the template's are renamed, a turn's stay letters, and the
    whole is tokenized in one go, so that everything around them comes out as ever.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.size = len(inner)
        backend = getattr(inner, "backend_tokenizer", None)
        added = backend.get_added_tokens_decoder().values() if backend is not None else ()
        names = {token.content for token in added if token.special} | {*inner.all_special_tokens}
        self.control = sorted(filter(None, names), key=lambda name: (-len(name), name))
        self._index = {name: number for number, name in enumerate(self.control)}
        self._pattern = re.compile("|".join(map(re.escape, self.control)) or r"(?!)")
        self._renamed = {_name(number): name for number, name in enumerate(self.control)}
        # Letters outside of the vocabulary may become the unknown token: it gives no commands.
        self._control_ids = {self._real_id(name) for name in self.control} - {inner.unk_token_id}
        self._twin: Any = None
        self._twin_names: dict[int, str] = {}

    def spells_control(self, text: str) -> bool:
        """Whether a text holds the letters of a control token."""
        return self._pattern.search(text) is not None

    def hide(self, text: str) -> str:
        """A turn's text with a stand-in for each control token that it spells.

        Raises:
            BadRow: the text holds the characters that stand-ins are made of.
        """
        if _OPEN in text or _CLOSE in text:
            raise BadRow("it spells a control token and holds the noncharacters U+FDD0 or U+FDD1")
        return self._pattern.sub(lambda found: f"{_OPEN}{self._index[found.group()]}{_CLOSE}", text)

    def control_end(self, text: str, begin: int = 0) -> int:
        """Where the control tokens that stand at `begin` end; `begin` itself when there is none."""
        while (found := self._pattern.match(text, begin)) and found.end() > begin:
            begin = found.end()
        return begin

    def ends_with_control(self, text: str) -> bool:
        """Whether the last letters of a text are a control token."""
        return text.endswith(tuple(self.control))

    def encode(self, text: str, ends: Sequence[int], *, hidden: bool) -> tuple[list[int], list[int]]:
        """The tokens of a text, and how many of them each ``text[:end]`` has.

        The tokens of ``text[:end]`` always begin those of the text: where a tokenizer would join letters
        over an end, as ``](`` into one token, it is made to begin anew there. So what a model is given to
        continue is token for token what stood before the answer in training.

        Args:
            ends: Ascending; the last is the text's own.
            hidden: Whether the turns were hidden with `hide`.

        Raises:
            BadRow: the tokenizer knows the letters of a control token in no other way.
        """
        tokens: list[int] = []
        counts, begin = [], 0
        for end, whole in zip(ends, self._ids([text[:end] for end in ends], hidden=hidden), strict=True):
            begins_anew = whole[: len(tokens)] != tokens
            tokens = tokens + self._continuation(text[begin:end], hidden=hidden) if begins_anew else whole
            counts.append(len(tokens))
            begin = end
        return tokens, counts

    def _continuation(self, text: str, *, hidden: bool) -> list[int]:
        for guard in _GUARDS:
            before, whole = self._ids([guard, guard + text], hidden=hidden)
            if whole[: len(before)] == before:
                return whole[len(before) :]
        raise BadRow("the tokenizer joins the beginning of an answer with whatever stands before it")

    def _ids(self, texts: list[str], *, hidden: bool) -> list[list[int]]:
        if hidden:
            return [self._ids_by_twin(text) for text in texts]
        return list(self.inner(texts, add_special_tokens=False, verbose=False)["input_ids"])

    def _ids_by_twin(self, text: str) -> list[int]:
        twin = self._made_twin()
        renamed, num_control = self._pattern.subn(lambda found: _name(self._index[found.group()]), text)
        shown = _HIDDEN.sub(lambda found: self.control[int(found.group(1))], renamed)
        tokens, num_real, num_typed = [], 0, 0
        for token in twin.encode(shown, add_special_tokens=False).ids:
            name = self._twin_names.get(token)
            if name is None and token in self._control_ids:
                num_typed += 1
            num_real += name in self._renamed
            tokens.append(token if name is None else self._real_id(self._renamed.get(name, name)))
        if num_typed or num_real != num_control:
            raise BadRow("it spells a control token, which this tokenizer cannot write in any other way")
        return tokens

    def _real_id(self, name: str) -> int:
        return int(self.inner.convert_tokens_to_ids(name))

    def _made_twin(self) -> Any:
        if self._twin is None:
            backend = getattr(self.inner, "backend_tokenizer", None)
            if backend is None:
                raise BadRow("it spells a control token, and this tokenizer has no fast form to write it in")
            tree = json.loads(backend.to_str())
            for token in tree["added_tokens"]:
                if token["content"] in self._index:
                    token["content"] = _name(self._index[token["content"]])
            self._twin = type(backend).from_str(json.dumps(tree))
            added = self._twin.get_added_tokens_decoder()
            self._twin_names = {number: token.content for number, token in added.items()}
        return self._twin


_ENCODERS: WeakKeyDictionary[Any, Encoder] = WeakKeyDictionary()


def encoder_of(tokenizer: Any) -> Encoder:
    """The encoder over a tokenizer; made once, and again when tokens were added since."""
    inner = inner_of(tokenizer)
    encoder = _ENCODERS.get(inner)
    if encoder is None or encoder.size != len(inner):
        encoder = _ENCODERS[inner] = Encoder(inner)
    return encoder


def inner_of(tokenizer: Any) -> Any:
    """The Hugging Face tokenizer inside of mlx-lm's wrapper."""
    inner = getattr(tokenizer, "_tokenizer", None)  # Hugging Face's own has one too: its Rust part
    return inner if hasattr(inner, "apply_chat_template") else tokenizer


def _name(number: int) -> str:
    return f"{_OPEN}c{number}{_CLOSE}"
