"""Other stacks use the server as they use OpenAI's: its Python client, curl, Express."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mlx_qlora.serving.limits import Limits
from tests.served import chat, serving

EXAMPLE = Path(__file__).parents[2] / "examples" / "express-backend"
KEY = "a-key-of-more-than-16"
MESSAGES = [{"role": "user", "content": "quem venceu a partida?"}]


@pytest.fixture
def client(served):
    openai = pytest.importorskip("openai")
    import httpx

    with httpx.Client(verify=False, trust_env=False) as transport:
        yield openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, http_client=transport)


def test_openais_client_gets_the_same_text_whole_and_in_pieces(client):
    asked = {"model": "one", "messages": MESSAGES, "max_tokens": 12, "seed": 7, "temperature": 0.8}
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content != ""
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens > 0
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0  # the same prompt, a moment later
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_what_openais_client_sends_by_itself_and_its_own_answers_are_taken(client):
    first = client.chat.completions.create(
        model="base", messages=MESSAGES, max_completion_tokens=4, user="u", metadata={"a": "b"}, store=False,
        n=1, response_format={"type": "text"}, service_tier="auto", parallel_tool_calls=True,
    )  # fmt: skip
    conversation = [*MESSAGES, first.choices[0].message.model_dump(), {"role": "developer", "content": "x"}]
    parts = [{"type": "text", "text": "quem "}, {"type": "text", "text": "mais?"}]
    second = client.chat.completions.create(
        model="base", messages=[*conversation, {"role": "user", "content": parts}], max_tokens=2
    )
    assert second.usage.completion_tokens <= 2


def test_openais_client_raises_its_own_errors(client):
    import openai

    with pytest.raises(openai.NotFoundError, match="base, tiny-llama, one, two"):
        client.chat.completions.create(model="gpt-4o", messages=MESSAGES)
    with pytest.raises(openai.UnprocessableEntityError, match="max_token"):
        client.chat.completions.create(model="one", messages=MESSAGES, extra_body={"max_token": 3})
    assert [model.id for model in client.models.list()] == ["base", "tiny-llama", "one", "two"]
    assert client.models.retrieve("one").id == "one"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("three")


def test_a_chats_log_probabilities_are_those_of_its_tokens(client):
    answer = client.chat.completions.create(
        model="one", messages=MESSAGES, max_tokens=6, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for each in content:
        best = [top.logprob for top in each.top_logprobs]
        assert best == sorted(best, reverse=True)
        assert each.logprob == best[0] <= 0  # temperature 0 takes the likeliest
        assert bytes(each.bytes).decode() == each.token
    streamed = [
        entry
        for chunk in client.chat.completions.create(
            model="one", messages=MESSAGES, max_tokens=6, logprobs=True, top_logprobs=3, stream=True
        )
        if chunk.choices and chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [each.token for each in streamed] == [each.token for each in content]
    assert [each.logprob for each in streamed] == pytest.approx([each.logprob for each in content], abs=1e-4)


def test_completions_take_text_and_tokens_one_or_several_with_their_log_probabilities(client):
    asked = {"model": "one", "max_tokens": 5, "logprobs": 2}
    one = client.completions.create(**asked, prompt="o clube")
    several = client.completions.create(**asked, prompt=["o clube", "a partida"])
    assert [choice.index for choice in several.choices] == [0, 1]
    assert several.choices[0].text == one.choices[0].text
    assert several.usage.completion_tokens == 10
    found = one.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == 5
    assert found.text_offset[0] == 0
    assert found.text_offset == sorted(found.text_offset)
    assert all(1 <= len(top) <= 2 for top in found.top_logprobs)
    lists = client.completions.create(**asked, prompt=[[70, 71], [72]])
    single = client.completions.create(**asked, prompt=[70, 71])
    assert lists.choices[0].text == single.choices[0].text
    assert single.usage.prompt_tokens == 2
    texts = ["", ""]
    for chunk in client.completions.create(**asked, prompt=["o clube", "a partida"], stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in several.choices]


def test_an_answer_ends_before_a_stop_text(client):
    asked = {"model": "one", "prompt": "o clube venceu", "max_tokens": 12}
    text = client.completions.create(**asked).choices[0].text
    word = text[3:5]
    stopped = client.completions.create(**asked, stop=[word]).choices[0]
    assert stopped.text == text[: text.index(word)]
    assert stopped.finish_reason == "stop"


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl is installed")
def test_curl_streams_an_answer(served):
    done = subprocess.run(
        ["curl", "--silent", "--show-error", "--no-buffer", "--noproxy", "*",
         f"{served.url}/v1/chat/completions", "--json", json.dumps(chat("two", stream=True))],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    events = [line for line in done.stdout.splitlines() if line]
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in events[:-1]]
    with served.client() as client:
        whole = client.post("/v1/chat/completions", json=chat("two")).json()
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]


@pytest.fixture(scope="session")
def example(tmp_path_factory):
    """The Express example with its packages, installed as its README says."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("no Node is installed")
    folder = tmp_path_factory.mktemp("express") / "express-backend"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("node_modules"))
    if (EXAMPLE / "node_modules").is_dir():
        (folder / "node_modules").symlink_to(EXAMPLE / "node_modules")
        return folder
    done = subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--fetch-retries=0"],
        cwd=folder, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"npm cannot install Express here: {done.stderr.strip()[-200:]}")
    return folder


def test_a_backend_with_express_streams_an_answer_and_keeps_the_key(
    example, tiny_llama_folder, adapter_folders
):
    import httpx

    adapters = ("--adapter", f"one={adapter_folders['one']}")
    with serving(tiny_llama_folder, *adapters, key=KEY) as model_server:
        with model_server.client() as client:
            whole = client.post("/v1/chat/completions", json=chat("one", "oi", max_tokens=256)).json()
        environment = {
            "MLX_QLORA_URL": model_server.url,
            "MLX_QLORA_API_KEY": KEY,
            "ADAPTER": "one",
            "PORT": "0",
        }
        backend = subprocess.Popen(
            ["node", "server.js"], cwd=example, env={**os.environ, **environment}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            assert backend.stdout is not None
            url = re.search(r"http://\S+", backend.stdout.readline())[0]
            with httpx.Client(base_url=url, timeout=60, verify=False, trust_env=False) as client:
                with client.stream("POST", "/ask", json={"question": "oi"}) as answer:
                    assert answer.status_code == 200, answer.read()
                    pieces = list(answer.iter_text())
                assert "".join(pieces) == whole["choices"][0]["message"]["content"]
                assert len(pieces) > 1
                for wrong in ({}, {"question": 3}, {"question": " "}, {"question": "a" * 5000}):
                    assert client.post("/ask", json=wrong).status_code == 422
                with client.stream("POST", "/ask", json={"question": "outra vez"}) as answer:
                    next(answer.iter_text())
                model_server.logged(" 499 ")  # its visitor left
        finally:
            backend.terminate()
            backend.wait(10)
            backend.stdout.close()


def test_every_limit_is_in_the_description(served):
    with served.client() as client:
        description = client.get("/openapi.json").json()["info"]["description"]
    for name in vars(Limits()):
        assert f"{name} = " in description
