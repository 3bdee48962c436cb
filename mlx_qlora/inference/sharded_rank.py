"""One rank of several that answer together: what its process does, and what it says of itself meanwhile."""

from __future__ import annotations

import faulthandler
import hashlib
import os
import threading
import time
import traceback
import zlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mlx_qlora.errors import MlxQloraError, ModelError
from mlx_qlora.inference.sharded_links import Link, Message

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_qlora.inference.generate import Answer, Assistant

HEARTBEAT_SECONDS = 1.0
JOIN_SECONDS = 60.0
"""A rank that is still joining then, with nobody to stop it, ends itself."""


class Together:
    """What ranks decide together. Every method must be called by all ranks, in the same order.

    Args:
        group: MLX's, of all ranks.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.is_first = group.rank() == 0

    def agreed(self, tokens: mx.array) -> mx.array:
        """Rank 0's tokens: chips of different kinds round differently, and one token decides the next."""
        import mlx.core as mx

        # The others' count as nothing, and must be there: sums in another order would mix layers.
        return mx.distributed.all_sum(tokens * int(self.is_first), group=self.group)

    def from_first(self, tokens: list[int]) -> list[int]:
        """Rank 0's list: a chat template may put a date or a time into its own."""
        import mlx.core as mx

        lengths: list[int] = self.agreed(mx.array([len(tokens)])).tolist()  # type: ignore[assignment]
        length = lengths[0]
        own = (tokens + [0] * length)[:length]
        agreed: list[int] = self.agreed(mx.array(own, mx.int32)).tolist()  # type: ignore[assignment]
        return agreed

    def meet(self) -> None:
        """Go on when all are here: mlx-lm has begun a token beyond the last, and needs its peers for it."""
        import mlx.core as mx
        from mlx_lm.generate import generation_stream

        mx.synchronize(generation_stream)  # two streams must not talk to the ring at once
        mx.eval(self.agreed(mx.array([0])))

    def check_same(self, **values: str) -> None:
        """Refuse ranks that do not have the same of what must be the same.

        Raises:
            ModelError: names what differs, and the ranks; on every rank.
        """
        import mlx.core as mx

        row = mx.array([[zlib.crc32(text.encode()) for text in values.values()]], mx.uint32)
        rows: list[list[int]] = mx.distributed.all_gather(row, group=self.group).tolist()  # type: ignore[assignment]
        lines = []
        for column, name in enumerate(values):
            others = [str(rank) for rank, own in enumerate(rows) if own[column] != rows[0][column]]
            if others:
                lines.append(f"  {name}: on rank {', '.join(others)} it is not rank 0's")
        if lines:
            raise ModelError("The ranks do not have the same model:\n" + "\n".join(lines))


class RankProcess:
    """Answers as one of several ranks.

    Args:
        link: To who watches; when it closes, this process ends at once.
        job: What is asked, of what: see `sharded_question.Question.message`.
    """

    def __init__(self, link: Link, job: Message) -> None:
        self.link, self.job = link, job
        self.phase, self.num_tokens = "starting", 0

    def run(self) -> None:
        """Answer, and send how it ended: the last thing that is heard of this rank."""
        for task in (self._beat, self._listen):
            threading.Thread(target=task, daemon=True).start()
        try:
            ending = self._answered()
        except MlxQloraError as error:
            ending = {"ending": "error", "what": error.what, "where": error.where, "run": error.run}
            ending["exit_code"] = error.exit_code
        except BaseException as error:  # whatever it is, who watches decides what follows
            ending = {"ending": "fault", "what": f"{type(error).__name__}: {error}", "trace": _trace()}
        self.link.send(ending)

    def _answered(self) -> Message:
        together = Together(self._joined())
        self._enter("loading")
        import mlx.core as mx

        from mlx_qlora.inference.sharded import read_part, shard

        assistant = self._assistant()
        base = assistant.base
        together.check_same(weights=base.fingerprint, type=base.dtype, format=repr(base.scheme))
        mx.reset_peak_memory()
        sharding = shard(assistant.model, together.group, self.job["sharding"])
        read_part(assistant.model)
        loaded_bytes = mx.get_active_memory()
        if together.is_first:
            self._tell_notes(base.notes)
        answer = self._generated(assistant, together)
        return {
            "ending": "finished",
            "tokens": answer.generation_tokens,
            "text_sha256": hashlib.sha256(answer.text.encode()).hexdigest(),
            "sharding": sharding,
            "weights_bytes": loaded_bytes,
            "peak_memory_bytes": mx.get_peak_memory(),
        }

    def _joined(self) -> Any:
        self._enter("joining")
        # Only a thread outside Python can end this process here: MLX keeps the interpreter to itself.
        faulthandler.dump_traceback_later(JOIN_SECONDS, exit=True)
        import mlx.core as mx

        group = mx.distributed.init(strict=True, backend=self.job["backend"])
        faulthandler.cancel_dump_traceback_later()
        return group

    def _assistant(self) -> Assistant:
        from mlx_qlora.config import QuantizationConfig
        from mlx_qlora.inference.generate import load_assistant

        stored = self.job["quantization"]
        return load_assistant(
            **self.job["options"],
            quantization=QuantizationConfig.model_validate(stored) if stored is not None else None,
            on_bytes=self._on_bytes if self.job["rank"] == 0 else None,
            is_lazy=True,
        )

    def _generated(self, assistant: Assistant, together: Together) -> Answer:
        from mlx_qlora.inference.generate import Sampling, generate_pieces

        prompt = together.from_first(assistant.prompt(self.job["messages"], system=self.job["system"]))
        self._enter("answering")
        answer: Answer | None = None
        pieces = generate_pieces(
            assistant.model,
            assistant.tokenizer,
            prompt,
            Sampling(**self.job["sampling"]),
            agreed=together.agreed,
        )
        for piece, answer in pieces:
            self.num_tokens = answer.generation_tokens
            if together.is_first:
                self.link.send({"piece": piece, "answer": asdict(answer)})
        together.meet()
        if answer is None:
            raise RuntimeError("mlx-lm generated nothing")
        return answer

    def _tell_notes(self, notes: tuple[str, ...]) -> None:
        for note in notes:
            self.link.send({"note": note})

    def _on_bytes(self, done: int, total: int) -> None:
        self.link.send({"bytes": [done, total]})

    def _enter(self, phase: str) -> None:
        self.phase = phase
        self.link.send(self._state())

    def _state(self) -> Message:
        return {"phase": self.phase, "tokens": self.num_tokens}

    def _beat(self) -> None:
        while True:
            time.sleep(HEARTBEAT_SECONDS)
            try:
                self.link.send(self._state())
            except OSError:
                os._exit(1)

    def _listen(self) -> None:
        while True:
            try:
                self.link.received()
            except (OSError, EOFError, ValueError):
                os._exit(1)  # without clean-up, which may wait for other ranks


def _trace() -> str:
    return traceback.format_exc(limit=-12)
