"""Which language a text is in, by words that only one of six languages uses often."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

LANGUAGES = {
    "pt": "Portuguese", "en": "English", "es": "Spanish", "fr": "French", "de": "German", "it": "Italian",
}  # fmt: skip
_COMMON = {
    "pt": "não uma uns umas com são você vocês os dos das na nas nos num numa pelo pela pelos pelas ao aos "
    "à às é também mais seu sua seus suas ele ela eles elas foi foram isso isto este esta mas muito "
    "quando qual quais quem há até já em um do da que como por porque onde quanto quantos sobre entre "
    "ser está ter tem depois",
    "en": "the and of to is was were that for with what how are this it you from which have has had by be "
    "on not or who when where why does did can will would your their his her its they there these an "
    "at as but about into",
    "es": "el los las una con del y es está están qué cómo pero más muy sus al lo su se fue fueron también "
    "cuál quién cuándo dónde cuánto por porque que como sobre entre ser ella ellos usted este esta "
    "hay tiene después",
    "fr": "le les des est une et dans pour qui que sur avec pas du au aux ce cette vous nous sont ne par "
    "plus il elle ils quel quelle où comment pourquoi été être ont mais comme sa ses leur c'est qu'il "
    "un la de en",
    "de": "der die das und ist nicht ein eine einen einem einer den dem des mit für auf wie von zu sich "
    "auch wird werden war waren sind ich du er sie es wir was wer wann wo warum oder aber als im am "
    "bei nach",
    "it": "il che di è della delle degli dei nel nella per una non sono con gli alla anche come questo "
    "questa quale perché chi dove quando quanto lo la le un si da al ha hanno essere più ma se suo "
    "sua loro",
}  # fmt: skip
_ASKED = {
    "pt": "pergunta resposta instrução usuário contexto",
    "en": "question answer response instruction context",
    "es": "pregunta respuesta instrucción usuario",
    "fr": "réponse",
    "de": "frage antwort",
    "it": "domanda risposta",
}
_WORD = re.compile(r"[^\W\d_]+")


_SHARED = "de a o e as no se la en un me te si le par per para do den in"
"""Common in several languages, and so a sign of none."""


def _distinctive(words: Mapping[str, str]) -> dict[str, str]:
    """word → the only language that has it."""
    seen = Counter(word for text in words.values() for word in set(text.split()))
    shared = set(_SHARED.split())
    return {
        word: code
        for code, text in words.items()
        for word in text.split()
        if seen[word] == 1 and word not in shared
    }


_LANGUAGE_OF = _distinctive(_COMMON)
_LANGUAGE_OF_FRAME = _distinctive({code: f"{_COMMON[code]} {_ASKED[code]}" for code in _COMMON})


@dataclass(frozen=True)
class Guess:
    """A language, and how sure it is."""

    code: str
    certainty: float
    """Share of the evidence that speaks for it, 0 to 1; a single word is never more than a half."""
    words: int
    """How many words spoke, for any language; of a data set, how many rows."""

    @property
    def name(self) -> str:
        """In English."""
        return LANGUAGES[self.code]

    def __str__(self) -> str:
        return f"{self.name} (certainty {self.certainty:.0%})"


def guess_language(text: str, *, is_frame: bool = False) -> Guess | None:
    """The language of a text; None when no word of it speaks for one.

    Args:
        is_frame: The text stands around questions and answers: "Pergunta" and "Resposta" count too.
    """
    known = _LANGUAGE_OF_FRAME if is_frame else _LANGUAGE_OF
    composed = unicodedata.normalize("NFC", text).casefold()
    votes = Counter(code for word in _WORD.findall(composed) if (code := known.get(word)) is not None)
    if not votes:
        return None
    ((code, best),) = votes.most_common(1)
    return Guess(code, best / (votes.total() + 1), votes.total())


@dataclass
class LanguageCount:
    """The languages of many texts: each has one vote."""

    votes: Counter[str] = field(default_factory=Counter)

    def add(self, text: str) -> None:
        """Count one text; its first thousand characters are enough."""
        if (found := guess_language(text[:1000])) is not None:
            self.votes[found.code] += 1

    def guess(self) -> Guess | None:
        """The language of most; None when nothing speaks for any."""
        if not self.votes:
            return None
        ((code, best),) = self.votes.most_common(1)
        return Guess(code, best / (self.votes.total() + 1), self.votes.total())
