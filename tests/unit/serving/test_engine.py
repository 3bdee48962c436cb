"""The engine with a tiny model: what ends a job, what fails, what is counted, what is left behind."""

import itertools
import queue
import threading
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_qlora.config import LoraConfig, ModelConfig, QuantizationConfig
from mlx_qlora.errors import AdapterError, ConfigError, MlxQloraError
from mlx_qlora.inference.generate import load_assistant
from mlx_qlora.lora.adapter import AdapterInfo, adapter_tensors, save_adapter, text_sha256
from mlx_qlora.serving import engine as engine_module
from mlx_qlora.serving import generation
from mlx_qlora.serving.engine import Engine, EngineStopped, Job, JobFailed, Piece, QueueFull, Ticket
from mlx_qlora.weights.source import fingerprint
from tests.tiny import with_lora

TEMPLATE = "{% for message in messages %}{{ message['content'] }}|{% endfor %}>"
WAIT = 30.0
PROMPT = "o clube venceu a partida no estádio com dois gols de longe"
INT4 = QuantizationConfig(scheme="int4")


def save_tiny_adapter(
    base_folder,
    folder,
    *,
    scale: float = 1.0,
    quantization=INT4,
    system_prompt=None,
    template=TEMPLATE,
    **lora,
):
    """An adapter of the tiny folder whose B is not zero."""
    from mlx_lm.utils import load_model

    model = with_lora(load_model(base_folder, lazy=True)[0], **{"rank": 3, "alpha": 60.0, **lora})
    tensors = {n: a * (scale if n.endswith("lora_b") else 1) for n, a in adapter_tensors(model).items()}
    lora.pop("seed", None)
    info = AdapterInfo(
        model=ModelConfig(path=str(base_folder)),
        quantization=quantization,
        lora=LoraConfig(**{"rank": 3, "alpha": 60.0, **lora}),
        system_prompt=system_prompt,
        fingerprint=fingerprint(base_folder),
        chat_template=template,
        chat_template_sha256=text_sha256(template),
    )
    save_adapter(folder, tensors, info, num_layers=2)
    return folder


@pytest.fixture(scope="module")
def adapters(tiny_llama_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "one": save_tiny_adapter(tiny_llama_folder, folder / "one", seed=1, system_prompt="Seja breve."),
        "two": save_tiny_adapter(
            tiny_llama_folder,
            folder / "two",
            seed=2,
            rank=5,
            target_modules=("down_proj",),
            template="{{ 1 }}",
        ),
        "huge": save_tiny_adapter(tiny_llama_folder, folder / "huge", seed=3, scale=1e36, rank=2),
    }


@pytest.fixture(scope="module")
def engine(tiny_llama_folder, adapters):
    started = Engine.start(str(tiny_llama_folder), adapters, max_batch=4, max_queue=3)
    yield started
    started.stop()


@dataclass
class Heard:
    """What a job's listener was told."""

    ticket: Ticket
    told: queue.Queue
    pieces: list[Piece] = field(default_factory=list)

    def next(self) -> Piece | JobFailed:
        what = self.told.get(timeout=WAIT)
        if isinstance(what, Piece):
            self.pieces.append(what)
        return what

    def end(self) -> Piece | JobFailed:
        what = self.next()
        while isinstance(what, Piece) and what.finish_reason is None:
            what = self.next()
        return what

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def logprobs(self) -> list:
        return [entry for piece in self.pieces for entry in piece.logprobs]


def ask(engine: Engine, text: str = "o clube venceu a partida", hook=None, **kind: object) -> Heard:
    """Submit a job; `hook` is called on the generation thread after each piece, with how many there were."""
    told: queue.Queue = queue.Queue()
    count = itertools.count(1)

    def listener(what: object) -> None:
        told.put(what)
        if hook is not None:
            hook(next(count))

    settings = {"adapter": None, "tokens": engine.encode(text), "max_tokens": 20, "ignore_eos": True}
    return Heard(engine.submit(Job(**{**settings, **kind}), listener), told)


@dataclass
class Held:
    """A long job whose first piece has come, and with it the whole engine stands still until `go`."""

    heard: Heard
    gate: threading.Event

    def go(self) -> None:
        self.gate.set()


def hold(engine: Engine, **kind: object) -> Held:
    gate = threading.Event()
    heard = ask(engine, hook=lambda number: number > 1 or gate.wait(WAIT), **{"max_tokens": 400, **kind})
    heard.next()
    return Held(heard, gate)


def answer(engine: Engine, *args: str, **kind: object) -> Heard:
    heard = ask(engine, *args, **kind)
    assert isinstance(heard.end(), Piece)
    return heard


def readable(engine: Engine, seed: int = 7) -> dict:
    """Settings for an answer of letters, a different one for each seed."""
    texts = {token: engine.decode([token]) for token in range(300)}
    letters = [token for token, text in texts.items() if text.isascii() and text.strip().isalpha()]
    return {"temperature": 2.0, "seed": seed, "logit_bias": dict.fromkeys(letters, 50.0)}


def wait_until(is_so) -> None:
    until = time.monotonic() + WAIT
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.mark.parametrize("adapter", [None, "one", "two"])
def test_an_answer_is_what_inference_gives_with_that_adapter_alone(
    engine, adapters, tiny_llama_folder, adapter
):
    from mlx_lm.generate import generate_step

    folder = adapters[adapter] if adapter else None
    assistant = load_assistant(str(tiny_llama_folder), adapter_path=folder, quantization=INT4)
    tokens = engine.encode("o clube venceu a partida")
    steps = generate_step(mx.array(tokens), assistant.model, max_tokens=20)
    expected = [token for token, _ in steps]
    heard = answer(engine, adapter=adapter, num_top_logprobs=0)
    assert [entry.token for entry in heard.logprobs] == expected
    assert heard.text == engine.decode(expected)


def test_many_at_once_with_several_adapters_answer_as_one_at_a_time(engine):
    kinds = [
        {"adapter": adapter, "max_tokens": 8 + 3 * number}
        for number, adapter in enumerate([None, "one", "two", "one", None, "two", "one"])
    ]
    alone = [answer(engine, **kind).text for kind in kinds]
    together = [ask(engine, **kind) for kind in kinds]
    for heard in together:
        heard.end()
    assert [heard.text for heard in together] == alone


def test_a_seed_gives_the_same_text_whatever_else_runs(engine):
    kind = {"adapter": "one", "temperature": 1.2, "top_p": 0.95, "seed": 42, "max_tokens": 25}
    alone = answer(engine, **kind).text
    others = [ask(engine, temperature=1.0, max_tokens=9 + n, adapter="two") for n in range(3)]
    assert answer(engine, **kind).text == alone
    assert answer(engine, **{**kind, "seed": 43}).text != alone
    for other in others:
        other.end()


def test_without_a_seed_two_answers_differ(engine):
    assert len({answer(engine, temperature=2.0).text for _ in range(3)}) > 1


def test_a_stop_string_cuts_across_tokens_and_nothing_of_it_is_given(engine):
    kind = readable(engine)
    text = answer(engine, **kind).text
    stop = text[3:9]
    assert text.index(stop) == 3
    heard = answer(engine, stop=("never seen", stop), **kind)
    assert heard.text == text[:3]
    assert heard.pieces[-1].finish_reason == "stop"
    assert heard.pieces[-1].generated_tokens < 20


def test_what_may_begin_a_stop_string_is_given_when_it_does_not(engine):
    kind = readable(engine)
    text = answer(engine, **kind).text
    heard = answer(engine, stop=(text[-3:] + "never seen",), **kind)
    assert heard.text == text
    assert heard.pieces[-1].finish_reason == "length"


def test_eos_ends_the_text_and_is_not_part_of_it(engine):
    (eos,) = engine.encode("<|im_end|>")
    heard = answer(engine, ignore_eos=False, logit_bias={eos: 100.0}, num_top_logprobs=0)
    last = heard.pieces[-1]
    assert (heard.text, last.finish_reason, last.generated_tokens) == ("", "stop", 1)
    assert heard.logprobs == []


def test_logprobs_are_those_of_the_tokens_given_with_the_likeliest_beside_them(engine):
    heard = answer(engine, num_top_logprobs=3, adapter="one", **readable(engine))
    assert len(heard.logprobs) == 20
    assert "".join(entry.text for entry in heard.logprobs) == heard.text
    for entry in heard.logprobs:
        values = [logprob for *_, logprob in entry.top]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert entry.logprob <= values[0]
        assert sum(np.exp(values)) <= 1 + 1e-6
        for token, _, logprob in entry.top:
            assert logprob == pytest.approx(entry.logprob) or token != entry.token
    greedy = answer(engine, num_top_logprobs=1)
    assert all(entry.top[0][::2] == (entry.token, entry.logprob) for entry in greedy.logprobs)


@pytest.mark.parametrize("begin", [1, 4, 6])
def test_logprobs_of_a_stop_string_are_not_given(engine, begin):
    kind = {**readable(engine), "num_top_logprobs": 0}
    whole = answer(engine, **kind)
    stop = whole.text[begin : begin + 5]
    assert whole.text.index(stop) == begin
    heard = answer(engine, stop=(stop,), **kind)
    begins = np.cumsum([0, *[len(entry.text) for entry in whole.logprobs]])[:-1]
    assert [entry.token for entry in heard.logprobs] == [
        entry.token for entry, at in zip(whole.logprobs, begins, strict=True) if at < begin
    ]


def test_counts_of_tokens_are_in_each_piece(engine):
    heard = answer(engine, "a partida no estádio", max_tokens=5)
    num_prompt = len(engine.encode("a partida no estádio"))
    assert [piece.generated_tokens for piece in heard.pieces] == [1, 2, 3, 4, 5]
    assert {piece.prompt_tokens for piece in heard.pieces} == {num_prompt}


def test_a_prompt_seen_before_is_not_computed_again_and_the_answer_is_the_same(engine):
    text = "dois gols no estádio: o clube venceu"
    first, again = answer(engine, text, adapter="one"), answer(engine, text, adapter="one")
    assert first.pieces[-1].cached_tokens == 0
    assert again.pieces[-1].cached_tokens == len(engine.encode(text)) - 1
    assert again.text == first.text
    longer = answer(engine, text + " a partida", adapter="one")
    assert longer.pieces[-1].cached_tokens >= len(engine.encode(text)) - 2


def test_a_long_prompt_is_shared_as_soon_as_it_is_read(engine):
    text = PROMPT * 12
    held = hold(engine, text=text, max_tokens=60)
    second = ask(engine, text + " e fim", max_tokens=3)  # joins 59 steps before the first is done
    held.go()
    second.end()
    held.heard.end()
    assert second.pieces[-1].cached_tokens >= len(engine.encode(text)) - 2 >= 128


def test_another_adapter_does_not_use_what_one_has_cached(engine):
    text = "um estádio, um clube e uma partida com gols"
    answer(engine, text, adapter="one")
    other = answer(engine, text, adapter="two")
    assert other.pieces[-1].cached_tokens == 0


def test_each_adapter_renders_with_its_own_template_and_system_prompt(engine):
    turns = [{"role": "user", "content": "Olá"}]
    assert engine.decode(engine.render("one", turns)) == "Seja breve.|Olá|>"
    assert engine.decode(engine.render("two", turns)) == "1"
    assert engine.decode(engine.render(None, turns)).startswith("<|im_start|>user\nOlá")


def test_a_conversation_without_tokens_is_an_error_and_not_a_crash(engine):
    with pytest.raises(ConfigError, match="no tokens"):
        engine.render("one", [{"role": "user", "content": "\ud800"}])
    with pytest.raises(ConfigError, match="no tokens"):
        engine.encode("\ud800")
    with pytest.raises(ConfigError, match="no text"):
        engine.decode([-1])


BAD = [
    ({"tokens": []}, "no tokens"),
    ({"tokens": [10**6]}, "unknown token"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**6}, "max_tokens must be in 1…"),
    ({"temperature": float("nan")}, "temperature"),
    ({"top_p": 0.0}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"min_p": 1.5}, "min_p"),
    ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ({"frequency_penalty": float("inf")}, "frequency_penalty"),
    ({"logit_bias": {10**6: 1.0}}, "logit_bias"),
    ({"logit_bias": {1: float("nan")}}, "logit_bias"),
    ({"stop": ("",)}, "stop"),
    ({"num_top_logprobs": 21}, "num_top_logprobs"),
    ({"timeout_seconds": 0.0}, "timeout_seconds"),
    ({"adapter": "../one"}, "no adapter called"),
]


@pytest.mark.parametrize(("kind", "message"), BAD)
def test_a_job_out_of_range_is_refused_and_the_next_is_answered(engine, kind, message):
    with pytest.raises(ConfigError, match=message):
        ask(engine, **kind)
    assert answer(engine, max_tokens=2).pieces[-1].finish_reason == "length"


def test_every_extreme_that_is_in_range_is_answered(engine):
    kinds = [
        {"top_k": 10**9, "temperature": 1.0},
        {"temperature": 1e30},
        {"temperature": 1e-30},
        {"top_p": 1e-9, "temperature": 1.0},
        {"logit_bias": {3: -1e30, 4: 1e30}},
        {"repetition_penalty": 1e-3},
        {"frequency_penalty": -2.0, "presence_penalty": 2.0},
        {"seed": -(2**70), "temperature": 1.0},
        {"tokens": [0]},
    ]
    for heard in [answer(engine, **kind) for kind in kinds]:
        assert heard.pieces[-1].generated_tokens == 20


def test_one_adapters_bad_numbers_fail_its_job_alone(engine):
    good = ask(engine, max_tokens=30)
    failed = ask(engine, adapter="huge").end()
    assert isinstance(failed, JobFailed)
    assert "adapter huge are not finite" in failed.what
    assert good.end().finish_reason == "length"
    assert good.text == answer(engine, max_tokens=30).text
    assert engine.stats().is_alive


def test_a_cancelled_job_gets_a_last_piece_and_its_place_is_free(engine):
    before, tickets = engine.stats(), []
    held = hold(engine)
    heard = ask(engine, max_tokens=400, hook=lambda number: number == 3 and tickets[0].cancel())
    tickets.append(heard.ticket)
    held.heard.ticket.cancel()
    held.go()
    last = heard.end()
    assert (last.finish_reason, last.text, last.generated_tokens) == ("cancelled", "", 3)
    heard.ticket.cancel()
    assert (held.heard.end().finish_reason, held.heard.pieces[-1].generated_tokens) == ("cancelled", 1)
    assert answer(engine, max_tokens=2).text
    after = engine.stats()
    assert (after.num_running, after.num_cancelled - before.num_cancelled) == (0, 2)
    assert heard.told.empty()


def test_a_waiting_job_can_be_cancelled_and_a_full_queue_says_its_limit(engine):
    held = hold(engine)
    running = [ask(engine) for _ in range(3)]
    waiting = [ask(engine) for _ in range(3)]
    with pytest.raises(QueueFull) as error:
        ask(engine)
    assert error.value.limit == 3
    assert (engine.stats().num_running, engine.stats().num_queued) == (1, 6)
    waiting[1].ticket.cancel()
    held.heard.ticket.cancel()
    held.go()
    assert waiting[1].end().finish_reason == held.heard.end().finish_reason == "cancelled"
    assert waiting[1].text == ""
    assert {heard.end().finish_reason for heard in (*running, waiting[0], waiting[2])} == {"length"}


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the engine's clock is ahead, as a list of one."""
    ahead = [0.0]
    fake = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead[0])
    monkeypatch.setattr(generation, "time", fake)
    monkeypatch.setattr(engine_module, "time", fake)
    return ahead


def test_a_job_ends_at_its_time_limit_with_the_text_it_has(engine, clock):
    kind = readable(engine)

    def hook(number: int) -> None:
        clock[0] += 1000 * (number == 5)

    heard = ask(engine, max_tokens=400, timeout_seconds=900.0, hook=hook, **kind)
    last = heard.end()
    assert (last.finish_reason, last.generated_tokens) == ("timeout", 5)
    assert heard.text == answer(engine, max_tokens=5, **kind).text


def test_time_in_the_queue_counts(engine, clock):
    held = hold(engine)
    waiting = ask(engine, timeout_seconds=900.0)
    clock[0] += 1000
    held.heard.ticket.cancel()
    held.go()
    assert (waiting.end().finish_reason, waiting.text) == ("timeout", "")


def test_a_listener_that_raises_ends_its_own_job_alone(engine):
    def listener(_: object) -> None:
        raise RuntimeError("gone")

    good = ask(engine, max_tokens=15)
    job = Job(adapter=None, tokens=engine.encode("gol"), max_tokens=400, ignore_eos=True)
    before = engine.stats().num_cancelled
    engine.submit(job, listener)
    assert good.end().finish_reason == "length"
    wait_until(lambda: engine.stats().num_cancelled == before + 1)
    assert engine.stats().is_alive


def test_stats_and_observations_count_what_was_done(tiny_llama_folder):
    seen: list[tuple[str, float]] = []
    engine = Engine.start(
        str(tiny_llama_folder), {}, max_batch=2, observe=lambda *observed: seen.append(observed)
    )
    try:
        for _ in range(3):
            answer(engine, PROMPT, max_tokens=6)
        stats, num_prompt = engine.stats(), len(engine.encode(PROMPT))
        assert (stats.num_finished, stats.num_failed, stats.num_cancelled) == (3, 0, 0)
        assert (stats.num_generated_tokens, stats.num_prompt_tokens) == (18, 3 * num_prompt)
        assert stats.num_cached_tokens == 2 * (num_prompt - 1)
        assert [name for name, _ in seen].count("first_token_seconds") == 3
        assert [name for name, _ in seen].count("request_seconds") == 3
        assert all(0 < seconds < WAIT for _, seconds in seen)
    finally:
        engine.stop()


def test_draining_answers_what_runs_and_takes_nothing_new(tiny_llama_folder):
    engine = Engine.start(str(tiny_llama_folder), {}, max_batch=1)
    held, waiting = hold(engine, max_tokens=60), ask(engine, max_tokens=60)
    assert engine.drain(0.0) is False
    with pytest.raises(EngineStopped, match="stopping"):
        ask(engine)
    held.go()
    assert engine.drain(WAIT) is True
    assert (held.heard.told.qsize(), waiting.told.qsize()) == (59, 60)
    engine.stop()
    engine.stop()
    assert not engine.stats().is_alive


def test_stopping_cancels_what_is_left(tiny_llama_folder):
    engine = Engine.start(str(tiny_llama_folder), {}, max_batch=1)
    held, waiting = hold(engine), ask(engine)
    stopping = threading.Thread(target=engine.stop)
    stopping.start()
    wait_until(lambda: engine._desk.is_stopping)
    held.go()
    stopping.join(WAIT)
    assert held.heard.end().finish_reason == waiting.end().finish_reason == "cancelled"
    assert engine._thread not in threading.enumerate()


def test_an_error_in_the_loop_itself_ends_the_engine_and_says_so_once(tiny_llama_folder, monkeypatch):
    deaths: list[BaseException] = []
    engine = Engine.start(str(tiny_llama_folder), {}, max_batch=1, on_death=deaths.append)
    held, waiting = hold(engine), ask(engine)
    failure = RuntimeError("no memory left")

    def fail(_: object) -> None:
        raise failure

    monkeypatch.setattr(generation.Batch, "step", fail)
    held.go()
    for heard in (held.heard, waiting):
        last = heard.end()
        assert isinstance(last, JobFailed)
        assert "no memory left" in last.what
    engine._thread.join(WAIT)
    assert deaths == [failure]
    assert not engine.stats().is_alive
    with pytest.raises(EngineStopped, match="no memory left"):
        ask(engine)
    assert engine.drain(WAIT) is True
    engine.stop()


def test_what_cannot_be_loaded_is_an_error_of_the_start_and_no_death(tiny_llama_folder, adapters, tmp_path):
    deaths: list[BaseException] = []
    with pytest.raises(MlxQloraError):
        Engine.start(str(tmp_path / "none"), {}, on_death=deaths.append)
    dora = save_tiny_adapter(tiny_llama_folder, tmp_path / "dora", variant="dora")
    with pytest.raises(AdapterError, match="adapter fine is a DoRA one"):
        Engine.start(str(tiny_llama_folder), {"fine": dora}, on_death=deaths.append)
    plain = save_tiny_adapter(
        tiny_llama_folder, tmp_path / "int8", quantization=QuantizationConfig(scheme="int8")
    )
    with pytest.raises(AdapterError, match="stored differently"):
        Engine.start(str(tiny_llama_folder), {**adapters, "other": plain}, on_death=deaths.append)
    with pytest.raises(ConfigError, match="max_batch"):
        Engine.start(str(tiny_llama_folder), {}, max_batch=0)
    assert deaths == []
    assert "generation" not in [thread.name for thread in threading.enumerate() if not thread.daemon]


def test_switching_adapters_does_not_load_the_base_again(engine):
    def stored() -> dict[str, int]:
        model = engine._loaded.base.model
        return {path: id(module) for path, module in model.named_modules()}

    before = stored()
    for adapter in ("one", "two", None, "one"):
        answer(engine, adapter=adapter, max_tokens=2)
    assert stored() == before
    assert not any(
        isinstance(m, nn.Linear) and "lora" in p for p, m in engine._loaded.base.model.named_modules()
    )


def test_memory_is_flat_over_many_jobs(tiny_llama_folder, adapters):
    engine = Engine.start(
        str(tiny_llama_folder), adapters, max_batch=4, max_queue=400, prompt_cache_bytes=200_000
    )

    def batch_of_jobs(number: int) -> int:
        kinds = [
            {
                "adapter": (None, "one", "two")[n % 3],
                "tokens": [int(t) for t in np.random.default_rng((number, n)).integers(3, 300, 10 + n % 7)],
                "max_tokens": 3 + n % 5,
                "temperature": n % 2,
                "frequency_penalty": float(n % 4 == 0),
                "num_top_logprobs": 2 if n % 5 == 0 else None,
            }
            for n in range(60)
        ]
        heard = [ask(engine, **kind) for kind in kinds]
        for one in heard[::9]:
            one.ticket.cancel()
        for one in heard:
            one.end()
        wait_until(lambda: engine.stats().num_running == 0)
        time.sleep(0.05)  # the thread goes to sleep, and clears the cache
        assert mx.get_cache_memory() == 0
        return mx.get_active_memory() - engine._prompts.num_bytes

    try:
        num_threads = threading.active_count()
        batch_of_jobs(0)
        sizes = [batch_of_jobs(number) for number in range(1, 4)]
        assert max(sizes) - min(sizes) < 64 * 1024
        assert engine._prompts.num_bytes <= 200_000
        assert threading.active_count() == num_threads
        assert (engine.stats().num_running, engine.stats().num_queued, engine._desk.num_open) == (0, 0, 0)
    finally:
        engine.stop()
