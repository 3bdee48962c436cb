"""Small models on disk that mlx-lm can spread over ranks, and processes that spread them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from mlx_qlora.config import LoraConfig, ModelConfig, QuantizationConfig
from mlx_qlora.dataset import ensure_chat_template
from mlx_qlora.lora.adapter import AdapterInfo, adapter_tensors, save_adapter, text_sha256
from mlx_qlora.lora.attach import attach
from mlx_qlora.training.launcher import LocalLauncher
from mlx_qlora.weights.loader import load_base
from tests.conftest import save_tokenizer

SIZES = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROMPT = [5, 9, 17, 33, 120, 7, 250, 11]


def save_model(folder: Path, **config: object) -> Path:
    """A random model in bfloat16 with a tokenizer, in Hugging Face layout; layers are most of it."""
    folder.mkdir(parents=True)
    vocab_size = -(-save_tokenizer(folder) // 64) * 64
    tree = {"model_type": "llama", **SIZES, "vocab_size": vocab_size, "torch_dtype": "bfloat16", **config}
    mx.random.seed(5)
    model_class, args_class = _get_classes(tree)
    model = model_class(args_class.from_dict(tree))
    # Zeros would hide a bias that is added once for each rank.
    flat = [
        (name, mx.random.normal(a.shape) * 0.1 if name.endswith("bias") else a)
        for name, a in tree_flatten(model.parameters())
    ]
    mx.save_safetensors(
        str(folder / "model.safetensors"), {name: a.astype(mx.bfloat16) for name, a in flat}, {"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(tree))
    return folder


def save_adapter_of(model: Path, folder: Path, **lora: object) -> Path:
    """A random adapter that changes what the model says, without a training."""
    base = load_base(ModelConfig(path=str(model)), QuantizationConfig(scheme="none"))
    template = ensure_chat_template(base.tokenizer)
    config = LoraConfig(**{"rank": 3, "target_modules": ALL, **lora})
    attach(base.model, config, seed=1)
    tensors = {
        name: mx.random.normal(array.shape, key=mx.random.key(i)) * 0.1
        for i, (name, array) in enumerate(sorted(adapter_tensors(base.model).items()))
    }
    info = AdapterInfo(
        model=ModelConfig(path=str(model)),
        quantization=QuantizationConfig(scheme="none"),
        lora=config,
        fingerprint=base.fingerprint,
        chat_template=template,
        chat_template_sha256=text_sha256(template),
    )
    save_adapter(folder, tensors, info, len(base.model.layers))
    return folder


_RANK = """
import json, sys
import mlx.core as mx
import numpy as np
from mlx_qlora.config import QuantizationConfig
from mlx_qlora.errors import MlxQloraError
from mlx_qlora.inference.generate import load_assistant
from mlx_qlora.inference.sharded import read_part, shard
group = mx.distributed.init(strict=True, backend="ring")
for name, case in json.loads(sys.argv[1])["cases"].items():
    scheme, prompt = QuantizationConfig(scheme=case.pop("scheme", "none")), case.pop("prompt")
    sharding = case.pop("sharding", "auto")
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = load_assistant(**case, quantization=scheme, is_lazy=True).model
    try:
        done = shard(model, group, sharding)
    except MlxQloraError as error:
        np.savez(f"{name}-{group.rank()}.npz", error=str(error))
        continue
    read_part(model)
    held, peak = mx.get_active_memory() - before, mx.get_peak_memory() - before
    logits = np.array(model(mx.array([prompt])))
    np.savez(f"{name}-{group.rank()}.npz", logits=logits, held=held, peak=peak, sharding=done)
    del model
"""


def spread(folder: Path, size: int, cases: dict[str, dict[str, object]]) -> list[Path]:
    """What `size` ranks make of each case, as files ``NAME-RANK.npz`` in `folder`."""
    folder.mkdir()
    script = f"import os; os.chdir({str(folder)!r})\n{_RANK}"
    given = {name: {"prompt": PROMPT, **case} for name, case in cases.items()}
    command = (sys.executable, "-c", script, json.dumps({"cases": given}, default=str))
    started = LocalLauncher(size, commands=[command] * size).start(folder, "127.0.0.1:1", "none")
    try:
        for process in started._processes:
            process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        pass
    finally:
        started.kill()
    if started.codes() != [0] * size:
        raise RuntimeError("\n".join(started.last_lines(rank) for rank in range(size)))
    return sorted(folder.glob("*.npz"))
