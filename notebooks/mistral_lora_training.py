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
# # LoRA em 16 bits no Mac, do início ao fim
#
# É a linha de base com que o QLoRA se compara: as mesmas células de `mistral_qlora_training`, com o
# modelo base como ele é publicado, **sem quantizar**. O adaptador é igual; o modelo base ocupa cerca de
# quatro vezes mais memória. A comparação lado a lado está em `lora_vs_qlora`.
#
# Do jeito que está, ele roda em cerca de um minuto com o modelo embutido no repositório e com um clube
# **inventado** (o nome, as pessoas e os resultados são ficção). Para o seu caso, troque `MODEL` por um
# modelo do Hub, por exemplo `mistralai/Mistral-7B-Instruct-v0.3`, e `DATA` pela sua pasta com
# `train.jsonl` e `valid.jsonl`. Nada mais precisa mudar.
#
# As células podem ser rodadas de novo e interrompidas a qualquer momento.

# %% [markdown]
# ## 1. Preparação
#
# Instale uma vez, no terminal: `pip install -e '.[plots]'`. Depois escolha o modelo e os dados.

# %%
import shutil
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message="IProgress not found")  # de uma barra de progresso que não usamos

from mlx_lm.utils import load_tokenizer

import mlx_qlora as mq
from mlx_qlora.dataset import load_dataset, read_conversations
from mlx_qlora.dataset.check_report import check_data
from mlx_qlora.exchange.fuse import fuse
from mlx_qlora.exchange.fuse_plan import FuseFormat
from mlx_qlora.exchange.gguf_export import export_gguf
from mlx_qlora.exchange.peft import export_peft
from mlx_qlora.inference.exact_match import exact_match
from mlx_qlora.inference.generate import load_assistant
from mlx_qlora.machine.checkup import examine
from mlx_qlora.weights.source import resolve_model

ROOT = Path.cwd() if (Path.cwd() / "data").exists() else Path.cwd().parent
DEMO = ROOT / "data/demo"

MODEL = str(DEMO / "model")  # ou "mistralai/Mistral-7B-Instruct-v0.3"
DATA = str(DEMO / "club")  # pasta com train.jsonl e valid.jsonl
ADAPTER = Path("adapters/mistral-lora")  # onde ficam o adaptador e os checkpoints
NUM_QUESTIONS = 60  # perguntas de teste feitas antes e depois do treino
CHANGES = {}  # o que muda na configuração, por exemplo {"training": {"num_epochs": 5}}

# %% [markdown]
# ## 2. A máquina
#
# Chip, memória, disco, versões e acesso ao Hub. Para cada problema, o comando que o resolve. O que foi
# encontrado vem em inglês, como na linha de comando, onde o mesmo exame é `mlx-qlora doctor`.

# %%
marks = {"ok": "✓", "warning": "!", "problem": "✗", "note": "·"}

for finding in examine():
    print(f"{marks[finding.status]} {finding.subject}: {finding.text}")
    if finding.status != "ok":
        print(f"    faça: {finding.run}")

# %% [markdown]
# ## 3. Configuração e plano
#
# Para um modelo do Hub, a predefinição `auto` escolhe lote, acumulação e comprimento pela memória da
# máquina; o modelo embutido tem a sua própria. As chaves são as mesmas do arquivo YAML e da linha de
# comando.
#
# O plano prevê o pico de memória **antes** de ler um único peso.

# %%
SCHEME = "none"  # o formato do modelo base congelado

settings = mq.read_config(DEMO / "run.yaml") if Path(MODEL) == DEMO / "model" else mq.preset("auto")
paths = {"model": {"path": MODEL}, "data": {"path": DATA}}
stored = {"scheme": SCHEME, "bits": None, "group_size": None, "mode": None}  # None: como o formato prevê
config = mq.build_config(settings, {**paths, "quantization": stored}, CHANGES)
plan = mq.plan(config)

GIB = 1024**3
training = config.training
print(f"LoRA de posto {config.lora.rank}, alfa {config.lora.alpha:g}, base em {config.quantization.scheme}")
print(f"lote {training.batch_size} × {training.gradient_accumulation}, taxa {training.learning_rate:g}")
print(f"até {config.data.max_seq_length} tokens por exemplo")
print(f"{plan.work.num_steps} passos, {plan.work.tokens_per_epoch} tokens por época")
needed, budget = plan.plan.needed_bytes / GIB, plan.plan.budget.num_bytes / GIB
print(f"pico previsto: {needed:.2f} de {budget:.1f} GiB: {'cabe' if plan.plan.fits else 'NÃO cabe'}")
for change in plan.changes():
    print(f"  {change.options}: {change.peak_bytes / GIB:.2f} GiB ({change.effect})")

# %% [markdown]
# ## 4. Os dados
#
# O que mais estraga um treino são os dados: linhas repetidas, respostas vazias, perguntas de teste que
# também estão no treino, textos cortados. Melhor saber disso agora. Na linha de comando:
# `mlx-qlora data check`.

# %%
checked = check_data(config.data, training, load_tokenizer(resolve_model(MODEL).folder))

for name, split in checked.splits.items():
    print(
        f"{name}: {split.rows} linhas, {split.tokens} tokens ({split.target_tokens} a aprender); "
        f"metade tem até {split.lengths['p50']}, a mais longa tem {split.lengths['max']}"
    )
for finding in checked.findings:
    print(f"{marks[finding.severity]} {finding.split or 'dados'}: {finding.what}")
    if finding.run:
        print(f"    faça: {finding.run}")
print("Os dados servem." if checked.is_usable else "Os dados precisam de conserto antes do treino.")

# %% [markdown]
# ## 5. O modelo base
#
# Nada é quantizado: os pesos ficam como o modelo os traz. Em uma CPU, onde o MLX calcula `bfloat16` muito
# devagar, eles vão para a memória em `float32`.

# %%
base = load_assistant(MODEL, quantization=config.quantization)


def weights_mib(folder):
    """Tamanho dos arquivos de pesos, em MiB."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1024**2


before_mib, after_mib = weights_mib(base.base.source.folder), weights_mib(base.base.folder)
print(f"{base.base.num_parameters / 1e6:.1f} milhões de parâmetros")
print(f"no disco: {before_mib:.2f} MiB → {after_mib:.2f} MiB ({after_mib / before_mib:.0%})")

# %% [markdown]
# ## 6. Antes do treino
#
# Duas medidas, nas linhas de teste (ou de validação, se não houver teste): a **perda**, em nats por
# token, e a parte das respostas que são, palavra por palavra, as esperadas.

# %%
dataset = load_dataset(config.data, base.tokenizer, training.seed)
test_rows = dataset.test or dataset.valid
test_file = next(file for name in ("test", "valid") if (file := Path(DATA) / f"{name}.jsonl").exists())
questions = read_conversations(test_file)[:NUM_QUESTIONS]


def measure(assistant):
    """Perda nas linhas de teste e respostas às mesmas perguntas."""
    loss = mq.evaluate(assistant.model, test_rows, batch_size=training.batch_size).loss_nats
    return loss, exact_match(assistant, questions)


before_loss, before = measure(base)
print(f"perda {before_loss:.3f} nats por token, {before.share:.0%} de {len(questions)} respostas exatas")
base = None  # devolve a memória: o treino carrega o modelo por conta própria

# %% [markdown]
# ## 7. Treino
#
# O gráfico se atualiza enquanto o treino anda e gasta no máximo 1 % do tempo. **O botão de parar grava um
# checkpoint; rodar a célula de novo continua de onde parou**, e o resultado é idêntico, bit a bit, ao de
# um treino sem interrupção. Para recomeçar do zero, apague a pasta `ADAPTER`.

# %%
run = trained = None  # ao rodar de novo, o modelo anterior sai da memória
with mq.LivePlot("pt", ADAPTER) as plot:
    run = mq.train(config, ADAPTER, resume=True, observers=[plot])

result, suggestions, run = run.finished, run.suggestions, None
print(f"perda de validação {result.val_loss_nats:.4f} nats por token (passo {result.best_step})")
print(f"pico de memória: {result.peak_memory_bytes / GIB:.2f} GiB; previsto: {needed:.2f} GiB")
for suggestion in suggestions:
    print(f"sugestão (em inglês): {suggestion.line}")

# %% [markdown]
# As curvas ficam em `loss.png`, e o relatório em `report.md` e `report.html`, na pasta do adaptador.
#
# ## 8. Depois do treino
#
# As mesmas medidas, com o adaptador.

# %%
trained = load_assistant(adapter_path=ADAPTER)
after_loss, after = measure(trained)

print(f"{'':8} {'perda':>8} {'exatas':>8}")
print(f"{'antes':8} {before_loss:8.3f} {before.share:8.0%}")
print(f"{'depois':8} {after_loss:8.3f} {after.share:8.0%}")

for index in range(0, len(questions), -(-len(questions) // 4)):
    print(f"\nPergunta: {questions[index][-2]['content']}")
    print(f"Antes:    {before.answers[index]}")
    print(f"Depois:   {after.answers[index]}")
    print(f"Esperada: {after.expected[index]}")

# %% [markdown]
# ## 9. Faça a sua pergunta

# %%
QUESTION = questions[0][-2]["content"]  # escreva a sua aqui

for piece in mq.stream(trained.model, trained.tokenizer, QUESTION, max_tokens=64):
    print(piece, end="", flush=True)

# %% [markdown]
# ## 10. Exportar
#
# O adaptador já serve ao `mlx-lm` como está. Daqui ele vai para outros programas: **PEFT** (Hugging
# Face), um **modelo fundido** (base e adaptador em um só, para MLX) e **GGUF** (llama.cpp, Ollama, LM
# Studio). Ao fundir, o que o formato perde do adaptador é medido antes de gravar; em 16 bits, quase nada.
#
# A célula apaga o que ela mesma exportou antes.

# %%
trained = None
EXPORTS = Path("models/mistral-lora")
shutil.rmtree(EXPORTS, ignore_errors=True)
EXPORTS.mkdir(parents=True)

peft = export_peft(ADAPTER, EXPORTS / "peft")
pre = "gpt-2" if Path(MODEL) == DEMO / "model" else None  # o llama.cpp não conhece o tokenizador embutido
fused = fuse(ADAPTER, EXPORTS / "fundido", FuseFormat(adapted_scheme=None if SCHEME == "none" else "int8"))
gguf = export_gguf(fused.path, EXPORTS / "fundido.gguf", pre=pre)

print(f"PEFT:    {peft.num_adapted} camadas, {peft.bytes / 1024**2:.2f} MiB em {peft.path}")
print(f"fundido: {fused.bits_per_weight:.2f} bits por peso, {fused.bytes / 1024**2:.2f} MiB em {fused.path}")
print(f"         perde {fused.loss.logits.lost_share:.2%} do que o adaptador faz")
print(f"GGUF:    {gguf.file_type}, {gguf.bytes / 1024**2:.2f} MiB em {gguf.path}")

# %% [markdown]
# O modelo fundido responde sem o adaptador:

# %%
model, tokenizer = mq.load(str(fused.path))
print(mq.generate(model, tokenizer, QUESTION, max_tokens=64))

# %% [markdown]
# ## 11. Fora do caderno
#
# O adaptador sabe qual é o modelo base, a quantização e o modelo de conversa.

# %%
print(f'mlx-qlora infer "{QUESTION}" --adapter-path {ADAPTER}')
print(f"mlx-qlora serve --model {MODEL} --adapter meu={ADAPTER}   # servidor compatível com a API da OpenAI")
