# Two commands on a fresh machine with Python 3.11 or newer: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test slow lint clean

demo: $(VENV)/.installed
	JAX_PLATFORMS=$${JAX_PLATFORMS-cpu} $(BIN)/clipa-fast demo

test: $(VENV)/.dev
	JAX_PLATFORMS=$${JAX_PLATFORMS-cpu} $(BIN)/pytest

slow: $(VENV)/.dev
	JAX_PLATFORMS=$${JAX_PLATFORMS-cpu} $(BIN)/pytest -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check clipa_fast kernels bench tools

clean:
	rm -rf $(VENV) build dist runs

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e .
	touch $@

$(VENV)/.dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@ $(VENV)/.installed
