"""How many answers are, word for word, the expected ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlx_qlora.inference.generate import Assistant, Sampling

Conversation = Sequence[dict[str, str]]


@dataclass(frozen=True)
class ExactMatch:
    """Greedy answers to the last turn of each conversation, beside the expected ones."""

    answers: tuple[str, ...]
    expected: tuple[str, ...]

    @property
    def share(self) -> float:
        """Share of answers that equal the expected one, 0 to 1."""
        hits = sum(normalised(a) == normalised(e) for a, e in zip(self.answers, self.expected, strict=True))
        return hits / len(self.expected) if self.expected else 0.0


def normalised(text: str) -> str:
    """Lower case, single spaces, no full stop at the end: what does not change an answer's meaning."""
    return " ".join(text.casefold().split()).rstrip(".")


def exact_match(
    assistant: Assistant,
    conversations: Sequence[Conversation],
    *,
    max_tokens: int = 64,
    on_answer: Callable[[int, int], None] | None = None,
) -> ExactMatch:
    """Ask for the last assistant turn of each conversation and compare it.

    Args:
        conversations: Each ends with the expected assistant turn.
        on_answer: Called with (done, total).
    """
    sampling, answers = Sampling(max_tokens=max_tokens), []
    for done, conversation in enumerate(conversations, start=1):
        *_, (_, answer) = assistant.stream(conversation[:-1], sampling=sampling)
        answers.append(answer.text.strip())
        if on_answer is not None:
            on_answer(done, len(conversations))
    return ExactMatch(tuple(answers), tuple(c[-1]["content"] for c in conversations))
