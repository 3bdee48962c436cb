"""Tokenizers of several families, made on the spot, and the chat templates people meet."""

from __future__ import annotations

from functools import cache
from typing import Any

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim }}{{ '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Strict alternation, no system turn, nothing between [/INST] and the answer.
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
# The prompt ends in a space, which tokenizers join with the answer's first word.
TRAILING_SPACE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ 'A: ' + message['content'] + eos_token }}{% else %}{{ 'Q: ' + message['content'] + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
)
# Thoughts are shown in the last answer only, as in Qwen3.
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# What stands before an answer depends on what follows it: nothing can be told apart.
COUNTING = "{{ messages | length }} turns\n" + CHATML

CORPUS = [
    "user assistant system o clube venceu a partida no estádio com dois gols [INST] [/INST] Q: A: User:",
    "Quem venceu o jogo? O clube da cidade venceu por dois a um. Hello there, what is the capital?",
    "[/INST](sim) [/INST](não) ](http) ](https) Assistant: Hello Assistant: Olá A: sim A: não",
] * 8
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3_TOKENS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
)  # fmt: skip


def hugging_face(backend: Any, template: str | None, **names: str) -> Any:
    """A backend as transformers' tokenizer."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, clean_up_tokenization_spaces=False, **names
    )


def byte_level(template: str | None, control: tuple[str, ...], **names: str) -> Any:
    """As GPT-2, Llama 3 and Qwen have it: every byte has a token, nothing is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=420, special_tokens=list(control), initial_alphabet=alphabet, show_progress=False
        ),
    )
    return hugging_face(backend, template, **names)


def sentencepiece(template: str | None, *, adds_bos: bool = True, prepend: str = "always") -> Any:
    """As Llama 2 and Mistral have it: a space becomes ▁, and one is put before the text.

    Args:
        prepend: always: before each stretch between control tokens; first: before the whole only.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if prepend == "always":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    control = ["<unk>", "<s>", "</s>"]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    backend.train_from_iterator(
        [word for text in CORPUS for word in text.split()],
        trainers.BpeTrainer(vocab_size=520, special_tokens=[*control, *fallback], show_progress=False),
    )
    plain = Tokenizer.from_str(_without_control(backend.to_str(), keep=control))
    if adds_bos:
        plain.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", plain.token_to_id("<s>"))]
        )
    return hugging_face(plain, template, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _without_control(serialized: str, *, keep: list[str]) -> str:
    import json

    tree = json.loads(serialized)
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] in keep]
    return json.dumps(tree)


def unigram(template: str) -> Any:
    """A vocabulary that holds its control tokens as ordinary pieces too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted({letter for text in CORPUS for letter in text} | set("</s>▁\n"))
    vocabulary = [("<unk>", 0.0), ("</s>", -1.0), *((letter, -5.0) for letter in letters)]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["</s>", "<unk>"])
    return hugging_face(backend, template, eos_token="</s>", unk_token="<unk>")


@cache
def chatml() -> Any:
    return byte_level(CHATML, CHATML_TOKENS, eos_token="<|im_end|>", pad_token="<|endoftext|>")


@cache
def llama3() -> Any:
    # Only two of its control tokens have a name: the others are special in the backend alone.
    return byte_level(LLAMA3, LLAMA3_TOKENS, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")


@cache
def thinking() -> Any:
    return byte_level(THINKING, CHATML_TOKENS, eos_token="<|im_end|>")


@cache
def trailing_space() -> Any:
    return byte_level(TRAILING_SPACE, CHATML_TOKENS, eos_token="<|endoftext|>")


@cache
def mistral() -> Any:
    return sentencepiece(MISTRAL)


@cache
def metaspace() -> Any:
    return sentencepiece(TRAILING_SPACE, prepend="first")


@cache
def base_model() -> Any:
    """A tokenizer that brought no template and was given the default one."""
    from mlx_qlora.dataset.render import ensure_chat_template

    tokenizer = sentencepiece(None)
    ensure_chat_template(tokenizer)
    return tokenizer


FAMILIES = {
    make.__name__: make for make in (chatml, llama3, thinking, trailing_space, mistral, metaspace, base_model)
}
