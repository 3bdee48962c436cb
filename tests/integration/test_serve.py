"""`mlx-qlora serve` as a process: who gets in, clients that leave or stall, its end."""

import contextlib
import json
import signal
import socket
import sys
import threading
import time

import pytest

from mlx_qlora.__main__ import load_command, run
from tests.served import COMMAND, chat, serving

CHAT = "/v1/chat/completions"
KEY = "a-key-of-more-than-16"


@pytest.fixture
def started(capsys, monkeypatch):
    """Exit code and words of the command, when it does not start."""

    def start(*arguments, **environment):
        monkeypatch.delenv("MLX_QLORA_API_KEY", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        code = run(load_command("serve"), list(map(str, arguments)))
        said = capsys.readouterr()
        assert not said.out
        return code, said.err

    return start


def metric(served, name):
    with served.client() as client:
        lines = client.get("/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"mlx_qlora_{name} "))


def until(condition, seconds=20):
    """Wait for a condition; fail when it does not come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def raw_request(port, body, *, version="1.1"):
    """A connection that has sent a request and reads nothing."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(30)
    connection.connect(("127.0.0.1", port))
    content = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/{version}\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


@pytest.fixture(scope="module")
def impatient(tiny_llama_folder):
    """A server with small limits."""
    limits = {"header_seconds": 0.5, "body_seconds": 0.5, "connections": 8}
    small = f"from mlx_qlora.serving.limits import Limits; Limits.__init__.__kwdefaults__.update({limits})\n"
    options = ("--max-batch", 2, "--max-queue", 0, "--stalled-seconds", 0.5, "--request-seconds", 30)
    with serving(tiny_llama_folder, *options, command=[sys.executable, "-c", small + COMMAND]) as running:
        yield running


def long_chat(model="base", **more):
    """An answer that takes a while: it does not end by itself."""
    return chat(model, **{"max_tokens": 480, "ignore_eos": True, **more})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "no key"),
        (["--host", "0.0.0.0", "--api-key-file", "nowhere.txt"], "cannot be read"),
        (["--allow-origin", "*"], "no key"),
        (["--allow-origin", "example.org/path"], "no origin"),
        (["--adapter", "one"], "NAME=PATH"),
        (["--adapter", "a/b=x"], "no adapter name"),
        (["--adapter", "a=x", "--adapter", "a=y"], "Two adapters"),
        (["--adapter", "base=x"], "base model's name"),
        (["--adapter", "tiny-llama=x"], "base model's name"),
        (["--adapter", "one=nowhere"], "no adapter here"),
        (["--host", "no.such.host.invalid", "--api-key-file", "KEY"], "Cannot serve"),
    ],
)
def test_a_wrong_start_is_exit_code_2_and_says_what_to_do(
    started, tiny_llama_folder, tmp_path, arguments, said
):
    (tmp_path / "key").write_text(KEY + "\n")
    arguments = [str(tmp_path / "key") if each == "KEY" else each for each in arguments]
    code, words = started("--model", tiny_llama_folder, "--port", 0, *arguments)
    assert code == 2
    assert said in words
    assert "Run: " in words


def test_a_short_key_or_two_keys_are_refused(started, tiny_llama_folder, tmp_path):
    (tmp_path / "key").write_text(KEY)
    code, words = started("--model", tiny_llama_folder, MLX_QLORA_API_KEY="shorty")
    assert code == 2
    assert "at least 16" in words
    assert "shorty" not in words
    code, words = started(
        "--model", tiny_llama_folder, "--api-key-file", tmp_path / "key", MLX_QLORA_API_KEY=KEY
    )
    assert code == 2
    assert "two keys" in words
    assert KEY not in words


def test_a_port_in_use_is_known_before_a_model_is_loaded(started):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, words = started("--model", "no/such-model", "--port", port)
    assert code == 2
    assert f"port {port}" in words
    assert f"--port {port + 1}" in words


def test_missing_packages_are_named_with_the_command_that_brings_them(started, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    code, words = started("--model", "M")
    assert code == 2
    assert "fastapi" in words
    assert "Run: pip install 'mlx-qlora[serve]'" in words


def test_the_line_when_ready_has_the_address_and_the_names(served):
    assert served.ready == f"Serving {served.url} · models: base, tiny-llama, one, two"


def test_adapters_answer_each_in_their_own_way_at_the_same_time(served):
    def ask(model):
        with served.client() as client:
            answers[model].append(client.post(CHAT, json=chat(model)).json()["choices"][0]["message"])

    answers = {"base": [], "one": [], "two": []}
    for model in answers:
        ask(model)
    threads = [threading.Thread(target=ask, args=(model,)) for model in list(answers) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    texts = {model: {each["content"] for each in found} for model, found in answers.items()}
    assert all(len(found) == 4 for found in answers.values())
    assert all(len(found) == 1 for found in texts.values())
    assert len(set().union(*texts.values())) == 3


def test_a_client_that_leaves_a_stream_or_a_whole_answer_frees_its_slot(served):
    before = metric(served, "answers_cancelled_total")
    for stream in (True, False):
        connection = raw_request(served.port, long_chat("one", stream=stream))
        until(lambda: metric(served, "requests_running") + metric(served, "requests_queued") > 0)
        connection.close()
        until(lambda: metric(served, "requests_running") + metric(served, "requests_queued") == 0)
    assert metric(served, "answers_cancelled_total") == before + 2
    assert served.logged(" 499 ")


def test_more_requests_than_the_queue_takes_are_429_with_the_limit(impatient):
    busy = [raw_request(impatient.port, long_chat()) for _ in range(2)]
    until(lambda: metric(impatient, "requests_running") == 2)
    with impatient.client() as client:
        full = client.post(CHAT, json=chat())
        for each in busy:
            each.close()
        assert full.status_code == 429
        assert full.json()["error"]["limit"] == {"name": "max_queue", "value": 0}
        assert int(full.headers["retry-after"]) >= 1
        until(lambda: metric(impatient, "requests_running") == 0)
        assert client.post(CHAT, json=chat()).status_code == 200


def test_all_prompts_of_a_request_are_queued_or_none(impatient):
    with impatient.client() as client:
        full = client.post(
            "/v1/completions", json={"model": "base", "prompt": ["a", "b", "c"], "max_tokens": 400}
        )
    assert full.status_code == 429
    until(lambda: metric(impatient, "requests_running") == 0)


def test_slow_headers_slow_bodies_and_too_many_connections_come_to_an_end(impatient):
    address = ("127.0.0.1", impatient.port)
    with socket.create_connection(address, 10) as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: loc")
        with contextlib.suppress(ConnectionResetError):
            assert slow.recv(100) == b""  # closed without a word
    with socket.create_connection(address, 10) as slow:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        slow.sendall(head.encode() + b"Content-Length: 1000\r\n\r\n{")
        answer = b"".join(iter(lambda: slow.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"body_seconds = 0.5" in answer
    held = [socket.create_connection(address, 10) for _ in range(8)]
    with socket.create_connection(address, 10) as ninth:
        refusal = b"".join(iter(lambda: ninth.recv(65536), b""))
    for each in held:
        each.close()
    assert refusal.startswith(b"HTTP/1.1 503")
    assert json.loads(refusal.partition(b"\r\n\r\n")[2])["error"]["limit"]["name"] == "connections"
    with impatient.client() as client:
        assert client.post(CHAT, json=chat()).status_code == 200


def test_a_reader_that_stalls_is_cut_off_and_the_others_go_on(impatient):
    before = metric(impatient, "answers_cancelled_total") + metric(impatient, "answers_finished_total")
    stalled = raw_request(impatient.port, long_chat(stream=True, logprobs=True, top_logprobs=20))
    with impatient.client() as client:
        assert client.post(CHAT, json=chat()).status_code == 200
    until(lambda: metric(impatient, "answers_cancelled_total") + metric(impatient, "answers_finished_total")
          >= before + 2)  # fmt: skip
    time.sleep(1)  # twice its patience
    got, is_cut = b"", False
    with stalled:
        try:
            while part := stalled.recv(65536):
                got += part
        except ConnectionResetError:
            is_cut = True
    assert is_cut or b"[DONE]" not in got
    assert "Traceback" not in "".join(impatient.log)


def test_off_loopback_only_the_key_opens_and_health_needs_none(tiny_llama_folder):
    options = (
        "--host",
        "0.0.0.0",
        "--allow-origin",
        "https://example.org",
        "--allow-host",
        "box.example.org",
    )
    with serving(tiny_llama_folder, *options, key=KEY) as served:
        served.url = served.url.replace("0.0.0.0", "127.0.0.1")
        assert served.ready.endswith(" · with a key")
        with served.client() as client:
            assert client.get("/v1/models").status_code == 200
            assert client.get("/v1/models", headers={"Host": "box.example.org"}).status_code == 200
            assert client.get("/v1/models", headers={"Host": "other.example.org"}).status_code == 421
            origin = {"Origin": "https://example.org"}
            asked = {**origin, "Access-Control-Request-Method": "POST"}
            preflight = client.options(CHAT, headers={**asked, "Authorization": ""})
            assert preflight.headers["access-control-allow-origin"] == "https://example.org"
            assert client.post(CHAT, json=chat(), headers=origin).status_code == 200
            for wrong in (
                "",
                "Bearer",
                f"Bearer {KEY}x",
                f"Bearer {KEY[:-1]}",
                f"Basic {KEY}",
                KEY,
                "Bearer " + "é" * 20,
            ):
                headers = {"Authorization": wrong.encode()}
                for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
                    refused = client.get(path, headers=headers)
                    assert refused.status_code == 401, (wrong, path)
                    assert refused.headers["www-authenticate"] == "Bearer"
            for path in ("/health", "/", "/app.js", "/style.css"):
                assert client.get(path, headers={"Authorization": ""}).status_code == 200
            refused = client.post(CHAT, json=chat(), headers={"Authorization": "", **origin})
            assert refused.status_code == 401
            assert refused.headers["access-control-allow-origin"] == "https://example.org"
        assert served.stop() == 0
    assert KEY not in "".join(served.log)


def test_sigterm_lets_answers_end_and_takes_no_new_ones(tiny_llama_folder):
    with serving(tiny_llama_folder) as served, served.client() as client, served.client() as other:
        with client.stream("POST", CHAT, json=long_chat(stream=True)) as answer:
            lines = answer.iter_lines()
            next(lines)
            served.process.send_signal(signal.SIGTERM)
            served.logged("Stopping: 1 answers may end")
            refused = other.post(CHAT, json=chat())
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert other.get("/health").status_code == 503
            rest = list(lines)
        assert "data: [DONE]" in rest
        assert served.process.wait(20) == 0


@pytest.mark.slow
def test_answers_that_take_too_long_to_drain_are_cut_off(tiny_llama_folder):
    with (
        serving(tiny_llama_folder, "--drain-seconds", 0) as served,
        served.client() as client,
        client.stream("POST", CHAT, json=long_chat(stream=True)) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        served.process.send_signal(signal.SIGINT)
        rest = list(lines)
        assert (
            json.loads([line for line in rest if line][-1].removeprefix("data: "))["error"]["code"]
            == "stopping"
        )
        assert served.process.wait(20) == 128 + signal.SIGINT
        served.logged("1 answers were cut off")


@pytest.mark.slow
def test_a_second_signal_ends_at_once(tiny_llama_folder):
    with serving(tiny_llama_folder) as served:
        connection = raw_request(served.port, long_chat(stream=True))
        until(lambda: metric(served, "requests_running") == 1)
        served.process.send_signal(signal.SIGTERM)
        served.logged("Stopping: 1")
        assert served.stop() == 128 + signal.SIGTERM
        connection.close()


def test_a_dead_generation_thread_ends_the_process_with_a_clear_line_and_no_torch_was_loaded(
    tiny_llama_folder,
):
    dying = (
        "import sys; from mlx_qlora.serving.batch import Batch; step, steps = Batch.step, []\n"
        "def die(self):\n"
        "    steps.append(1)\n"
        "    if len(steps) == 1: print('torch:', 'torch' in sys.modules, file=sys.stderr, flush=True)\n"
        "    if len(steps) > 30: raise RuntimeError('the device is gone')\n"
        "    return step(self)\n"
        "Batch.step = die\n" + COMMAND
    )
    with (
        serving(tiny_llama_folder, command=[sys.executable, "-c", dying]) as served,
        served.client() as client,
        client.stream("POST", CHAT, json=long_chat(stream=True)) as answer,
    ):
        last = [line for line in answer.iter_lines() if line][-1]
        assert "error" in json.loads(last.removeprefix("data: "))
        assert served.process.wait(20) == 1
        log = served.logged("the generation thread died (RuntimeError: the device is gone)")
        assert "Traceback" not in log
        assert "torch: False" in log
