# Two commands on a fresh machine with Python 3.11 or newer: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Where test-interop looks for torch first: builds without CUDA's libraries, a tenth of the size. Else the usual index.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Most tests keep one core busy.
PARALLEL ?= --numprocesses auto --maxprocesses 4

.PHONY: demo test slow test-interop lint docs clean

demo: $(VENV)/.installed
	JAX_PLATFORMS=$${JAX_PLATFORMS-cpu} $(BIN)/clipa-fast demo

test: $(VENV)/.dev
	JAX_PLATFORMS=$${JAX_PLATFORMS-cpu} $(BIN)/pytest $(PARALLEL)

slow: $(VENV)/.dev
	JAX_PLATFORMS=$${JAX_PLATFORMS-cpu} $(BIN)/pytest -m slow

# Beside open_clip, transformers, scikit-learn and clip_benchmark, in an environment of its own; a random H/14 too.
test-interop: $(VENV)-interop/.installed
	JAX_PLATFORMS=$${JAX_PLATFORMS-cpu} $(VENV)-interop/bin/pytest tests/interop -m "slow or not slow"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check clipa_fast kernels bench tools

# The site, in build/site. Reads the packages' text without importing them.
docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(VENV)-interop build dist runs

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

$(VENV)/.docs: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e '.[docs]'
	touch $@ $(VENV)/.installed

$(VENV)-interop/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-interop
	$(VENV)-interop/bin/pip install --quiet --upgrade pip
	$(VENV)-interop/bin/pip install -qq --retries 1 --index-url $(TORCH_INDEX) torch torchvision \
	  || $(VENV)-interop/bin/pip install --quiet torch torchvision
	$(VENV)-interop/bin/pip install --quiet -e '.[dev,interop]' open_clip_torch transformers scikit-learn datasets
	$(VENV)-interop/bin/pip install --quiet --no-deps clip_benchmark
	touch $@
