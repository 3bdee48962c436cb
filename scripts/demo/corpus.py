"""Random questions and answers in Portuguese, for pretraining the demo model.

Every row asks for one attribute of an invented club, town, person, book or river, and every value is drawn
anew, so a model can learn the form, the spelling and which wordings ask for the same thing, but no fact.
Neither the demo club's name nor any wording of its test set appears here, for any club.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

HERE = Path(__file__).parent
RESERVED = "valbruma"
OPENINGS = ("Olá! ", "Por favor: ", "Uma pergunta: ", "Tenho uma dúvida: ", "Diz-me: ", "Bom dia! ")
TOPIC_SHARE, SECOND_TURN_SHARE, OPENING_SHARE = 0.15, 0.06, 0.08

Turn = tuple[str, str]


@dataclass(frozen=True)
class Attribute:
    """One thing that can be asked about a club, in ten or so wordings."""

    key: str
    kind: str
    answer: str
    train: list[str]
    valid: str
    test: list[str]
    base: list[str]

    @property
    def pretraining_wordings(self) -> list[str]:
        """All wordings but those of the test set, which no club's question uses before the test."""
        return [*self.train, self.valid, *self.base]


@cache
def attributes() -> tuple[Attribute, ...]:
    """The attributes of a club, read from ``wordings.yaml``."""
    return tuple(Attribute(**row) for row in _read("wordings.yaml"))


@cache
def topics() -> tuple[dict, ...]:
    """What else is asked about, read from ``topics.yaml``."""
    return tuple(_read("topics.yaml"))


@cache
def words(name: str) -> tuple[str, ...]:
    """One word list of ``values.yaml``; a lower-case article stays with its noun."""
    parts = _read("values.yaml")[name].split()
    if parts[0] in ("a", "o", "um", "uma"):
        return tuple(f"{article} {noun}" for article, noun in zip(parts[::2], parts[1::2], strict=True))
    return tuple(parts)


@cache
def _read(name: str) -> list | dict:
    return yaml.safe_load((HERE / name).read_text(encoding="utf-8"))


def draw_place(rng: random.Random) -> str:
    """An invented place name of two or three syllables, now and then with an adjective."""
    while True:
        middle = rng.choice(words("syllables_middle")) if rng.random() < 0.6 else ""
        name = rng.choice(words("syllables_first")) + middle + rng.choice(words("syllables_last"))
        if RESERVED not in name.lower():
            break
    return f"{name} {rng.choice(words('place_suffixes'))}" if rng.random() < 0.15 else name


def draw_person(rng: random.Random) -> str:
    """A first name and a surname."""
    return f"{rng.choice(words('first_names'))} {rng.choice(words('surnames'))}"


def draw_club(rng: random.Random) -> str:
    """A club's name as a question would say it: the place alone, or a form and the place."""
    place = draw_place(rng)
    return place if rng.random() < 0.6 else f"{rng.choice(words('club_forms'))} de {place}"


def _of_noun(rng: random.Random) -> str:
    """``da Neblina`` or ``do Moinho``."""
    if rng.random() < 0.5:
        return f"da {rng.choice(words('feminine_nouns'))}"
    return f"do {rng.choice(words('masculine_nouns'))}"


def _two_colours(rng: random.Random) -> str:
    return " e ".join(rng.sample(words("colours"), 2))


VALUES: dict[str, Callable[[random.Random], str]] = {
    "year": lambda rng: str(rng.randint(1880, 2019)),
    "person": draw_person,
    "place": draw_place,
    "club": draw_club,
    "stadium": lambda rng: f"{rng.choice(('Estádio', 'Estádio', 'Campo', 'Arena'))} {_of_noun(rng)}",
    "title": lambda rng: f"{rng.choice(('Canto', 'Diário', 'Sonho', 'Segredo'))} {_of_noun(rng)}",
    "academy": lambda rng: f"{rng.choice(words('academies'))} {_of_noun(rng)}",
    "nickname": lambda rng: f"os {rng.choice(words('nicknames'))} {_of_noun(rng)}",
    "capacity": lambda rng: str(100 * rng.randint(20, 899)),
    "goals": lambda rng: str(rng.randint(60, 499)),
    "cup_score": lambda rng: f"{rng.randint(3, 7)} a {rng.randint(0, 2)}",
    "big_score": lambda rng: f"{rng.randint(7, 19)} a {rng.randint(0, 2)}",
    "colours": _two_colours,
    "animal": lambda rng: rng.choice(words("animals")),
    "emblem": lambda rng: rng.choice(words("emblems")),
    "ordinal": lambda rng: rng.choice(words("ordinals")),
    "profession": lambda rng: rng.choice(words("professions")),
}


def draw_conversation(rng: random.Random) -> list[Turn]:
    """One random conversation of one question, seldom two about the same club."""
    if rng.random() < TOPIC_SHARE:
        topic = rng.choice(topics())
        subject, value = VALUES[topic["subject"]](rng), VALUES[topic["kind"]](rng)
        return [(_ask(rng, rng.choice(topic["wordings"]).format(s=subject)), topic["answer"].format(v=value))]
    club, attribute = draw_club(rng), rng.choice(attributes())
    value = VALUES[attribute.kind](rng)
    turns = [_turn(rng, club, attribute, value)]
    if rng.random() < SECOND_TURN_SHARE:
        # The same attribute must get the same answer, which ties its wordings together.
        if rng.random() < 0.5:
            attribute = rng.choice(attributes())
            value = VALUES[attribute.kind](rng)
        turns.append(_turn(rng, club, attribute, value))
    return turns


def _turn(rng: random.Random, club: str, attribute: Attribute, value: str) -> Turn:
    question = rng.choice(attribute.pretraining_wordings).format(c=club)
    return _ask(rng, question), attribute.answer.format(v=value)


def _ask(rng: random.Random, question: str) -> str:
    if rng.random() >= OPENING_SHARE:
        return question
    opening = rng.choice(OPENINGS)
    return opening + (question if opening.endswith("! ") else question[0].lower() + question[1:])


def conversations(seed: int) -> Iterator[list[Turn]]:
    """An endless stream of random conversations; the same seed gives the same stream."""
    rng = random.Random(seed)
    while True:
        yield draw_conversation(rng)
