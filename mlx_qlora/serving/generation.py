"""The loop of the generation thread: jobs join and leave the batch between its steps."""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_qlora.serving.batch import Batch, Token
from mlx_qlora.serving.jobs import (
    AnswerText,
    EngineStats,
    EngineStopped,
    FinishReason,
    Job,
    JobFailed,
    Piece,
    QueueFull,
    TokenLogprob,
)
from mlx_qlora.serving.prompt_cache import PromptCache
from mlx_qlora.serving.row_lora import Row
from mlx_qlora.serving.sampling import Drawing

EARLY_CACHE_TOKENS = 128
"""A prompt with so many tokens of its own is remembered as soon as it is read, not only with its answer."""

_STOP: FinishReason = "stop"
_LENGTH: FinishReason = "length"

Listener = Callable[[Piece | JobFailed], None]
Observe = Callable[[str, float], None]


@dataclass(eq=False)
class Running:
    """A job on its way."""

    job: Job
    adapter: int
    """Row of the adapter stacks."""
    listener: Listener
    text: AnswerText
    submitted: float
    """By `time.monotonic`."""
    row: Row | None = None
    """Its place in the batch; None while it waits."""
    num_cached: int = 0
    num_generated: int = 0
    is_cancelled: bool = False

    def is_late(self, now: float) -> bool:
        """Whether its time is over."""
        return self.job.timeout_seconds is not None and now - self.submitted >= self.job.timeout_seconds

    def piece(
        self, text: str = "", logprobs: tuple[TokenLogprob, ...] = (), reason: FinishReason | None = None
    ) -> Piece:
        """What a step gave, with the counts so far."""
        return Piece(text, logprobs, reason, len(self.job.tokens), self.num_cached, self.num_generated)


class Desk:
    """The jobs that wait and run: what the generation thread and all others share.

    Args:
        max_running: Jobs that generate at the same time.
        max_queue: Jobs that wait beyond these.
    """

    def __init__(self, max_running: int, max_queue: int) -> None:
        self.max_running, self.max_queue = max_running, max_queue
        self.changed = threading.Condition()
        """Held while anything here is read or changed by more than one word; notified of changes."""
        self.queue: deque[Running] = deque()
        self.running: dict[Row, Running] = {}
        self.num_open = 0
        """Jobs whose listener has not got its last call."""
        self.counts = dict.fromkeys(("finished", "cancelled", "failed", "prompt", "cached", "generated"), 0)
        self.is_draining = self.is_stopping = False
        self.error: BaseException | None = None

    def submit(self, running: Running) -> None:
        """Let a job wait for its turn.

        Raises:
            QueueFull: too many jobs wait.
            EngineStopped: no jobs are taken any more.
        """
        with self.changed:
            if self.error is not None:
                raise EngineStopped(f"Generation has ended: {type(self.error).__name__}: {self.error}")
            if self.is_draining or self.is_stopping:
                raise EngineStopped("The server is stopping and takes no new requests.")
            if len(self.queue) + len(self.running) >= self.max_running + self.max_queue:
                raise QueueFull(self.max_queue)
            self.queue.append(running)
            self.num_open += 1
            self.changed.notify_all()

    def cancel(self, running: Running) -> None:
        """Mark a job to be ended at the next step."""
        with self.changed:
            running.is_cancelled = True
            self.changed.notify_all()

    def everyone(self) -> list[Running]:
        """All jobs that run or wait."""
        with self.changed:
            return [*self.running.values(), *self.queue]

    def next_waiting(self) -> Running | None:
        """The job whose turn it is; None when there is none or no place is free."""
        with self.changed:
            is_free = self.queue and len(self.running) < self.max_running
            return self.queue[0] if is_free else None

    def seat(self, running: Running, row: Row) -> None:
        """The first job of the queue gets its row."""
        with self.changed:
            self.queue.remove(running)
            self.running[row] = running
            running.row = row

    def leave(self, running: Running, count: str) -> None:
        """A job has ended; `count` says how."""
        with self.changed:
            if running.row is not None:
                self.running.pop(running.row, None)
            elif running in self.queue:
                self.queue.remove(running)
            self.counts[count] += 1

    def close(self, running: Running, last: Piece | JobFailed) -> None:
        """Tell a job's listener its end; nothing follows."""
        try:
            running.listener(last)
        except Exception:  # a listener's own fault ends no other's text
            running.is_cancelled = True
        with self.changed:
            self.num_open -= 1
            self.changed.notify_all()

    def stats(self, *, is_alive: bool) -> EngineStats:
        """Counts up to now."""
        with self.changed:
            counts = self.counts
            return EngineStats(
                num_queued=len(self.queue),
                num_running=len(self.running),
                num_finished=counts["finished"],
                num_cancelled=counts["cancelled"],
                num_failed=counts["failed"],
                num_prompt_tokens=counts["prompt"],
                num_cached_tokens=counts["cached"],
                num_generated_tokens=counts["generated"],
                is_alive=is_alive and self.error is None,
            )


class Generation:
    """Moves jobs from the desk through a batch. All of it runs on the generation thread.

    Args:
        observe: Called with ("first_token_seconds" | "request_seconds", seconds), both from submission.
        text_of: The text of one token.
    """

    def __init__(
        self,
        desk: Desk,
        batch: Batch,
        prompts: PromptCache,
        *,
        observe: Observe,
        text_of: Callable[[int], str],
    ) -> None:
        self._desk, self._batch, self._prompts = desk, batch, prompts
        self._observe, self._text_of = observe, text_of

    def run(self) -> None:
        """Serve until the desk is stopping, then cancel what is left."""
        while self._has_work():
            self._end_cancelled_and_late()
            self._admit()
            if self._desk.running:
                self._advance()
        for running in self._desk.everyone():
            self._end(running, "cancelled")

    def _has_work(self) -> bool:
        """Waits for a job; False when the desk is stopping."""
        desk = self._desk
        with desk.changed:
            if not desk.queue and not desk.running and not desk.is_stopping:
                mx.clear_cache()
                desk.changed.wait_for(lambda: desk.queue or desk.is_stopping)
            return not desk.is_stopping

    def _end_cancelled_and_late(self) -> None:
        now = time.monotonic()
        for running in self._desk.everyone():
            if running.is_cancelled:
                self._end(running, "cancelled")
            elif running.is_late(now):
                text, logprobs, _ = running.text.finish()
                self._end(running, "timeout", text, logprobs)

    def _admit(self) -> None:
        while (running := self._desk.next_waiting()) is not None:
            job = running.job
            seed = secrets.randbits(64) if job.seed is None else job.seed
            row = Row(job, running.adapter, Drawing(job.temperature, job.top_p, job.top_k, job.min_p, seed))
            cached = self._prompts.find(row.adapter, job.tokens)
            running.num_cached = len(cached[0]) if cached else 0
            self._desk.seat(running, row)
            self._desk.counts["prompt"] += len(job.tokens)
            self._desk.counts["cached"] += running.num_cached
            self._batch.add(row, cached)

    def _advance(self) -> None:
        ready, tokens = self._batch.step()
        for row in ready:
            num_new = len(row.job.tokens) - self._desk.running[row].num_cached
            if num_new >= EARLY_CACHE_TOKENS and self._prompts.max_bytes:
                self._prompts.keep(row.adapter, *self._batch.cached_of(row))
        for token in tokens:
            running = self._desk.running[token.row]
            try:
                self._take(running, token)
            except Exception as error:  # of this row alone: the batch has made its step
                self._fail(running, f"The job failed: {type(error).__name__}: {error}")

    def _take(self, running: Running, token: Token) -> None:
        running.num_generated += 1
        self._desk.counts["generated"] += 1
        if running.num_generated == 1:
            self._observe("first_token_seconds", time.monotonic() - running.submitted)
        if not np.isfinite(token.logprob):
            who = f"the adapter {running.job.adapter}" if running.job.adapter else "the model"
            self._fail(running, f"The numbers of {who} are not finite on this prompt.")
            return
        if token.is_eos:
            (text, logprobs, _), reason = running.text.finish(), _STOP
        else:
            text, logprobs, is_stopped = running.text.add(token.token, self._logprob(running.job, token))
            if token.is_last and not is_stopped:
                more, more_logprobs, is_stopped = running.text.finish()
                text, logprobs = text + more, logprobs + more_logprobs
            if not is_stopped and not token.is_last:
                self._tell(running, running.piece(text, logprobs))
                return
            reason = _STOP if is_stopped else _LENGTH
        self._remember(token)
        self._end(running, reason, text, logprobs)

    def _remember(self, token: Token) -> None:
        if self._prompts.max_bytes:
            cached = token.cached if token.cached is not None else self._batch.cached_of(token.row)
            self._prompts.keep(token.row.adapter, *cached)

    def _logprob(self, job: Job, token: Token) -> TokenLogprob | None:
        if job.num_top_logprobs is None:
            return None
        logprobs_V = np.array(token.logprobs_V.astype(mx.float32))
        count = min(job.num_top_logprobs, len(logprobs_V))
        best: list[int] = np.argpartition(-logprobs_V, count - 1)[:count].tolist() if count else []
        ordered = sorted(best, key=lambda each: (-logprobs_V[each], each))
        top = tuple((each, self._text_of(each), float(logprobs_V[each])) for each in ordered)
        return TokenLogprob(token.token, self._text_of(token.token), token.logprob, top)

    def _end(
        self,
        running: Running,
        reason: FinishReason,
        text: str = "",
        logprobs: tuple[TokenLogprob, ...] = (),
    ) -> None:
        self._leave(running, "cancelled" if reason == "cancelled" else "finished")
        self._observe("request_seconds", time.monotonic() - running.submitted)
        self._desk.close(running, running.piece(text, logprobs, reason))

    def _fail(self, running: Running, what: str) -> None:
        self._leave(running, "failed")
        self._desk.close(running, JobFailed(what))

    def _leave(self, running: Running, count: str) -> None:
        if running.row is not None:
            self._batch.remove(running.row)
        self._desk.leave(running, count)

    def _tell(self, running: Running, piece: Piece) -> None:
        try:
            running.listener(piece)
        except Exception:  # a listener's own fault ends no other's text
            running.is_cancelled = True
