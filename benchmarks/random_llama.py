"""Random Llamas in int4, in mlx-lm's layout: a size to measure, without a download.

As a script it writes one with a tokenizer: python benchmarks/random_llama.py FOLDER HIDDEN LAYERS
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
DEMO_MODEL = REPOSITORY / "data" / "demo" / "model"
MISTRAL = REPOSITORY.parent / "shared" / "material" / "tokenizers" / "mistral-v1"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "[INST] {{ message['content'] }} [/INST]{% else %}{{ message['content'] }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
GROUP_SIZE, BITS = 64, 4


def write_random_chat_llama(folder: Path, *, hidden: int, layers: int) -> None:
    """Write one with Mistral's tokenizer (32,000 pieces) where the material has it, else with the demo's."""
    has_mistral = MISTRAL.is_dir()
    source = MISTRAL if has_mistral else DEMO_MODEL
    demo = json.loads((DEMO_MODEL / "config.json").read_text(encoding="utf-8"))
    vocabulary = 32_000 if has_mistral else demo["vocab_size"]
    write_random_llama(folder, vocabulary=vocabulary, hidden=hidden, layers=layers)
    for file in source.glob("*token*"):
        shutil.copyfile(file, folder / file.name)
    if has_mistral:
        settings = folder / "tokenizer_config.json"
        changed = {**json.loads(settings.read_text(encoding="utf-8")), "chat_template": CHAT_TEMPLATE}
        settings.write_text(json.dumps(changed), encoding="utf-8")


def write_random_llama(folder: Path, *, vocabulary: int, hidden: int, layers: int) -> None:
    """Write a Llama of that shape with heads of 64 and a separate head; float32 where it is not quantized."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama

    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": hidden * 11 // 4 // 64 * 64,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    nn.quantize(model, GROUP_SIZE, BITS)
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"}
    )
    quantization = {"group_size": GROUP_SIZE, "bits": BITS}
    config |= {"quantization": quantization, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


if __name__ == "__main__":
    write_random_chat_llama(Path(sys.argv[1]), hidden=int(sys.argv[2]), layers=int(sys.argv[3]))
