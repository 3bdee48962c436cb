"""Build the demo's model and data set from scratch: ``data/demo/model`` and ``data/demo/club``.

    python scripts/build_demo_model.py

Stages:
  1. club       the invented club's facts become chat rows; train, valid and test differ in wording
                (``demo/club.py``)
  2. tokenizer  a byte-level BPE of 1280 entries is trained on random questions and answers
                (``demo/corpus.py``)
  3. pretrain   a Llama of one million parameters learns the form of such questions and answers in float32;
                every value is redrawn for every row, so there is no fact to learn, least of all the club's
  4. publish    config.json, model.safetensors (bfloat16), tokenizer and chat template, by renames

Everything follows from ``--seed``: two runs on one machine give the same bytes. On Linux, OpenBLAS is loaded
if it is there (``libopenblas.so.0``, Debian's libopenblas0-pthread): with it the build takes seven to ten
minutes on two cores, without it more than an hour. ``--steps 50 --output rehearsal`` is a quick rehearsal.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "demo"))

if sys.platform == "linux":  # before MLX, whose Linux wheel links a reference BLAS: 4 against 100 GFLOP/s
    with suppress(OSError):
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
import numpy as np  # noqa: E402
from club import SPLITS, rows, write_rows  # noqa: E402
from corpus import Turn, conversations  # noqa: E402
from mlx.utils import tree_flatten, tree_map  # noqa: E402
from mlx_lm.models.llama import Model, ModelArgs  # noqa: E402
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers  # noqa: E402

SPECIALS = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
PAD, END, SYSTEM, USER, ASSISTANT = SPECIALS
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 384,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "vocab_size": 1280,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": None,
    "eos_token_id": SPECIALS.index(END),
    "pad_token_id": SPECIALS.index(PAD),
    "torch_dtype": "bfloat16",
}
TOKENIZER_ROWS = 30_000
BATCH_ROWS, POOL_BATCHES, LENGTH_MULTIPLE = 64, 16, 4
PEAK_LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 3e-3, 0.1, 1.0


def render(turns: list[Turn]) -> str:
    """What the chat template gives for a whole conversation."""
    return "".join(f"{USER}{question}{ASSISTANT}{answer}{END}" for question, answer in turns)


def train_tokenizer(seed: int) -> Tokenizer:
    """A byte-level BPE on random conversations; no text is unknown to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (text for turns in islice(conversations(seed), TOKENIZER_ROWS) for turn in turns for text in turn)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def batches(tokenizer: Tokenizer, seed: int) -> Iterator[tuple[mx.array, mx.array]]:
    """Padded token rows (B, T) and their lengths (B,), an endless stream.

    Rows are sorted by length inside a pool of some batches, so few of the tokens are padding.
    """
    stream, order = conversations(seed), np.random.default_rng(seed)
    while True:
        pool = [tokenizer.encode(render(turns)).ids for turns in islice(stream, BATCH_ROWS * POOL_BATCHES)]
        pool.sort(key=len)
        for index in order.permutation(POOL_BATCHES):
            yield _pad(pool[index * BATCH_ROWS : (index + 1) * BATCH_ROWS])


def _pad(encoded: list[list[int]]) -> tuple[mx.array, mx.array]:
    longest = -(-max(map(len, encoded)) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    tokens = np.full((len(encoded), longest + 1), SPECIALS.index(PAD), dtype=np.int32)
    for row, ids in zip(tokens, encoded, strict=True):
        row[: len(ids)] = ids
    return mx.array(tokens), mx.array([len(ids) for ids in encoded])


def mean_nll(model: nn.Module, tokens_BT: mx.array, lengths_B: mx.array) -> mx.array:
    """Mean negative log-likelihood in nats of every token but the first and the padding."""
    logits_BTV = model(tokens_BT[:, :-1])
    mask_BT = mx.arange(1, tokens_BT.shape[1])[None] < lengths_B[:, None]
    return (nn.losses.cross_entropy(logits_BTV, tokens_BT[:, 1:]) * mask_BT).sum() / mask_BT.sum()


def pretrain(tokenizer: Tokenizer, steps: int, seed: int) -> tuple[Model, float]:
    """Train from random weights; returns the model and the mean loss of the last hundred steps, in nats."""
    mx.random.seed(seed)
    model = Model(ModelArgs.from_dict(CONFIG))
    warmup = min(100, steps // 10)
    rise = optim.linear_schedule(0.0, PEAK_LEARNING_RATE, warmup)
    fall = optim.cosine_decay(PEAK_LEARNING_RATE, steps - warmup, 0.01 * PEAK_LEARNING_RATE)
    optimizer = optim.AdamW(
        optim.join_schedules([rise, fall], [warmup]),
        betas=[0.9, 0.95],
        weight_decay=WEIGHT_DECAY,
        bias_correction=True,
    )
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]
    mx.eval(state)

    @partial(mx.compile, inputs=state, outputs=state)
    def step(tokens_BT: mx.array, lengths_B: mx.array) -> mx.array:
        loss, grads = nn.value_and_grad(model, mean_nll)(model, tokens_BT, lengths_B)
        grads, _ = optim.clip_grad_norm(grads, MAX_GRAD_NORM)
        optimizer.update(model, grads)
        return loss

    losses: list[float] = []
    started, seen = time.perf_counter(), 0
    for number, (tokens_BT, lengths_B) in enumerate(islice(batches(tokenizer, seed + 1), steps), start=1):
        loss = step(tokens_BT, lengths_B)
        mx.eval(state, loss)
        losses.append(loss.item())
        seen += int(lengths_B.sum().item())
        if number % 50 == 0 or number == steps:
            report(number, steps, losses, seen, time.perf_counter() - started)
    last = losses[-100:]
    return model, sum(last) / len(last)


def report(number: int, steps: int, losses: list[float], seen: int, seconds: float) -> None:
    """One progress line: the loss is the mean since the last line."""
    recent = losses[-50:]
    loss = sum(recent) / len(recent)
    left = seconds / number * (steps - number)
    rate = seen / seconds
    print(f"step {number}/{steps}  loss {loss:.4f} nats  {rate:.0f} tokens/s  {left:.0f} s left", flush=True)


def write_model(folder: Path, model: Model, tokenizer: Tokenizer) -> None:
    """The folder that ``mlx_lm.load`` and transformers' tokenizer read."""
    folder.mkdir(parents=True)
    weights = dict(tree_flatten(tree_map(lambda p: p.astype(mx.bfloat16), model.parameters())))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    tokenizer.save(str(folder / "tokenizer.json"))
    ends = {"eos_token_id": CONFIG["eos_token_id"], "pad_token_id": CONFIG["pad_token_id"]}
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "generation_config.json", {**ends, "do_sample": False})
    names = {"eos_token": END, "pad_token": PAD, "additional_special_tokens": [SYSTEM, USER, ASSISTANT]}
    write_json(folder / "special_tokens_map.json", names)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", tokenizer_config)


def write_json(path: Path, content: dict) -> None:
    """Readable JSON with a final newline."""
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def publish(built: Path, output: Path) -> None:
    """Put each finished folder in its place by renames; the old one is kept until the new one stands."""
    for path in built.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    for folder in sorted(built.iterdir()):
        target, old = output / folder.name, output / f".{folder.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        folder.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    demo = HERE.parent / "data" / "demo"
    parser.add_argument("--output", type=Path, default=demo, help="folder to fill (default: data/demo)")
    parser.add_argument("--steps", type=int, default=2000, help="pretraining updates (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the temporary folder goes, as on Ctrl-C
    arguments.output.mkdir(parents=True, exist_ok=True)
    built = Path(tempfile.mkdtemp(prefix=".building-", dir=arguments.output))
    try:
        (built / "club").mkdir()
        for split in SPLITS:
            write_rows(built / "club" / f"{split}.jsonl", rows(split))
        tokenizer = train_tokenizer(arguments.seed)
        model, loss = pretrain(tokenizer, arguments.steps, arguments.seed)
        write_model(built / "model", model, tokenizer)
        publish(built, arguments.output)
    finally:
        shutil.rmtree(built, ignore_errors=True)
    parameters = sum(array.size for _, array in tree_flatten(model.parameters()))
    print(f"{arguments.output}: {parameters} parameters, final training loss {loss:.4f} nats")


if __name__ == "__main__":
    main()
