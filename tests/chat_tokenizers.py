"""Tokenizers of several kinds, made on the spot or taken from the material."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CHATML, REPOSITORY

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_MATERIAL = REPOSITORY.parent / "shared" / "material"
_ON_DISK = {
    "demo": REPOSITORY / "data" / "demo" / "model",
    "mistral-v1": _MATERIAL / "tokenizers" / "mistral-v1",
    "stories260k": _MATERIAL / "stories260k" / "hf",
}
_CORPUS = [
    "O clube venceu a partida no estádio com dois gols.",
    "Em que ano foi fundado o Valbruma? O clube foi fundado em 1926, há quase um século!",
    "Não, não é assim: a seleção perdeu (por pouco) na prorrogação…  e no fim chorou.\n\nE agora?\n",
]
NAMES = ("chatml", "llama3", *_ON_DISK)


def tokenizer_named(name: str, *, wrapped: bool = False) -> Any:
    """A fresh one: Hugging Face's own, or in mlx-lm's wrapper. Skips the test if its files are absent."""
    from mlx_lm.tokenizer_utils import load
    from transformers import AutoTokenizer

    folder = _ON_DISK.get(name) or _made(name)
    if not folder.is_dir():
        pytest.skip(f"{name} is not beside the project")
    return load(folder) if wrapped else AutoTokenizer.from_pretrained(folder)


@functools.cache
def shared_tokenizer(name: str, *, wrapped: bool = False) -> Any:
    """The same, made once, for tests that change nothing about it."""
    from mlx_qlora.dataset import ensure_chat_template

    tokenizer = tokenizer_named(name, wrapped=wrapped)
    ensure_chat_template(tokenizer)
    return tokenizer


@functools.cache
def _made(name: str) -> Path:
    """A byte-level BPE with ChatML, or with Llama 3's template and a BOS that the tokenizer adds."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if name == "llama3":
        bos, eos, template = "<|begin_of_text|>", "<|eot_id|>", LLAMA3
        specials = [bos, eos, "<|start_header_id|>", "<|end_header_id|>"]
    else:
        bos, eos, template = None, "<|im_end|>", CHATML
        specials = ["<|endoftext|>", "<|im_start|>", eos]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS * 3, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    folder = Path(tempfile.mkdtemp(prefix=f"tokenizer-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "chat_template": template}
    if bos:
        settings["bos_token"] = bos
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text("{}")
    return folder
