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
# # LoRA ou QLoRA? Medir em vez de adivinhar
#
# O mesmo treino, com os mesmos dados e a mesma semente, sobre o modelo base em 16 bits (**LoRA**) e sobre
# o modelo quantizado (**QLoRA**). Tudo o que está nas tabelas é medido quando a célula roda, e cada
# treino tem um processo só seu, para que a memória de um não conte no outro.
#
# Como está, usa o modelo embutido e leva cerca de um minuto. Para o seu caso, troque `MODEL` por um
# modelo de 16 bits do Hub, por exemplo `Qwen/Qwen2.5-0.5B-Instruct`, e `DATA` pelos seus dados. Na linha
# de comando: `mlx-qlora compare-training`.

# %% [markdown]
# ## 1. O que comparar

# %%
import warnings
from io import BytesIO
from pathlib import Path
from statistics import median

from IPython.display import Image, display
from matplotlib.figure import Figure

import mlx_qlora as mq
from mlx_qlora.studies.training_comparison import Request, compare_training
from mlx_qlora.studies.training_runs import Told

warnings.filterwarnings("ignore", message="IProgress not found")  # de uma barra de progresso que não usamos

ROOT = Path.cwd() if (Path.cwd() / "data").exists() else Path.cwd().parent
DEMO = ROOT / "data/demo"

MODEL = str(DEMO / "model")  # ou "Qwen/Qwen2.5-0.5B-Instruct"
DATA = str(DEMO / "club")
OUTPUT = Path("adapters/lora-vs-qlora")  # adaptadores e medidas; o que já foi medido não se repete
SCHEMES = ("none", "int8", "int4")  # none: LoRA em 16 bits; os outros: QLoRA
SEEDS = (0,)  # mais sementes mostram o que é acaso
CHANGES = {"training": {"num_epochs": 3}}

settings = mq.read_config(DEMO / "run.yaml") if Path(MODEL) == DEMO / "model" else mq.preset("auto")
config = mq.build_config(settings, {"model": {"path": MODEL}, "data": {"path": DATA}}, CHANGES)

# %% [markdown]
# ## 2. Treinar e medir
#
# O botão de parar grava um checkpoint; rodar a célula de novo continua de onde parou.

# %%
status = display("começando", display_id=True)


def on_phase(name, phase):
    """Mostra o que acontece agora."""
    words = {
        "loading the base": "carregando a base",
        "training": "treinando",
        "loading": "carregando",
        "generating": "gerando",
        "scoring": "pontuando",
        "asking": "perguntando",
        "kept from before": "já medido",
    }
    status.update({"text/plain": f"{name.replace('seed', 'semente')}: {words.get(phase, phase)}"}, raw=True)


with mq.LivePlot("pt") as plot:
    request = Request(config=config, schemes=SCHEMES, seeds=SEEDS, max_questions=60)
    found = compare_training(request, OUTPUT, Told(phase=on_phase, event=plot))
status.update({"text/plain": "tudo medido"}, raw=True)

for row in found.rows:
    for problem in row.problems:
        print(f"{row.scheme}: {problem}")

# %% [markdown]
# ## 3. A tabela
#
# O pico de memória é o do processo inteiro, com Python e bibliotecas: em um modelo de um milhão de
# parâmetros ele é quase só isso, e a diferença aparece na linha do MLX. Em uma CPU os pesos de 16 bits
# são calculados em `float32`. Um passo mais lento com pesos quantizados é o preço: eles são
# desempacotados a cada uso.

# %%
MIB = 1024**2
rows = [row for row in found.rows if row.runs]
names = {row.scheme: "LoRA, 16 bits" if row.is_lora else f"QLoRA, {row.scheme}" for row in rows}


def middle(row, of):
    """Mediana de uma medida sobre as sementes."""
    return median(of(run) for run in row.runs)


figures = {
    "base no disco, MiB": lambda row: row.base.bytes_on_disk / MIB,
    "base na memória, MiB": lambda row: row.base.bytes_in_memory / MIB,
    "pico do processo, MiB": lambda row: middle(row, lambda run: run.training.peak_footprint_bytes / MIB),
    "pico do MLX, MiB": lambda row: middle(row, lambda run: run.training.mlx_peak_bytes / MIB),
    "um passo, ms": lambda row: middle(row, lambda run: 1000 * run.training.seconds_per_step),
    "treino, tokens/s": lambda row: middle(row, lambda run: run.training.tokens_per_second),
    "resposta, tokens/s": lambda row: middle(row, lambda run: run.answers.tokens_per_second),
    "adaptador, MiB": lambda row: middle(row, lambda run: run.training.adapter_bytes / MIB),
    "perda de validação": lambda row: middle(row, lambda run: run.training.val_loss_nats),
    "respostas exatas, %": lambda row: middle(row, lambda run: 100 * run.answers.exact_match),
}
print(f"{'':22}" + "".join(f"{names[row.scheme]:>16}" for row in rows))
for name, of in figures.items():
    print(f"{name:22}" + "".join(f"{of(row):16.4g}" for row in rows))

# %% [markdown]
# ## 4. Em uma figura

# %%
shown = ["base no disco, MiB", "pico do MLX, MiB", "um passo, ms", "resposta, tokens/s", "perda de validação"]
figure = Figure(figsize=(10, 4.6), dpi=110, layout="constrained")
panels = figure.subplots(2, 3).flat
for panel, name in zip(panels, shown, strict=False):
    for place, row in enumerate(rows):
        length = figures[name](row)
        colour, hatch = ("#D55E00", "///") if row.is_lora else ("#0072B2", None)
        panel.barh(place, length, color=colour, hatch=hatch, edgecolor="white")
        panel.annotate(f"{length:.3g}", (length, place), (4, 0), textcoords="offset points", va="center")
    panel.set_yticks(range(len(rows)), [names[row.scheme] for row in rows])
    panel.invert_yaxis()
    panel.set_title(name, loc="left", fontsize=10)
    panel.set_xlim(0, 1.3 * max(figures[name](row) for row in rows))

curves = figure.axes[-1]
looks = (("#D55E00", "s", "--"), ("#0072B2", "o", "-"), ("#009E73", "^", "-"), ("#CC79A7", "D", "-"))
for row, (colour, marker, line) in zip(rows, looks, strict=False):
    steps, losses = zip(*row.runs[0].training.curve, strict=True)
    curves.plot(steps, losses, color=colour, marker=marker, linestyle=line, label=names[row.scheme])
curves.set_title("perda de validação, por passo", loc="left", fontsize=10)
curves.legend(frameon=False, fontsize=8)
for panel in figure.axes:
    panel.spines[["top", "right"]].set_visible(False)
picture = BytesIO()
figure.savefig(picture)
display(Image(picture.getvalue()))
