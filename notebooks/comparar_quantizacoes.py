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
# # Comparar quantizações
#
# O mesmo modelo em vários formatos, lado a lado: tamanho, memória, velocidade e o que acontece com as
# respostas. Cada formato é medido em um processo próprio, um depois do outro, para que a memória de um
# não conte no outro. Nada nesta página está escrito à mão.
#
# Como está, usa o modelo embutido no repositório e leva cerca de meio minuto. Para o seu caso, troque
# `MODEL` por um modelo de 16 bits do Hub, por exemplo `Qwen/Qwen2.5-0.5B-Instruct`, e `DATA` pelos seus
# dados. Na linha de comando: `mlx-qlora compare`.

# %% [markdown]
# ## 1. O que comparar

# %%
import warnings
from io import BytesIO
from pathlib import Path

from IPython.display import Image, display
from matplotlib.figure import Figure

from mlx_qlora.inference.comparison import Request, compare

warnings.filterwarnings("ignore", message="IProgress not found")  # de uma barra de progresso que não usamos

ROOT = Path.cwd() if (Path.cwd() / "data").exists() else Path.cwd().parent

MODEL = str(ROOT / "data/demo/model")  # ou "Qwen/Qwen2.5-0.5B-Instruct"
DATA = str(ROOT / "data/demo/club")
ADAPTER = None  # um adaptador, se quiser comparar com ele em todos os formatos
SCHEMES = ("fp16", "int8", "int6", "int4", "int4-g32", "mxfp4", "nf4-dq", "int3", "int2")

# %% [markdown]
# ## 2. Medir
#
# A célula pode ser interrompida; as cópias provisórias são apagadas.

# %%
phases = {
    "quantizing": "quantizando",
    "loading": "carregando",
    "generating": "gerando",
    "scoring": "pontuando",
    "asking": "perguntando",
}
request = Request(model=MODEL, schemes=SCHEMES, data={"path": DATA}, adapter_path=ADAPTER, max_questions=0)
status = display("começando", display_id=True)

found = compare(
    request,
    on_phase=lambda scheme, phase: status.update(
        {"text/plain": f"{scheme}: {phases.get(phase, phase)}"}, raw=True
    ),
)
status.update({"text/plain": f"{len(found.rows)} formatos medidos"}, raw=True)

# %% [markdown]
# ## 3. Quanto custa cada formato
#
# **Pico**: a memória do processo inteiro ao carregar e gerar, com Python e bibliotecas (em um modelo tão
# pequeno, quase só isso). **MLX**: só os arrays.

# %%
MIB = 1024**2
rows = [row for row in found.rows if row.measured]

print(f"{'formato':10} {'no disco':>12} {'bits/peso':>10} {'pico':>10} {'MLX':>10} {'tokens/s':>9}")
for row in rows:
    got = row.measured
    print(
        f"{row.scheme:10} {row.bytes_on_disk / MIB:8.2f} MiB {row.bits_per_weight:10.2f} "
        f"{got.peak_footprint_bytes / MIB:6.0f} MiB {got.mlx_peak_bytes / MIB:6.2f} MiB "
        f"{got.tokens_per_second:9.0f}"
    )
for row in found.rows:
    if row.problem:
        print(f"{row.scheme}: não foi medido. {row.problem}")

# %% [markdown]
# ## 4. O que acontece com as respostas
#
# - **Perplexidade**: quantos tokens igualmente prováveis surpreenderiam tanto quanto o texto certo.
# - **KL**: a divergência média, em nats por token, entre o que o modelo original e o quantizado dizem.
# - **Mesmo token**: em que parte das posições os dois acham mais provável o mesmo token.

# %%
print(f"{'formato':10} {'perplexidade':>12} {'mudança':>9} {'KL, nats':>10} {'mesmo token':>12}")
for row in rows:
    change = "" if row.is_reference else f"{found.perplexity_change(row):+.1%}"
    divergence = "" if row.is_reference else f"{row.measured.divergence_nats:.5f}"
    same = "" if row.is_reference else f"{row.measured.agreement:.1%}"
    print(f"{row.scheme:10} {row.perplexity:12.4f} {change:>9} {divergence:>10} {same:>12}")
reference = found.reference.measured
print(f"\n{reference.num_rows} linhas ({reference.split}), {reference.target_tokens} tokens pontuados")

# %% [markdown]
# ## 5. Em uma figura
#
# Quanto mais à esquerda, menor; quanto mais abaixo, mais parecido com o original.

# %%
points = [row for row in rows if row.measured.divergence_nats > 0]
families = {
    "inteiros": ("int", "#0072B2", "o"),
    "floats pequenos": ("mx", "#D55E00", "s"),
    "NF4": ("nf", "#009E73", "^"),
}

figure = Figure(figsize=(8, 4.2), dpi=110, layout="constrained")
panel = figure.subplots()
for family, (start, colour, marker) in families.items():
    own = [row for row in points if row.scheme.startswith(start)]
    sizes, divergences = [r.bits_per_weight for r in own], [r.measured.divergence_nats for r in own]
    panel.plot(sizes, divergences, marker, color=colour, markersize=8, label=family)
for row in points:
    place = (row.bits_per_weight, row.measured.divergence_nats)
    offset, side = ((-8, -10), "right") if row.scheme.startswith("nf") else ((8, 3), "left")
    panel.annotate(row.scheme, place, xytext=offset, textcoords="offset points", ha=side, fontsize=9)
panel.set_yscale("log")
panel.margins(x=0.12, y=0.12)
panel.set_title("O que cada formato faz com as respostas", loc="left")
panel.set_xlabel("bits por peso, como fica no disco")
panel.set_ylabel("divergência KL do original, nats por token")
panel.spines[["top", "right"]].set_visible(False)
panel.grid(color="#E5E5E5", linewidth=0.8)
panel.set_axisbelow(True)
panel.legend(frameon=False)
picture = BytesIO()
figure.savefig(picture)
display(Image(picture.getvalue()))
