# make demo    environment, installation, and the whole way on mini: five pictures of a dog, before and after
# make test    the same environment, all tests
# make docs    the documentation site, in site/
# make notebook    the guide run anew, with its pictures
# TORCH=cuda   torch's CUDA build instead of the CPU one; what comes later keeps the build that is there

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
THERE := $(patsubst $(VENV)/.installed-%,%,$(firstword $(wildcard $(VENV)/.installed-*)))
TORCH ?= $(or $(THERE),cpu)
INSTALLED := $(VENV)/.installed-$(TORCH)
TORCH_VERSION := $(shell grep '^torch==' requirements.lock)
# On Linux PyPI's own torch is the CUDA build. To pip 2.13.0+cpu is a 2.13.0: it replaces one build by the other only where the first is gone.
TORCH_INDEX_cpu := --extra-index-url https://download.pytorch.org/whl/cpu
TORCH_INDEX_cuda :=

.PHONY: demo test check bench docs notebook clean

demo: $(INSTALLED)
	$(BIN)/raybooth demo

test: $(INSTALLED)
	$(BIN)/python -m pytest --durations=15 --numprocesses=2 --dist=loadfile --no-loadscope-reorder

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

notebook: $(INSTALLED)
	$(BIN)/python -m notebooks.execute

$(INSTALLED): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(filter-out $(TORCH),$(THERE)),$(BIN)/pip uninstall --quiet --yes torch)
	rm -f $(VENV)/.installed-*
	$(BIN)/pip install --quiet --retries 1 $(TORCH_INDEX_$(TORCH)) '$(TORCH_VERSION)'
	$(BIN)/pip install --quiet -r requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV)
