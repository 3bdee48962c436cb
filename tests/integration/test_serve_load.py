"""Fifty streams at once, of several adapters, some left in the middle: the others lose nothing."""

import asyncio
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.served import chat

CHAT = "/v1/chat/completions"
REPOSITORY = Path(__file__).parents[2]
MODELS, QUESTIONS = ("base", "one", "two"), ("quem venceu?", "onde?", "a partida no estádio")


def question(model, content):
    return chat(model, content, max_tokens=10, ignore_eos=True)


async def streamed(port, body, leaves_after):
    """The text of a stream, or None when it was left after so many events."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    content = json.dumps({**body, "stream": True}).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    )
    writer.write(head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
    text, num_events, is_done = "", 0, False
    try:
        assert (await reader.readline()).split()[1] == b"200"
        while line := await reader.readline():
            if not line.startswith(b"data: "):
                continue
            if is_done := line.startswith(b"data: [DONE]"):
                break
            text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
            num_events += 1
            if leaves_after is not None and num_events > leaves_after:
                return None
    finally:
        writer.close()
    assert is_done
    return text


def test_fifty_streams_with_clients_that_leave_give_each_his_own_text(served):
    with served.client() as client:
        alone = {
            (model, content): client.post(CHAT, json=question(model, content)).json()["choices"][0]["message"]
            for model in MODELS
            for content in QUESTIONS
        }
    draw = random.Random(5)
    asked = [(draw.choice(MODELS), draw.choice(QUESTIONS)) for _ in range(50)]
    leaves = [draw.randint(0, 4) if draw.random() < 0.3 else None for _ in asked]

    async def everyone():
        return await asyncio.gather(
            *(streamed(served.port, question(*who), after) for who, after in zip(asked, leaves, strict=True))
        )

    texts = asyncio.run(everyone())
    whole = [(who, text) for who, text, after in zip(asked, texts, leaves, strict=True) if after is None]
    assert len(whole) > 25
    for who, text in whole:
        assert text == alone[who]["content"], who
    until = time.monotonic() + 20
    with served.client() as client:
        while "requests_running 0.0" not in (counts := client.get("/metrics").text):
            assert time.monotonic() < until, counts
            time.sleep(0.05)
    assert "requests_queued 0.0" in counts


@pytest.mark.slow
def test_the_benchmark_measures_both_servers():
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "benchmarks" / "server.py"), "--json", "--seconds", "6",
         "--streams", "4", "--max-tokens", "4", "--hidden", "64", "--layers", "1", "--adapters", "2"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout, done.stderr
    result = json.loads(done.stdout)
    for side in ("ours", "mlx_lm"):
        median = result["sides"][side]["median"]
        assert median["answers"] > 0
        assert median["tokens_per_second"] > 0
        assert median["memory_mib"] > 50
    assert result["sides"]["ours"]["median"]["lost"] == 0
    assert result["mixed"].keys() == {"single", "mixed", "ratio"}
