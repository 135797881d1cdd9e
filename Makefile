# A fresh clone needs Python 3.11+, pip and make. Everything is installed into .venv.
#   make demo         merge small real models and look at the result
#   make test         what CI runs: make check, then the tests
#   make check        format, lint, types, import contracts
#   make check-long   every test, the slow ones and the comparison with mergekit too
#   make experiment   train, merge and score: the tables of merger/methods/README.md (most of an hour)
#   make clean        remove what make made
# Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check
MERGEKIT := .venv-mergekit

.DEFAULT_GOAL := test
.PHONY: demo test check check-long experiment clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/python -m jobs.demo

# Two to four processes; tests of one file share one, and with it their servers.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile
# What measures, or starts clusters and kills parts of them, has the machine to itself.
ALONE := tests/benchmarks tests/cluster tests/remote/test_ray.py

test: check
	$(BIN)/python -m pytest $(PARALLEL)

check: $(VENV)/.test
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

check-long: check $(VENV)/.demo $(MERGEKIT)/.done
	HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest -m "slow or not slow" $(PARALLEL) $(ALONE:%=--ignore=%)
	$(BIN)/python -m pytest -m "slow or not slow" $(ALONE)

experiment: $(VENV)/.demo
	$(BIN)/python -m tests.experiment

clean:
	rm -rf $(VENV) $(MERGEKIT) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find jobs cluster merger tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "raymerge needs Python 3.11 or newer; name one: make PYTHON=python3.12 …" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamps are touched last, so that an install that stopped midway is done again.
$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV): minutes, the first time."
	$(PIP) install --quiet -c constraints.txt -e '.[test]'
	touch $@

$(VENV)/.demo: pyproject.toml constraints.txt manifests/demo/requirements.txt | $(BIN)/python
	@echo "Installing into $(VENV): minutes, the first time."
	$(PIP) install --quiet -c constraints.txt -e '.[demo]'
	$(PIP) install --quiet --no-deps --require-hashes -r manifests/demo/requirements.txt
	touch $@

# mergekit pins what raymerge does not want, and is compared with, never imported.
$(MERGEKIT): $(MERGEKIT)/.done
$(MERGEKIT)/.done: tests/mergekit-constraints.txt
	$(PYTHON) -m venv $(MERGEKIT)
	$(MERGEKIT)/bin/python -m pip --disable-pip-version-check install --quiet -c $< mergekit torch
	touch $@
