# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Importar um arquivo GGUF e treinar com ele
#
# GGUF é o formato do llama.cpp, do Ollama e do LM Studio. Um arquivo assim vira uma pasta de modelo como
# qualquer outra: com ela se treina, se pergunta e se serve.
#
# Como está, o caderno primeiro **exporta** o modelo embutido para GGUF, para ter o que importar. Se já
# tiver um arquivo, ponha o caminho dele em `GGUF`, ou um do Hub, como
# `Qwen/Qwen2.5-0.5B-Instruct-GGUF:qwen2.5-0.5b-instruct-q4_0.gguf`, e os seus dados em `DATA`.

# %% [markdown]
# ## 1. Preparação

# %%
import shutil
import warnings
from collections import Counter
from pathlib import Path

import mlx_qlora as mq
from mlx_qlora.dataset import read_conversations
from mlx_qlora.exchange.gguf_export import export_gguf
from mlx_qlora.weights.gguf import import_gguf
from mlx_qlora.weights.source import resolve_gguf

warnings.filterwarnings("ignore", message="IProgress not found")  # de uma barra de progresso que não usamos

ROOT = Path.cwd() if (Path.cwd() / "data").exists() else Path.cwd().parent
DEMO = ROOT / "data/demo"

GGUF = None  # None: o modelo embutido, exportado daqui a pouco
DATA = str(DEMO / "club")
FOLDER = Path("models/gguf")  # o que este caderno escreve
ADAPTER = Path("adapters/gguf")
STEPS = 60

MIB = 1024**2

# %% [markdown]
# ## 2. Um arquivo GGUF
#
# `q8_0` guarda cada grupo de 32 pesos em 8 bits, com uma escala de 16 bits.

# %%
FOLDER.mkdir(parents=True, exist_ok=True)

if GGUF is None:
    path = FOLDER / "embutido-q8_0.gguf"
    path.unlink(missing_ok=True)
    exported = export_gguf(DEMO / "model", path, type_name="q8_0", pre="gpt-2")
    print(f"{exported.num_parameters / 1e6:.2f} milhões de parâmetros")
    print(f"{exported.bits_per_weight:.2f} bits por peso")
    worst = max(tensor.relative_error for tensor in exported.tensors)
    print(f"maior erro relativo de um tensor: {worst:.2%}")
    name = path.name
else:
    path, name = resolve_gguf(GGUF)
print(f"{name}: {path.stat().st_size / MIB:.2f} MiB")

# %% [markdown]
# ## 3. Olhar dentro, sem carregar
#
# O cabeçalho é lido e conferido; cada tensor só vem para a memória quando é pedido.

# %%
looked = mq.open_gguf(path)

for key in ("general.architecture", "general.name", "tokenizer.ggml.model"):
    print(f"{key}: {looked.metadata.get(key)}")
print(f"{len(looked.tensors)} tensores, entre eles:")
for tensor in list(looked.tensors)[:3]:
    values = looked.tensors[tensor]
    print(f"  {tensor}: forma {values.shape}, desvio padrão {values.std():.4f}")

# %% [markdown]
# ## 4. Importar
#
# Formatos afins sobre 32 pesos, como `Q8_0` e `Q4_0`, mantêm **exatamente** os mesmos números. Os outros
# são quantizados de novo em 8 bits, e o caderno diz quais.

# %%
model_folder = FOLDER / "modelo"
shutil.rmtree(model_folder, ignore_errors=True)

imported = import_gguf(path, model_folder, name=name)
print(f"{imported.architecture}, {imported.bits_per_weight:.2f} bits por peso, em {imported.path}")
for (kind, stored, exact), count in Counter(
    (tensor.gguf_type, tensor.stored, tensor.is_exact) for tensor in imported.tensors
).items():
    print(
        f"  {count:3} tensores {kind} → {stored}: {'os mesmos números' if exact else 'quantizados de novo'}"
    )

# %% [markdown]
# ## 5. Perguntar antes
#
# A primeira pergunta do conjunto de teste ou de validação (ou escreva a sua em `QUESTION`).

# %%
rows = next(file for name in ("test", "valid") if (file := Path(DATA) / f"{name}.jsonl").exists())
QUESTION = read_conversations(rows)[0][-2]["content"]

model, tokenizer = mq.load(str(model_folder))
before = mq.generate(model, tokenizer, QUESTION, max_tokens=64)
model = None  # devolve a memória
print("Pergunta:", QUESTION)
print("Antes:   ", before)

# %% [markdown]
# ## 6. Treinar
#
# O modelo importado já está quantizado; por isso `scheme` é `none`: fica como está. O botão de parar
# grava um checkpoint, e rodar a célula de novo continua de onde parou.

# %%
settings = mq.read_config(DEMO / "run.yaml") if GGUF is None else mq.preset("auto")
changes = {
    "model": {"path": str(model_folder)},
    "data": {"path": DATA},
    "quantization": {"scheme": "none", "bits": None, "group_size": None, "mode": None},
    "training": {"max_steps": STEPS},
}
config = mq.build_config(settings, changes)

with mq.LivePlot("pt", ADAPTER) as plot:
    result = mq.train(config, ADAPTER, resume=True, observers=[plot]).finished
print(f"perda de validação {result.val_loss_nats:.4f} nats por token (passo {result.best_step})")

# %% [markdown]
# ## 7. Perguntar depois

# %%
model, tokenizer = mq.load(adapter_path=ADAPTER)
after = mq.generate(model, tokenizer, QUESTION, max_tokens=64)
print("Pergunta:", QUESTION)
print("Antes:   ", before)
print("Depois:  ", after)
