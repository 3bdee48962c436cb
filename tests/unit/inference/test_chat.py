import json

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlx_qlora.config import DataConfig, LoraConfig, ModelConfig, QuantizationConfig
from mlx_qlora.dataset import read_records, render, render_prompt, template_of
from mlx_qlora.errors import AdapterError, ConfigError, DataError, StorageError
from mlx_qlora.inference.chat import INTERRUPTED, Chat
from mlx_qlora.inference.generate import Assistant, Sampling, load_assistant
from mlx_qlora.lora.adapter import AdapterInfo, adapter_tensors, save_adapter, text_sha256
from mlx_qlora.lora.attach import attach
from tests.checkpoints import make_checkpoint
from tests.conftest import REPOSITORY

SHORT = Sampling(max_tokens=12)
QUESTIONS = ["Quem fundou o clube?", "Em que ano foi fundado?", "Como se chama o estádio?"]


def ask(chat: Chat, question: str, **settings):
    """The whole reply."""
    return list(chat.ask(question, **settings))[-1][1]


def fresh(assistant, messages, sampling=SHORT, system=None):
    """The answer to a conversation, computed from its first token on."""
    return list(assistant.stream(messages, system=system, sampling=sampling))[-1][1]


@pytest.fixture(scope="module")
def demo():
    """The embedded model, which answers in whole sentences and ends them."""
    quantization = QuantizationConfig(scheme="int4")
    return load_assistant(str(REPOSITORY / "data/demo/model"), quantization=quantization, dtype="float32")


@pytest.fixture(scope="module")
def random_models(tiny_llama_folder, tmp_path_factory):
    """Models whose caches differ: keys of all tokens, and of the last sixteen."""
    folder = tmp_path_factory.mktemp("models")
    window = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    paths = {
        "full": make_checkpoint(folder / "full", "llama-untied", tiny_llama_folder),
        "sliding": make_checkpoint(folder / "sliding", "llama-untied", tiny_llama_folder, **window),
    }
    return {name: load_assistant(str(path), dtype="float32") for name, path in paths.items()}


@pytest.fixture
def make_adapter(tiny_llama_folder, tmp_path):
    """Writes an adapter for the tiny model that does change its answers."""

    def made(name: str, *, template: str | None = None, fingerprint: str | None = None, **lora):
        assistant = load_assistant(str(tiny_llama_folder), dtype="float32")
        config = LoraConfig(**{"rank": 4, "target_modules": ["q_proj", "down_proj"], **lora})
        model = assistant.model
        attach(model, config, 0)
        flat = tree_flatten(model.trainable_parameters())
        keys = mx.random.split(mx.random.key(sum(name.encode())), len(flat))
        shaken = [
            (k, v + 0.5 * mx.random.normal(v.shape, key=key)) for (k, v), key in zip(flat, keys, strict=True)
        ]
        model.update(tree_unflatten(shaken))
        text = template or template_of(assistant.tokenizer)
        info = AdapterInfo(
            model=ModelConfig(path=str(tiny_llama_folder)),
            quantization=QuantizationConfig(scheme="none"),
            lora=config,
            system_prompt=f"és {name}",
            fingerprint=fingerprint or assistant.base.fingerprint,
            chat_template=text,
            chat_template_sha256=text_sha256(text),
        )
        save_adapter(tmp_path / name, adapter_tensors(model), info, num_layers=2)
        return tmp_path / name

    return made


@pytest.mark.parametrize("kind", ["full", "sliding", "demo"])
def test_each_answer_is_the_one_of_a_fresh_computation(kind, random_models, demo):
    assistant = demo if kind == "demo" else random_models[kind]
    chat = Chat(assistant, sampling=SHORT)
    for question in QUESTIONS:
        messages = [*chat.messages, {"role": "user", "content": question}]
        expected = fresh(assistant, messages)
        reply = ask(chat, question)
        assert reply.answer.text == expected.text
        assert reply.answer.prompt_tokens == expected.prompt_tokens
        assert reply.answer.finish_reason == expected.finish_reason
        assert chat.messages[-1] == {"role": "assistant", "content": expected.text.strip()}
    assert len(chat.messages) == 2 * len(chat.replies) == 6


def test_only_tokens_that_are_new_are_read(demo, monkeypatch):
    read = []
    model_class = type(demo.model)
    call = model_class.__call__

    def counted(self, tokens, *arguments, **named):
        read.append(tokens.size)
        return call(self, tokens, *arguments, **named)

    monkeypatch.setattr(model_class, "__call__", counted)
    chat, before = Chat(demo, sampling=Sampling(max_tokens=40)), 0
    for question in QUESTIONS:
        read.clear()
        reply = ask(chat, question)
        answer = reply.answer
        assert reply.cached_tokens == before  # all that stood there, the answer's last token too
        assert sum(read) == answer.prompt_tokens - before + answer.generation_tokens
        assert answer.finish_reason == "stop"
        before = answer.prompt_tokens + answer.generation_tokens
        assert {layer.offset for layer in chat._kept.layers} == {before}


def test_an_answer_that_is_stopped_stays_as_it_is_and_the_next_is_right(demo):
    chat = Chat(demo, sampling=Sampling(max_tokens=40))
    pieces = []
    for piece, _ in chat.ask(QUESTIONS[0], should_stop=lambda: len(pieces) >= 3):
        pieces.append(piece)
    assert len(pieces) == 4
    assert chat.replies[-1].answer.finish_reason == INTERRUPTED
    assert chat.messages[-1]["content"] == "".join(pieces).strip()
    messages = [*chat.messages, {"role": "user", "content": QUESTIONS[1]}]
    expected = fresh(demo, messages)
    again = ask(chat, QUESTIONS[1])
    assert again.cached_tokens > 0
    assert again.answer.text == fresh(demo, messages, Sampling(max_tokens=40)).text
    assert again.answer.text.startswith(expected.text)


def test_a_prompt_that_is_stopped_while_it_is_read_leaves_nothing(demo):
    chat = Chat(demo, sampling=SHORT)
    ask(chat, QUESTIONS[0])
    messages = list(chat.messages)
    assert list(chat.ask(QUESTIONS[1], should_stop=lambda: True)) == []
    assert chat.messages == messages
    assert ask(chat, QUESTIONS[2]).answer.text == fresh(demo, [*messages, user(QUESTIONS[2])]).text


def test_an_iterator_that_is_closed_early_counts_as_stopped(demo):
    chat = Chat(demo, sampling=SHORT)
    ask(chat, QUESTIONS[0])
    pieces = chat.ask(QUESTIONS[1])
    next(pieces)
    next(pieces)
    pieces.close()
    assert chat.replies[-1].answer.finish_reason == INTERRUPTED
    messages = [*chat.messages, user(QUESTIONS[2])]
    reply = ask(chat, QUESTIONS[2])
    assert reply.cached_tokens == 0  # what was left half-way is not built upon
    assert reply.answer.text == fresh(demo, messages).text


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_a_full_context_drops_the_oldest_turns_by_whole_pairs(random_models):
    assistant = random_models["full"]
    chat = Chat(assistant, sampling=SHORT, context=96)
    dropped = 0
    for turn in range(6):
        question = f"pergunta {turn}"
        reply = ask(chat, question)
        dropped += reply.dropped_pairs
        kept = chat.messages[2 * dropped : -2]
        messages = [*kept, user(question)]
        prompt = render_prompt(assistant.tokenizer, messages)
        assert reply.answer.prompt_tokens == len(prompt)
        assert len(prompt) + SHORT.max_tokens <= 96
        assert reply.answer.text == fresh(assistant, messages).text
        if reply.dropped_pairs:  # not one pair too many
            more = chat.messages[2 * dropped - 2 : -2]
            assert len(render_prompt(assistant.tokenizer, [*more, user(question)])) + SHORT.max_tokens > 96
    assert dropped >= 2
    assert len(chat.messages) == 12  # what is out of the context is in the conversation still


def test_a_question_longer_than_the_context_is_refused_and_changes_nothing(random_models):
    chat = Chat(random_models["full"], sampling=SHORT, context=64)
    ask(chat, "olá")
    messages = list(chat.messages)
    with pytest.raises(DataError, match="the context holds 64"):
        ask(chat, "palavra " * 200)
    assert chat.messages == messages
    assert ask(chat, "olá").dropped_pairs <= 1


def test_an_answer_ends_where_the_context_does(random_models):
    chat = Chat(random_models["full"], sampling=Sampling(max_tokens=1000), context=64)
    reply = ask(chat, "olá, tudo bem?")
    assert reply.answer.prompt_tokens + reply.answer.generation_tokens == 64


def test_the_models_own_limit_is_the_context(random_models):
    assert Chat(random_models["full"]).context == 512
    assert Chat(random_models["full"], context=100_000).context == 512
    with pytest.raises(ConfigError, match="holds no conversation"):
        Chat(random_models["full"], context=3)


def test_a_reset_forgets_the_turns(demo):
    chat = Chat(demo, sampling=SHORT)
    first = ask(chat, QUESTIONS[0]).answer
    ask(chat, QUESTIONS[1])
    chat.reset()
    assert chat.messages == []
    assert ask(chat, QUESTIONS[0]).answer.text == first.text


def test_a_system_prompt_counts_from_the_next_question_on(random_models):
    chat = Chat(random_models["full"], sampling=SHORT)
    bare = ask(chat, "olá").answer
    chat.reset()
    chat.system = "Responde em verso."
    said = ask(chat, "olá").answer
    assert said.prompt_tokens > bare.prompt_tokens
    assert said.text == fresh(random_models["full"], [user("olá")], system="Responde em verso.").text


LORA = {
    "lora": {},
    "dora": {"variant": "dora"},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.mark.parametrize("variant", LORA)
def test_adapters_come_and_go_on_one_base(variant, make_adapter, tiny_llama_folder):
    one, two = make_adapter("one", **LORA[variant]), make_adapter("two")
    assistant = load_assistant(str(tiny_llama_folder), dtype="float32")
    chat = Chat(assistant, sampling=SHORT)
    weights = assistant.base.model.layers[0].mlp.up_proj.weight
    said = {}
    for folder in (None, one, two, one, None):
        chat.switch_adapter(folder)
        chat.reset()
        expected = load_assistant(str(tiny_llama_folder), adapter_path=folder, dtype="float32")
        text = ask(chat, "olá").answer.text
        assert text == fresh(expected, [user("olá")]).text
        assert said.setdefault(folder, text) == text
        assert chat.system_prompt == (f"és {folder.name}" if folder else None)
    assert len(set(said.values())) == 3
    assert chat.assistant.model.layers[0].mlp.up_proj.weight is weights
    assert not any("lora" in name for name, _ in tree_flatten(chat.assistant.model.parameters()))


def test_a_switch_in_the_middle_answers_with_the_new_adapter_alone(make_adapter, tiny_llama_folder):
    one = make_adapter("one")
    chat = Chat(load_assistant(str(tiny_llama_folder), dtype="float32"), sampling=SHORT)
    chat.system = ""
    ask(chat, "olá")
    chat.switch_adapter(one)
    expected = load_assistant(str(tiny_llama_folder), adapter_path=one, dtype="float32")
    messages = [*chat.messages, user("e agora?")]
    reply = ask(chat, "e agora?")
    assert reply.cached_tokens == 0  # keys and values of other weights are worth nothing
    assert reply.answer.text == fresh(expected, messages, system="").text


@pytest.mark.parametrize("fault", ["another base", "missing tensors", "no adapter"])
def test_a_switch_that_fails_leaves_the_adapter_before(fault, make_adapter, tiny_llama_folder, tmp_path):
    one = make_adapter("one")
    bad = make_adapter("bad", fingerprint="sha256:0" if fault == "another base" else None)
    if fault == "missing tensors":
        tensors = mx.load(str(bad / "adapters.safetensors"))
        tensors.pop(next(iter(tensors)))
        mx.save_safetensors(str(bad / "adapters.safetensors"), tensors)
    chat = Chat(load_assistant(str(tiny_llama_folder), dtype="float32"), sampling=SHORT)
    chat.switch_adapter(one)
    before = ask(chat, "olá").answer.text
    with pytest.raises(AdapterError):
        chat.switch_adapter(tmp_path / "nowhere" if fault == "no adapter" else bad)
    chat.reset()
    assert ask(chat, "olá").answer.text == before
    assert chat.system_prompt == "és one"


def test_the_template_goes_with_the_adapter(make_adapter, tiny_llama_folder):
    other = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant]"
    one = make_adapter("one", template=other)
    chat = Chat(load_assistant(str(tiny_llama_folder), dtype="float32"), sampling=SHORT)
    own = template_of(chat.assistant.tokenizer)
    chat.switch_adapter(one)
    assert template_of(chat.assistant.tokenizer) == other
    chat.switch_adapter(None)
    assert template_of(chat.assistant.tokenizer) == own != other


def test_a_saved_conversation_is_a_row_of_training_data(demo, tmp_path):
    chat, path = Chat(demo, sampling=Sampling(max_tokens=40)), tmp_path / "rows.jsonl"
    chat.system = "Responde curto."
    for question in QUESTIONS[:2]:
        ask(chat, question)
    chat.save(path)
    chat.save(path, append=True)
    records, _ = read_records(path, {})
    assert len(records) == 2
    assert [m["role"] for m in records[0].messages] == ["system", "user", "assistant", "user", "assistant"]
    assert records[0].messages[1]["content"] == QUESTIONS[0]
    rendered = render(demo.tokenizer, records[0], DataConfig(path=str(path)))
    assert sum(rendered.targets) >= sum(reply.answer.generation_tokens for reply in chat.replies)


def test_a_file_that_is_there_is_not_written_over(demo, tmp_path):
    chat, path = Chat(demo, sampling=SHORT), tmp_path / "rows.jsonl"
    with pytest.raises(DataError, match="nothing to save"):
        chat.save(path)
    ask(chat, "olá")
    path.write_text('{"question": "a", "answer": "b"}')  # without a line's end
    with pytest.raises(StorageError, match="there already"):
        chat.save(path)
    assert path.read_text() == '{"question": "a", "answer": "b"}'
    chat.save(path, append=True)
    assert [list(json.loads(line)) for line in path.read_text().splitlines()] == [
        ["question", "answer"],
        ["messages"],
    ]
    with pytest.raises(StorageError):
        chat.save(tmp_path / "no folder" / "rows.jsonl")


def test_a_bare_assistant_stays_usable_beside_a_conversation(demo):
    chat = Chat(demo, sampling=SHORT)
    ask(chat, QUESTIONS[0])
    assert isinstance(chat.assistant, Assistant)
    assert fresh(demo, [user(QUESTIONS[0])]).text == chat.replies[0].answer.text


def test_an_answer_without_any_text_is_not_kept(tiny_llama_folder):
    chat = Chat(load_assistant(str(tiny_llama_folder), dtype="float32"), sampling=SHORT)
    chat.assistant.model.model.embed_tokens.weight *= 0  # all logits are equal, so token 0 it is
    chat.assistant.tokenizer.add_eos_token("<|endoftext|>")
    reply = ask(chat, "olá")
    assert reply.answer.text == ""
    assert reply.answer.finish_reason == "stop"
    assert chat.messages == chat.replies == []
