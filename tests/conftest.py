"""What many tests share: no network, a cache of their own, a tiny model on disk, the real material.

Arrays live on MLX's default device: the GPU on a Mac, the CPU elsewhere. No test chooses one for all.
"""

import json
import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

REPOSITORY = Path(__file__).parents[1]
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Quantized copies go to a folder of this test session; subprocesses inherit it."""
    before = os.environ.get("MLX_QLORA_CACHE")
    os.environ["MLX_QLORA_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["MLX_QLORA_CACHE"]
    else:
        os.environ["MLX_QLORA_CACHE"] = before


@pytest.fixture(scope="session")
def material() -> Path:
    """Real models and data sets beside the project; absent on most machines."""
    folder = REPOSITORY.parent / "shared" / "material"
    if not folder.is_dir():
        pytest.skip("the material folder is not beside the project")
    return folder


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory) -> Path:
    """A two-layer Llama in bfloat16 with a byte-level tokenizer and ChatML, in Hugging Face layout."""
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


def tiny_llama(parent: Path) -> Path:
    """Write that model into a new folder of `parent`."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama

    folder = parent / "tiny-llama"
    folder.mkdir()
    vocab_size = save_tokenizer(folder)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": -(-vocab_size // 64) * 64,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "max_position_embeddings": 512,
    }
    mx.random.seed(11)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    model.set_dtype(mx.bfloat16)
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), metadata={"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_tokenizer(folder: Path) -> int:
    """Write a byte-level BPE tokenizer with a ChatML template; its vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["o clube venceu a partida no estádio com dois gols"] * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": specials[1:2],
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer.get_vocab_size()
