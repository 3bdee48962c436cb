import pytest
from fastapi.testclient import TestClient

from mlx_qlora.dataset.rows import BadRow
from mlx_qlora.errors import ConfigError
from mlx_qlora.serving.app import Access, Service, build_app, public_name, served_names
from mlx_qlora.serving.jobs import EngineStats, EngineStopped, JobFailed, Piece, QueueFull
from mlx_qlora.serving.limits import Limits
from mlx_qlora.serving.metrics import Metrics

CHAT = "/v1/chat/completions"
BODY = {"model": "base", "messages": [{"role": "user", "content": "oi"}]}


class RefusingEngine:
    """Raises what an engine raises, so that each answer can be seen; the real one is in integration tests."""

    vocabulary_size, context_length = 50, 40

    def __init__(self, *, rendering=None, submitting=None, giving=None):
        self.rendering, self.submitting, self.giving = rendering, submitting, giving
        self.cancelled = []

    def render(self, *_):
        if self.rendering:
            raise self.rendering
        return [1, 2, 3]

    encode = render

    def submit(self, job, listener):
        if self.submitting and job.tokens != [7]:
            raise self.submitting
        if self.giving:
            for each in self.giving:
                listener(each)
        return self

    def cancel(self):
        self.cancelled.append(1)

    def stats(self):
        return EngineStats(0, 0, 0, 0, 0, 0, 0, 0, is_alive=True)


def client_of(engine, **service):
    lines = []
    made = Service(
        engine=engine, metrics=Metrics(engine.stats), limits=Limits(), log=lines.append,
        names=served_names("tiny", ["one"]), **service,
    )  # fmt: skip
    client = TestClient(build_app(made, Access()), base_url="http://localhost", raise_server_exceptions=False)
    client.lines = lines
    return client


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("engine", "status", "code"),
    [
        ({"rendering": BadRow("the chat template refuses it: roles must alternate")}, 422, "prompt"),
        ({"rendering": ConfigError("The prompt has no tokens.")}, 422, "prompt"),
        ({"submitting": QueueFull(5)}, 429, "max_queue"),
        ({"submitting": EngineStopped("draining")}, 503, "stopping"),
        ({"submitting": ConfigError("This job cannot be computed.")}, 422, "invalid_value"),
        ({"giving": [JobFailed("no numbers")]}, 500, "generation_failed"),
        ({"giving": [Piece("", finish_reason="timeout")]}, 503, "request_seconds"),
        ({"rendering": RuntimeError("a bug, with a prompt in it")}, 500, "internal"),
    ],
)
def test_what_an_engine_refuses_has_a_status_of_its_own(engine, status, code, stream):
    answer = client_of(RefusingEngine(**engine)).post(CHAT, json={**BODY, "stream": stream})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["code"] == code
    assert "a bug" not in error["message"]
    if status == 429 or code == "stopping":
        assert int(answer.headers["retry-after"]) >= 1


def test_prompts_that_were_queued_are_cancelled_when_one_of_them_is_refused():
    engine = RefusingEngine(submitting=QueueFull(1))
    answer = client_of(engine).post("/v1/completions", json={"model": "base", "prompt": [[7], [8]]})
    assert answer.status_code == 429
    assert len(engine.cancelled) == 1


def test_a_server_that_drains_refuses_and_says_so_to_load_balancers():
    client = client_of(RefusingEngine(), is_draining=True)
    answer = client.post(CHAT, json=BODY)
    assert (answer.status_code, answer.headers["connection"]) == (503, "close")
    assert client.get("/health").status_code == 503
    assert client.get("/v1/models").status_code == 200


def test_a_log_line_has_the_model_and_the_tokens_and_metrics_count_it():
    done = Piece("oi", finish_reason="stop", prompt_tokens=3, generated_tokens=2)
    client = client_of(RefusingEngine(giving=[done]))
    answer = client.post(CHAT, json={**BODY, "model": "one"})
    assert answer.json()["choices"][0]["message"]["content"] == "oi"
    assert client.lines[0].split()[2:5] == ["POST", CHAT, "200"]
    assert client.lines[0].endswith("model=one tokens=3+2")
    client.get("/nowhere")
    counted = client.get("/metrics").text
    assert f'mlx_qlora_http_responses_total{{path="{CHAT}",status="200"}} 1.0' in counted
    assert 'mlx_qlora_http_responses_total{path="other",status="404"} 1.0' in counted


def test_the_base_is_known_by_two_names_and_an_adapter_may_have_neither():
    assert served_names("tiny", ["one"]) == {"base": None, "tiny": None, "one": "one"}
    for name in ("base", "tiny"):
        with pytest.raises(ConfigError, match="base model's name"):
            served_names("tiny", [name])


def test_a_folder_is_called_by_its_name_and_a_hub_id_by_itself(tmp_path, monkeypatch):
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    assert public_name(str(tmp_path / "models" / "tiny")) == "tiny"
    monkeypatch.chdir(tmp_path / "models" / "tiny")
    assert public_name(".") == "tiny"
    assert public_name("mistralai/Mistral-7B-v0.1") == "mistralai/Mistral-7B-v0.1"


def test_the_description_names_the_models_the_limits_and_the_key():
    engine = RefusingEngine()
    service = Service(
        engine=engine, metrics=Metrics(engine.stats), limits=Limits(), names=served_names("t", [])
    )
    client = TestClient(build_app(service, Access(key="k" * 16)), base_url="http://localhost")
    assert client.get("/openapi.json").status_code == 401
    found = client.get("/openapi.json", headers={"Authorization": "Bearer " + "k" * 16}).json()
    assert found["components"]["schemas"]["ChatRequest"]["properties"]["model"]["enum"] == ["base", "t"]
    assert found["security"] == [{"key": []}]
    assert "body_bytes = " in found["info"]["description"]
