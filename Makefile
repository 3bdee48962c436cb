# make demo and make test need nothing installed but Python 3.11–3.13, git and make.

VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test check docs bench setup clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    set up, then quantize, train and ask the embedded model"
	@echo "make test    set up, then run the tests"
	@echo "make check   lint, types, import layers"
	@echo "make docs    the documentation's site, in build/site"
	@echo "make bench   list the benchmarks' commands"
	@echo "make setup   only set up, with everything that a contributor needs"
	@echo "make clean   remove the environment and the demo's adapter"

demo: $(VENV)/.demo
	@$(BIN)/mlx-qlora demo

test: $(VENV)/.dev
	@$(BIN)/pytest -n 2 -m "not slow"

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/bandit -q -c pyproject.toml -r mlx_qlora

# Warnings are errors: a dead link or a page outside the navigation is one. Nothing is fetched.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

# A benchmark's command is the first indented line of its own docstring.
bench:
	@sed -n 's|^ *python \(benchmarks/.*\)|$(BIN)/python \1|p' benchmarks/*.py

setup: $(VENV)/.dev

# Two stamps: the demo needs less than the tests, and a newcomer waits for it.
$(VENV)/.demo: pyproject.toml constraints.txt scripts/setup.sh
	@sh scripts/setup.sh "$(VENV)" ".[plots]"
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt scripts/setup.sh
	@sh scripts/setup.sh "$(VENV)" ".[dev]"
	@touch $(VENV)/.demo $@

clean:
	rm -rf $(VENV) adapters/demo
