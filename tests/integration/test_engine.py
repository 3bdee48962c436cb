"""The engine with a real small model: stories, several adapters trained on it, and what they share."""

import queue
import random
import threading
from collections import deque

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from mlx_qlora.config import LoraConfig, ModelConfig, QuantizationConfig
from mlx_qlora.inference.generate import load_assistant
from mlx_qlora.lora.adapter import AdapterInfo, adapter_tensors, save_adapter, text_sha256
from mlx_qlora.lora.attach import attach
from mlx_qlora.serving.engine import Engine, Job, Piece
from mlx_qlora.weights.source import fingerprint

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
AS_STORED = QuantizationConfig(scheme="none")
OPENINGS = ["Once upon a time", "One day, a big dog", "Lily and Tom went to the park", "The sun was", "A"]
WAIT = 60.0


@pytest.fixture(scope="module")
def stories(material):
    return material / "stories260k" / "hf"


@pytest.fixture(scope="module")
def adapters(stories, tmp_path_factory):
    """Small changes of the model's projections: the stories stay readable and go other ways."""
    made = {}
    for number, (name, rank, targets) in enumerate(
        [("red", 4, ("q_proj", "v_proj")), ("green", 8, ("k_proj", "up_proj")), ("blue", 2, ("o_proj",))]
    ):
        config = LoraConfig(rank=rank, alpha=2.0 * rank, target_modules=targets)
        model, _ = load_model(stories, lazy=True)
        attach(model, config, seed=number)
        tensors = {
            path: mx.random.normal(array.shape, key=mx.random.key(number)) * 0.12
            if path.endswith("lora_b")
            else array
            for path, array in tree_flatten(tree_unflatten(list(adapter_tensors(model).items())))
        }
        info = AdapterInfo(
            model=ModelConfig(path=str(stories)),
            quantization=AS_STORED,
            lora=config,
            fingerprint=fingerprint(stories),
            chat_template=TEMPLATE,
            chat_template_sha256=text_sha256(TEMPLATE),
        )
        made[name] = tmp_path_factory.mktemp("stories") / name
        save_adapter(made[name], tensors, info, num_layers=len(model.layers))
    return made


@pytest.fixture(scope="module")
def engine(stories, adapters):
    started = Engine.start(str(stories), adapters, max_batch=8, max_queue=200)
    yield started
    started.stop()


def tell(engine: Engine, opening: str, **kind: object) -> queue.Queue:
    told: queue.Queue = queue.Queue()
    job = Job(**{"adapter": None, "tokens": engine.encode(opening), "max_tokens": 40, **kind})
    told.ticket = engine.submit(job, told.put)
    return told


def pieces_of(told: queue.Queue) -> list[Piece]:
    pieces = [told.get(timeout=WAIT)]
    while pieces[-1].finish_reason is None:
        pieces.append(told.get(timeout=WAIT))
    return pieces


def text_of(told: queue.Queue) -> str:
    return "".join(piece.text for piece in pieces_of(told))


def test_stories_of_a_mixed_batch_are_those_of_each_adapter_alone(engine, stories, adapters):
    kinds = [(name, opening) for name in (None, *adapters) for opening in OPENINGS[:3]]
    random.Random(3).shuffle(kinds)
    told = [tell(engine, opening, adapter=name, max_tokens=24) for name, opening in kinds]
    together = dict(zip(kinds, map(text_of, told), strict=True))
    for name in (None, *adapters):
        folder = adapters[name] if name else None
        alone = load_assistant(str(stories), adapter_path=folder, quantization=AS_STORED)
        for opening in OPENINGS[:3]:
            steps = generate_step(mx.array(engine.encode(opening)), alone.model, max_tokens=24)
            expected = engine.decode([token for token, _ in steps])
            assert together[name, opening].strip() == expected.strip()
    stories_of = {tuple(together[name, opening] for opening in OPENINGS[:3]) for name in (None, *adapters)}
    assert len(stories_of) == 4


def test_a_story_is_readable(engine):
    assert text_of(tell(engine, OPENINGS[0])).startswith(", there was a little")


def test_a_shared_beginning_changes_no_word(stories, adapters):
    beginning = text = "Once upon a time, there was a little girl named Lily. She loved to play outside."
    jobs = [
        (name, text + more)
        for name in (None, "red")
        for more in (" One day", " One day, she saw a", " Her mom", "", " One day, she saw a big")
    ]
    with_cache, without = [
        Engine.start(str(stories), adapters, prompt_cache_bytes=size) for size in (2**24, 0)
    ]
    try:
        for name, prompt in jobs:
            cached = pieces_of(tell(with_cache, prompt, adapter=name))
            computed = pieces_of(tell(without, prompt, adapter=name))
            assert "".join(piece.text for piece in cached) == "".join(piece.text for piece in computed)
            assert computed[-1].cached_tokens == 0
        stats = with_cache.stats()
        assert stats.num_cached_tokens > 6 * len(with_cache.encode(beginning))
        assert without.stats().num_cached_tokens == 0
    finally:
        with_cache.stop()
        without.stop()


def test_a_conversation_that_goes_on_computes_only_what_is_new(engine):
    opening = "Lily and Tom went to the park to play with the big red ball"
    first = pieces_of(tell(engine, opening, adapter="green", max_tokens=20, num_top_logprobs=0))
    said = [entry.token for piece in first for entry in piece.logprobs]
    tokens = [*engine.encode(opening), *said, *engine.encode("Then")[1:]]
    again = pieces_of(tell(engine, "", adapter="green", tokens=tokens))
    assert again[-1].cached_tokens == len(engine.encode(opening)) + 20


def test_a_stop_word_is_found_in_the_middle_of_the_stream(engine):
    whole = text_of(tell(engine, OPENINGS[0]))
    word = "girl named"
    assert word in whole
    pieces = pieces_of(tell(engine, OPENINGS[0], stop=(word,)))
    assert "".join(piece.text for piece in pieces) == whole[: whole.index(word)]
    assert pieces[-1].finish_reason == "stop"


def test_seeded_stories_are_the_same_in_any_company(engine, adapters):
    kind = {"temperature": 0.9, "top_p": 0.95, "max_tokens": 40, "adapter": "blue"}
    alone = [text_of(tell(engine, OPENINGS[0], seed=seed, **kind)) for seed in range(4)]
    company = [
        tell(engine, opening, temperature=1.0, adapter=name) for name in adapters for opening in OPENINGS
    ]
    told = [tell(engine, OPENINGS[0], seed=seed, **kind) for seed in range(4)]
    assert [text_of(one) for one in told] == alone
    assert len(set(alone)) > 1
    for other in company:
        text_of(other)


def test_threads_that_come_and_go_lose_nothing(engine):
    """Every job ends once, by itself or cancelled, and every text is the one it has alone."""
    expected = {opening: text_of(tell(engine, opening, max_tokens=24)) for opening in OPENINGS}
    problems: list[str] = []

    def client(number: int) -> None:
        chance = random.Random(number)
        for _ in range(6):
            opening = chance.choice(OPENINGS)
            told = tell(engine, opening, max_tokens=24)
            is_leaving = chance.random() < 0.3
            if is_leaving:
                told.get(timeout=WAIT)
                told.ticket.cancel()
            pieces = pieces_of(told)
            text = "".join(piece.text for piece in pieces)
            if pieces[-1].finish_reason == "length" and not is_leaving and text != expected[opening]:
                problems.append(f"{opening}: {text}")
            if not told.empty():
                problems.append("a piece after the last")

    before = engine.stats()
    clients = [threading.Thread(target=client, args=(number,)) for number in range(12)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(WAIT)
    after = engine.stats()
    assert problems == []
    ended = sum(
        getattr(after, n) - getattr(before, n) for n in ("num_finished", "num_cancelled", "num_failed")
    )
    assert (ended, after.num_failed) == (72, before.num_failed)
    assert (after.num_running, after.num_queued, after.is_alive) == (0, 0, True)


@pytest.mark.slow
def test_memory_stays_flat_over_thousands_of_jobs(engine, adapters):
    rng, names = np.random.default_rng(0), [None, *adapters]

    def five_hundred() -> int:
        waiting: deque[queue.Queue] = deque()
        for _ in range(500):
            if len(waiting) == 150:
                pieces_of(waiting.popleft())
            tokens = [1, *(int(token) for token in rng.integers(3, 500, rng.integers(2, 12)))]
            kind = {"adapter": names[rng.integers(4)], "max_tokens": int(rng.integers(1, 4))}
            waiting.append(tell(engine, "", tokens=tokens, temperature=0.5, **kind))
        for told in waiting:
            pieces_of(told)
        return mx.get_active_memory() - engine._prompts.num_bytes

    five_hundred()
    sizes = [five_hundred() for _ in range(3)]
    assert max(sizes) - min(sizes) < 256 * 1024
