import asyncio
import json
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_qlora.serving.answers import ChatForm, TextForm
from mlx_qlora.serving.jobs import JobFailed, Piece, TokenLogprob
from mlx_qlora.serving.limits import Limits, Refusal
from mlx_qlora.serving.streaming import EventStream, Mailbox, Reply, collect, watched


class Ticket:
    """Counts how often it was cancelled."""

    def __init__(self):
        self.num_cancelled = 0

    def cancel(self):
        self.num_cancelled += 1


def last(text="", reason="stop", **numbers):
    return Piece(text, finish_reason=reason, **numbers)


def reply_in(loop, num_jobs=1, **limits):
    reply = Reply(Mailbox(loop), num_jobs, limits=Limits(**limits))
    tickets = [Ticket() for _ in range(num_jobs)]
    for ticket in tickets:
        reply.hold(ticket)
    return reply, tickets


def in_loop(function):
    async def run():
        return await asyncio.wait_for(function(asyncio.get_running_loop()), 20)

    return asyncio.run(run())


@settings(max_examples=25, deadline=None)
@given(texts=st.lists(st.lists(st.text(max_size=3), min_size=1, max_size=8), min_size=1, max_size=3))
def test_pieces_posted_by_another_thread_arrive_whole_and_in_order(texts):
    async def run(loop):
        reply, _ = reply_in(loop, len(texts))

        def generate(index, pieces):
            listener = reply.listener(index)
            for text in pieces[:-1]:
                listener(Piece(text))
            listener(last(pieces[-1], prompt_tokens=3, generated_tokens=len(pieces)))

        threads = [threading.Thread(target=generate, args=item) for item in enumerate(texts)]
        for thread in threads:
            thread.start()
        choices = await collect(reply)
        for thread in threads:
            thread.join()
        return choices

    choices = in_loop(run)
    assert [choice.text for choice in choices] == ["".join(pieces) for pieces in texts]
    assert [choice.generated_tokens for choice in choices] == [len(pieces) for pieces in texts]
    assert {choice.finish_reason for choice in choices} == {"stop"}


def test_a_reader_that_leaves_too_much_lying_is_cut_off_with_the_limit_and_the_rest_is_dropped():
    async def run(loop):
        reply, (ticket,) = reply_in(loop, buffered_pieces=3)
        for _ in range(50):
            reply.put((0, Piece("a")))
        assert ticket.num_cancelled == 1
        kept = await reply.take()
        assert len(kept) == 4
        with pytest.raises(Refusal) as caught:
            await reply.take()
        return caught.value

    refusal = in_loop(run)
    assert (refusal.status, refusal.limit) == (503, ("buffered_pieces", 3))


@pytest.mark.parametrize(
    ("end", "status", "code"),
    [
        (JobFailed("no numbers"), 500, "generation_failed"),
        (last(reason="timeout"), 503, "request_seconds"),
        (last(reason="cancelled"), 503, "stopping"),
    ],
)
def test_an_answer_that_fails_is_an_error_of_its_own_and_ends_its_sisters(end, status, code):
    async def run(loop):
        reply, tickets = reply_in(loop, 2)
        reply.put((0, Piece("a")))
        reply.put((1, end))
        with pytest.raises(Refusal) as caught:
            await collect(reply)
        reply.cancel()
        assert tickets[0].num_cancelled >= 1
        return caught.value

    refusal = in_loop(run)
    assert (refusal.status, refusal.code) == (status, code)


def test_a_client_that_leaves_cancels_every_job_and_ends_the_waiting():
    async def run(loop):
        reply, tickets = reply_in(loop, 2)
        left = asyncio.Event()

        async def receive():
            await left.wait()
            return {"type": "http.disconnect"}

        async with watched(reply, receive):
            loop.call_later(0.01, left.set)
            await collect(reply)
            assert reply.is_gone
            assert all(ticket.num_cancelled >= 1 for ticket in tickets)

    in_loop(run)


def test_posting_to_a_closed_loop_harms_nobody():
    loop = asyncio.new_event_loop()
    mailbox = Mailbox(loop)
    loop.close()
    for _ in range(3):
        mailbox.post(None, 0, Piece("a"))


def events(reply, form, receive=None, put=()):
    """What an EventStream sends for these items: the status, and the objects."""

    async def run(_loop):
        sent = []

        async def never():
            await asyncio.Event().wait()

        async def send(message):
            sent.append(message)

        for item in put:
            reply.put(item)
        ended = []
        await EventStream(reply, form, on_end=lambda: ended.append(1))(
            {"type": "http"}, receive or never, send
        )
        assert ended == [1]
        body = b"".join(message.get("body", b"") for message in sent).decode()
        return sent[0], body

    start, body = in_loop(run)
    if start["status"] != 200:
        return start["status"], json.loads(body)
    return 200, [line.removeprefix("data: ") for line in body.split("\n\n") if line]


def form(kind=ChatForm, **more):
    return kind("um", **{"has_logprobs": False, "includes_usage": False, **more})


def fresh(num_jobs=1):
    return in_loop(lambda loop: _fresh(loop, num_jobs))


async def _fresh(loop, num_jobs):
    return reply_in(loop, num_jobs)[0]


def test_a_chat_is_told_as_openai_tells_it():
    items = [(0, Piece("o clube")), (0, last(" venceu", prompt_tokens=5, generated_tokens=4))]
    status, told = events(fresh(), form(includes_usage=True), put=items)
    *chunks, usage, done = told
    chunks = [json.loads(each) for each in chunks]
    assert (status, done) == (200, "[DONE]")
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(each["choices"][0]["delta"].get("content", "") for each in chunks) == "o clube venceu"
    assert [each["choices"][0]["finish_reason"] for each in chunks][-1] == "stop"
    assert all(each["usage"] is None for each in chunks)
    assert json.loads(usage)["usage"]["total_tokens"] == 9
    assert json.loads(usage)["choices"] == []


def test_pieces_that_waited_together_are_told_in_one_chunk_for_each_choice():
    items = [(index, Piece(text)) for text in "abc" for index in (0, 1)]
    items += [(0, last("!")), (1, last("?"))]
    _, told = events(fresh(2), form(TextForm), put=items)
    chunks = [json.loads(each)["choices"][0] for each in told[:-1]]
    assert [(each["index"], each["text"]) for each in chunks] == [(0, "abc!"), (1, "abc?")]


def test_a_failure_before_the_first_piece_has_a_status_of_its_own_and_later_one_an_event_without_done():
    status, error = events(fresh(), form(), put=[(0, JobFailed("no numbers"))])
    assert (status, error["error"]["code"]) == (500, "generation_failed")

    async def run(loop):
        reply, _ = reply_in(loop)
        reply.put((0, Piece("a")))
        sent = []

        async def send(message):
            sent.append(message)
            if len(sent) == 2:
                reply.put((0, JobFailed("no numbers")))

        await EventStream(reply, form(), on_end=lambda: None)({"type": "http"}, asyncio.Event().wait, send)
        return sent

    sent = in_loop(run)
    assert sent[0]["status"] == 200
    final = sent[-1]
    assert json.loads(final["body"].decode().removeprefix("data: "))["error"]["code"] == "generation_failed"
    assert not final["more_body"]
    assert b"[DONE]" not in b"".join(message.get("body", b"") for message in sent)


def test_log_probabilities_that_json_has_no_number_for_are_openais_lowest():
    token = TokenLogprob(5, "é", float("-inf"), ((5, "é", float("-inf")), (6, "a", -0.5)))
    items = [(0, Piece("é", (token,))), (0, last("a"))]
    _, told = events(fresh(), form(has_logprobs=True), put=items)
    content = json.loads(told[1])["choices"][0]["logprobs"]["content"][0]
    assert content["logprob"] == content["top_logprobs"][0]["logprob"] == -9999.0
    assert content["bytes"] == [195, 169]
    _, told = events(fresh(), form(TextForm, has_logprobs=True), put=items)
    found = json.loads(told[0])["choices"][0]["logprobs"]
    assert found["token_logprobs"] == [-9999.0]
    assert found["top_logprobs"] == [{"a": -0.5, "é": -9999.0}]
