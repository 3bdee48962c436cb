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
# # Teoria da quantização, medida
#
# Cada número e cada figura desta página são calculados quando a célula roda; nada está escrito à mão.
# O código vive em `mlx_qlora.lab`; na linha de comando é `mlx-qlora lab`. Instale antes:
# `pip install 'mlx-qlora[lab]'`.

# %%
from io import BytesIO

import numpy as np
from IPython.display import Image, Markdown, display

from mlx_qlora.lab.bitpack import pack, unpack
from mlx_qlora.lab.figures import figure_of
from mlx_qlora.lab.linear import LinearScheme, quantize
from mlx_qlora.lab.nonlinear import normal_float_levels
from mlx_qlora.lab.topics import TOPICS, find

SEMENTE = 0
achados = {}


def mostrar(tema, tabelas=True):
    """Roda um tema: figura, tabelas e o que elas dizem (em inglês, como no resto do código)."""
    achado = achados[tema] = find(tema, SEMENTE)
    figura = figure_of(achado)
    if figura is not None:
        arquivo = BytesIO()
        figura.savefig(arquivo, format="png")
        display(Image(arquivo.getvalue()))
    for tabela in achado.tables if tabelas else ():
        linhas = [tabela.columns, ["---"] * len(tabela.columns), *tabela.cells()]
        texto = "\n".join("| " + " | ".join(linha) + " |" for linha in linhas)
        display(Markdown(f"**{tabela.title}**\n\n{texto}"))
    display(Markdown("\n".join(f"- {nota}" for nota in achado.notes)))


list(TOPICS)

# %% [markdown]
# ## 1. Quantização linear
#
# Um número real $r$ torna-se um inteiro $Q$ de $b$ bits:
#
# $$ r = S\,(Q - Z), \qquad
# Q = \mathrm{clip}\!\left(\mathrm{round}\!\left(\frac{r}{S}\right) + Z,\; q_{\min},\; q_{\max}\right) $$
#
# $S$ é a **escala** (o passo da grade) e $Z$ o **ponto zero** (o código de $r = 0$).
#
# - Assimétrica: $S = \dfrac{r_{\max} - r_{\min}}{q_{\max} - q_{\min}}$ e
#   $Z = \mathrm{round}\!\left(q_{\min} - \dfrac{r_{\min}}{S}\right)$.
# - Simétrica: $S = \dfrac{\max |r|}{q_{\max}}$ e $Z = 0$.
#
# O erro nunca passa de meio passo: $|r - \hat r| \le S/2$. A escala pode ser de toda a matriz (*tensor*),
# de cada linha (*channel*) ou de cada grupo de colunas (*group*).

# %%
r = np.array([-0.5, 0.0, 0.3, 1.1, 2.0])
for simetrica in (True, False):
    codigos = quantize(r, LinearScheme(bits=8, is_symmetric=simetrica, per="tensor"))
    escala, ponto_zero = codigos.scale[0, 0], codigos.zero_point[0, 0]
    erro = np.abs(codigos.dequantized() - r).max()
    print(f"{'simétrica' if simetrica else 'assimétrica'}: S = {escala:.6f}, Z = {ponto_zero}")
    print(f"  Q = {codigos.codes}, maior erro = {erro / escala:.2f} S")

# %%
mostrar("linear")

# %% [markdown]
# ## 2. O quantizador de 8 bits para qualquer modelo
#
# W8A16: os pesos ficam em `int8` com uma escala por canal de saída; as ativações ficam como estão.
# Como a escala é por linha de $W$, pode sair da soma: $x W^\top \approx (x\,Q^\top) \odot s$.

# %%
mostrar("eight-bit")

# %% [markdown]
# ## 3. Quantização não linear: lei μ e lei A
#
# $$ F_\mu(x) = \mathrm{sgn}(x)\,\frac{\ln(1 + \mu |x|)}{\ln(1 + \mu)}, \qquad
# F_A(x) = \mathrm{sgn}(x)\begin{cases}\dfrac{A|x|}{1 + \ln A} & |x| < 1/A\\[2ex]
# \dfrac{1 + \ln(A|x|)}{1 + \ln A} & |x| \ge 1/A\end{cases} $$
#
# Os passos são pequenos onde o sinal é pequeno, e a relação sinal-ruído quase deixa de depender do nível.

# %%
mostrar("companding", tabelas=False)

# %% [markdown]
# ## 4. Livros de códigos: k-means e NF4
#
# O k-means escolhe os $2^b$ níveis que minimizam $\sum_i (w_i - c_{k(i)})^2$. O NF4 toma os níveis da
# distribuição normal: quantis $\Phi^{-1}(p)$ com um zero exato, divididos pelo maior (Dettmers et al. 2023,
# arXiv:2305.14314).

# %%
print(normal_float_levels())
mostrar("codebooks", tabelas=False)

# %% [markdown]
# ## 5. Empacotar 2 e 4 bits
#
# Uma palavra de $p$ bits guarda $\lfloor p / b \rfloor$ códigos inteiros de $b$ bits.

# %%
pesos = np.array([1, 0, 3, 2])
byte = pack(pesos, bits=2, word_bits=8)
print("empacotado:", f"{byte[0]:08b}", " desempacotado:", unpack(byte, 2, 4))
mostrar("packing")

# %% [markdown]
# ## 6. Acumuladores de 32 bits
#
# Uma soma de $K$ produtos de códigos de 8 bits cabe em `int32` se $K \cdot 2^{7} \cdot 2^{7} \le 2^{31} - 1$,
# isto é, $K \le 131\,071$. Com mais um produto, transborda de verdade:

# %%
mostrar("accumulators")

# %% [markdown]
# ## 7. Sinal e ruído: a regra dos 6 dB
#
# Com ruído uniforme em $\pm\Delta/2$ a potência é $\Delta^2/12$ e
#
# $$ \mathrm{SNR} = 6{,}02\,b + 1{,}76\ \mathrm{dB} \quad \text{(seno de escala completa)}. $$

# %%
mostrar("snr")

# %% [markdown]
# ### O ruído $e(n) = \hat x(n) - x(n)$ é mesmo uniforme?
#
# Dois testes (Kolmogorov–Smirnov e $\chi^2$) respondem. O modelo falha com poucos bits e com tons puros; o
# *dither* o restaura.

# %%
mostrar("noise")

# %% [markdown]
# ## 8. Redes pequenas, antes e depois
#
# Treinadas em Iris, Wine, Breast Cancer e dígitos. O erro de calibração é
# $\mathrm{ECE} = \sum_m \frac{|B_m|}{n}\,|\mathrm{conf}(B_m) - \mathrm{acc}(B_m)|$.

# %%
mostrar("networks")
redes = achados["networks"].tables[0].records()
digitos = {linha["weights"]: linha for linha in redes if linha["data"] == "digits"}
for rotulo, nome in (("Antes", "float32"), ("Depois", "int4 sym, group 32")):
    linha = digitos[nome]
    print(f"{rotulo}: {nome}, {linha['bits per weight']:.2f} bits por peso, acurácia {linha['accuracy']:.2%}")

# %% [markdown]
# ### Calibrar as ativações
#
# Com ativações inteiras é preciso saber de antemão o intervalo de cada camada.

# %%
mostrar("activations")

# %% [markdown]
# ## 9. Os outros dois pilares: poda e destilação
#
# A perda da destilação é
#
# $$ \lambda\,\tau^2\,\mathrm{KL}(p_\tau^{\text{professor}} \,\|\, p_\tau^{\text{aluno}})
# + (1 - \lambda)\,H(y, p^{\text{aluno}}) $$

# %%
mostrar("pruning")

# %%
mostrar("distillation")

# %%
mostrar("pillars")

# %% [markdown]
# ## 10. A calculadora de memória
#
# $$ \text{pesos} = N \cdot \frac{b}{8}, \quad
# \text{cache KV} = 2\,L\,d_{kv}\,T\,B \cdot \frac{b}{8}, \quad
# \text{Adam} = 16\,N, \quad
# \text{QLoRA} \approx \text{pesos}_{4} + \text{adaptador, gradiente, otimizador} + \text{ativações} $$

# %%
mostrar("memory")
