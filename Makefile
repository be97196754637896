# One word per job. `make help` lists them.
#
# PYTHON       the interpreter the environment is made from (3.11 or later)
# TORCH_FLAGS  extra pip flags for the torch install alone, e.g. another wheel index
# LAB_FLAGS    passed to `jupyter lab`, e.g. LAB_FLAGS="--no-browser --port 8890"
# BENCH_FLAGS  passed to the benchmarks: --write keeps the record, --only NAME runs one of them
# PYTEST_FLAGS passed to pytest, e.g. PYTEST_FLAGS="-x -k fork"

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.djinn-setup

# What is measured or compared bit for bit runs on one thread, and loads nothing from a hub.
test test-all bench evaluate: export OMP_NUM_THREADS = 1
test test-all bench evaluate demo: export HF_HUB_OFFLINE = 1

.DEFAULT_GOAL := help
.PHONY: help setup lab extension demo test test-all bench evaluate evaluate-gpu lint clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 16

setup: $(STAMP)  ## .venv with every dependency at its pinned version, and the package

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Djinn needs Python 3.11 or later, $(PYTHON) is " + sys.version.split()[0] + "; set PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt $(TORCH_FLAGS) torch
	$(BIN)/python -m pip install --quiet -c constraints.txt hatchling
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[server,lab,test,dev]'
	@touch $@

lab: setup  ## kernel server with the bundled model, and JupyterLab on the tour
	$(BIN)/python -m scripts.lab $(LAB_FLAGS)

extension: setup  ## builds the JupyterLab extension; needs node. What is built is committed
	$(BIN)/python -m scripts.extension build

demo: setup  ## the tour without a browser: runs it and prints the transcript
	@$(BIN)/python -m scripts.demo

lint: setup  ## ruff check, ruff format --check, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## lint, and every test that needs no GPU, no browser and no patience
	$(BIN)/python -m pytest -m "not gpu and not slow and not browser" $(PYTEST_FLAGS)

test-all: setup  ## all of it but the GPU tests where there is no GPU, with the time of each part
	$(BIN)/python -m scripts.test_all

bench: setup  ## the benchmarks, interleaved with their baselines
	$(BIN)/python -m tests.benchmarks $(BENCH_FLAGS)

evaluate: setup  ## every evaluation notebook at smoke size, on the CPU
	$(BIN)/python -m notebooks.evaluate --size smoke

evaluate-gpu: setup  ## every evaluation notebook at full size, on one GPU
	$(BIN)/python -m notebooks.evaluate --size full

clean:  ## the environment, caches and build results; never a session or a record
	rm -rf $(VENV) build dist extension/build extension/lib extension/node_modules .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
