"""Tokens per second of the engine's batches: how many streams, one adapter or several, against mlx-lm's own.

    python benchmarks/batching.py [--model FOLDER] [--streams 1,4,16,50] [--tokens 64] [--repeats 3]

Each figure is the best of the repeats, over prefill and decoding together, at temperature 0 and with EOS off.
In one run, in turn: mlx-lm's BatchGenerator on the base, as mlx-lm loads it, in the same type; our batch on
the base; on one adapter; on four in turn; the same four through the whole engine (its thread, its texts, no
prompt cache). Ratios are of these figures. Without --model a random Llama of 4 layers and width 256 is
made on the spot, stored in 4 bits.
"""

from __future__ import annotations

import argparse
import json
import queue
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator
from mlx_lm.models import llama

from mlx_qlora.config import LoraConfig, ModelConfig, QuantizationConfig
from mlx_qlora.lora.adapter import AdapterInfo, adapter_tensors, save_adapter, text_sha256
from mlx_qlora.lora.attach import attach
from mlx_qlora.serving.batch import PREFILL_ROWS, PREFILL_TOKENS, Batch
from mlx_qlora.serving.engine import Engine, Job, JobFailed
from mlx_qlora.serving.row_lora import Row
from mlx_qlora.serving.sampling import Drawing
from mlx_qlora.weights.loader import load_base
from mlx_qlora.weights.source import fingerprint

NUM_ADAPTERS = 4
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
WIDTH, LAYERS, VOCABULARY = 256, 4, 2048


def make_model(folder: Path) -> Path:
    """A random Llama, stored in 4 bits, with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(a + b for a in alphabet for b in alphabet)][: VOCABULARY - 1]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate([*words, "</s>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "intermediate_size": 3 * WIDTH,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
        "quantization": {"group_size": 64, "bits": 4},
    }
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    nn.quantize(model, 64, 4)
    tensors = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_adapters(base: Path, folder: Path, rank: int) -> dict[str, Path]:
    """Four random adapters on the attention's projections."""
    from mlx_lm.utils import load_model

    made = {}
    for number in range(NUM_ADAPTERS):
        config = LoraConfig(rank=rank, alpha=2.0 * rank, target_modules=TARGETS)
        model, _ = load_model(base, lazy=True)
        attach(model, config, seed=number)
        tensors = {
            name: mx.random.normal(array.shape, key=mx.random.key(number)) * 0.02
            if name.endswith("lora_b")
            else array
            for name, array in adapter_tensors(model).items()
        }
        info = AdapterInfo(
            model=ModelConfig(path=str(base)),
            quantization=QuantizationConfig(scheme="none"),
            lora=config,
            fingerprint=fingerprint(base),
            chat_template=TEMPLATE,
            chat_template_sha256=text_sha256(TEMPLATE),
        )
        made[f"adapter-{number}"] = folder / f"adapter-{number}"
        save_adapter(made[f"adapter-{number}"], tensors, info, num_layers=len(model.layers))
    return made


def prompts_of(num_streams: int, num_tokens: int, vocabulary: int) -> list[list[int]]:
    rng = np.random.default_rng(num_streams)
    return [[int(t) for t in rng.integers(1, vocabulary, num_tokens)] for _ in range(num_streams)]


def job_of(tokens: list[int], max_tokens: int, adapter: str | None = None) -> Job:
    return Job(adapter=adapter, tokens=tokens, max_tokens=max_tokens, ignore_eos=True)


def run_mlx_lm(model: nn.Module, prompts: list[list[int]], max_tokens: int) -> int:
    generator = BatchGenerator(
        model,
        completion_batch_size=len(prompts),
        prefill_batch_size=min(PREFILL_ROWS, len(prompts)),
        prefill_step_size=PREFILL_TOKENS,
    )
    generator.insert(prompts, [max_tokens] * len(prompts))
    count = 0
    while responses := generator.next_generated():
        count += len(responses)
    generator.close()
    return count


def run_batch(engine: Engine, prompts: list[list[int]], max_tokens: int, adapters: list[int]) -> int:
    loaded = engine._loaded_now()
    batch = Batch(loaded.base.model, loaded.adapters, [], len(prompts))
    for number, tokens in enumerate(prompts):
        adapter = adapters[number % len(adapters)]
        batch.add(Row(job_of(tokens, max_tokens), adapter, Drawing(0.0, 1.0, 0, 0.0, 0)))
    count = 0
    while len(batch):
        count += len(batch.step()[1])
    batch.close()
    return count


def run_engine(engine: Engine, prompts: list[list[int]], max_tokens: int) -> int:
    told: queue.Queue = queue.Queue()
    for number, tokens in enumerate(prompts):
        name = engine.adapter_names[number % len(engine.adapter_names)]
        engine.submit(job_of(tokens, max_tokens, name), told.put)
    count, open_jobs = len(prompts) * max_tokens, len(prompts)
    while open_jobs:
        what = told.get()
        if isinstance(what, JobFailed):
            raise what
        open_jobs -= what.finish_reason is not None
    return count


def tokens_per_second(run: Callable[[], int], repeats: int) -> float:
    best = 0.0
    for _ in range(repeats):
        started = time.perf_counter()
        best = max(best, run() / (time.perf_counter() - started))
    return best


def measure(
    engine: Engine, plain: nn.Module, num_streams: int, arguments: argparse.Namespace, repeats: int
) -> dict[str, float]:
    """Tokens per second by what ran."""
    prompts = prompts_of(num_streams, arguments.prompt, engine.vocabulary_size)
    tokens, mixed = arguments.tokens, list(range(1, NUM_ADAPTERS + 1))
    runs: dict[str, Callable[[], int]] = {
        "mlx-lm": lambda: run_mlx_lm(plain, prompts, tokens),
        "base": lambda: run_batch(engine, prompts, tokens, [0]),
        "one adapter": lambda: run_batch(engine, prompts, tokens, [1]),
        "mixed": lambda: run_batch(engine, prompts, tokens, mixed),
        "engine, mixed": lambda: run_engine(engine, prompts, tokens),
    }
    return {name: tokens_per_second(run, repeats) for name, run in runs.items()}


def main() -> None:
    """Print a line for each number of streams."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--streams", default="1,4,16,50")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.streams.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = arguments.model or make_model(folder / "model")
        adapters = make_adapters(base, folder, arguments.rank)
        engine = Engine.start(
            str(base), adapters, max_batch=max(counts), max_queue=max(counts), prompt_cache_bytes=0
        )
        stored = QuantizationConfig(scheme="none")
        plain = load_base(ModelConfig(path=str(base)), stored).model.eval()
        measure(engine, plain, min(counts), arguments, 1)  # warms up
        print(
            "streams    mlx-lm      base       one     mixed    engine   base/mlx-lm  mixed/one  engine/mixed"
        )
        for count in counts:
            rate = measure(engine, plain, count, arguments, arguments.repeats)
            figures = "".join(f"{value:10.1f}" for value in rate.values())
            print(
                f"{count:7d}{figures}{rate['base'] / rate['mlx-lm']:14.2f}"
                f"{rate['mixed'] / rate['one adapter']:11.2f}{rate['engine, mixed'] / rate['mixed']:14.2f}",
                flush=True,
            )
        engine.stop()
    mx.clear_streams()


if __name__ == "__main__":
    main()
