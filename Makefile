# The front door. `make test` and `make demo` create .venv on first use and do the whole job;
# pip's own environment variables and configuration decide where packages come from.
SHELL := bash
.DEFAULT_GOAL := help
VENV := .venv
BIN := $(VENV)/bin
# Files that say what belongs into the environment; a change in one of them refreshes it.
READY := $(VENV)/.quernel-ready
PYTEST_WORKERS ?= auto
# The oldest transformers that is allowed, laid over the environment.
OLDEST := $(CURDIR)/build/oldest
OLDEST_VERSION := $(shell sed -n 's/^transformers==//p' constraints-oldest.txt)

.PHONY: help env demo test slow portable oldest lint format docs generate bench reproduce check clean

help:
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

env: $(READY) ## create or refresh .venv

$(READY): pyproject.toml constraints.txt
	@if [ ! -x $(BIN)/python ]; then \
	  for candidate in $(PYTHON) python3.11 python3.12 python3.13 python3 python; do \
	    if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	      echo "creating $(VENV) with $$($$candidate --version)"; exec $$candidate -m venv $(VENV); \
	    fi; \
	  done; \
	  echo "error: Python 3.11 or newer is needed; install it, or name it: make PYTHON=/path/to/python3.11" >&2; exit 2; \
	fi
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(READY) ## train a small CNN, search for a smaller one, write report.html and report.json
	$(BIN)/quernel demo

test: $(READY) ## the quick suite
	$(BIN)/python -m pytest -q -n $(PYTEST_WORKERS)

slow: $(READY) ## the tests that take more than a second each
	$(BIN)/python -m pytest -q -m slow -n $(PYTEST_WORKERS)

portable: $(READY) ## the native kernels' tests again, on the path of machines without VNNI
	QUERNEL_PORTABLE=1 $(BIN)/python -m pytest -q -n $(PYTEST_WORKERS) tests/test_intrinsics.py tests/hashing tests/nn tests/search tests/sketch tests/cache tests/compress

oldest: $(OLDEST)/.ready ## the caches' tests again, with the oldest transformers that is allowed
	@PYTHONPATH="$(OLDEST)" $(BIN)/python -c 'import sys, transformers as t; print("transformers", t.__version__, "from", t.__file__); \
	  sys.exit(None if t.__version__ == "$(OLDEST_VERSION)" else "error: transformers $(OLDEST_VERSION) was to be tested")'
	PYTHONPATH="$(OLDEST)" $(BIN)/python -m pytest -q -n $(PYTEST_WORKERS) -k cache tests/cache tests/test_conformance.py

$(OLDEST)/.ready: constraints-oldest.txt $(READY)
	rm -rf "$(OLDEST)"
	$(BIN)/python -m pip install --quiet --no-deps --no-compile --target "$(OLDEST)" -r constraints-oldest.txt
	@touch "$@"

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

generate: $(READY) ## rewrite the README table and the generated parts of docs/
	$(BIN)/python docs/generate.py

docs: $(READY) ## build the site into site/, strictly
	$(BIN)/python docs/generate.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(READY) ## every benchmark, on a quiet machine
	$(BIN)/quernel bench --write
	$(BIN)/python docs/generate.py

reproduce: $(READY) ## every reproduction; updates claims.toml
	$(BIN)/quernel reproduce --write
	$(BIN)/python docs/generate.py

check: lint docs test portable oldest ## all that CI asks for

clean: ## remove what can be made again
	rm -rf $(VENV) build dist site report.html report.json .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests docs benchmarks reproductions -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
