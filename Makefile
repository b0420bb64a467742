PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install dev test test-fast slow style quickstart site accept clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --progress-bar on -e .
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

install: $(VENV)/.installed
dev: $(VENV)/.dev

# The tests a change must pass: everything but the longer training runs.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu and not hub"

# One training run for each kind of signal, the longer oracles, and the fuzz tests.
slow: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist load -m slow

style: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Distils the embedded digits teacher to four steps; one table, one picture.
quickstart: $(VENV)/.installed
	$(BIN)/python tools/quickstart.py

# The documentation as a website, in build/site. A link that leads nowhere ends it.
site: $(VENV)/.dev
	$(BIN)/python tools/make_site.py

# The full acceptance, all seeds and rows; resumable. Then runs that are killed again and again, and other faults.
accept: $(VENV)/.dev
	$(BIN)/python benchmarks/acceptance/accept.py
	$(BIN)/python benchmarks/acceptance/kill_runs.py
	$(BIN)/python benchmarks/acceptance/fault_runs.py

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache
