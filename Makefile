# Each target does its own set-up in .venv, and does not install again while
# pyproject.toml and constraints.txt stay as they are.
PYTHON ?= python3
BIN := .venv/bin
# One process a core, one thread each: more threads than cores slow each other down.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

.PHONY: demo test test-slow lint docs bench bench-gpu clean

demo: .venv/.lab-installed
	$(BIN)/neuralcollapse compare --out runs/demo --overwrite

test: .venv/.dev-installed
	$(PYTEST)

test-slow: .venv/.dev-installed
	$(PYTEST) -m slow

lint: .venv/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/.dev-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "wrote site/index.html"

bench: .venv/.dev-installed
	for script in $(filter-out benchmarks/gpu.py,$(wildcard benchmarks/[a-z]*.py)); do $(BIN)/python $$script || exit 1; done

# Everything that an accelerator is to show, in less than 25 minutes: benchmarks/results/gpu-DEVICE.json.
bench-gpu: .venv/.dev-installed
	$(BIN)/python benchmarks/gpu.py

clean:
	rm -rf .venv runs site

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed; name one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.%-installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$*]'
	@touch $@
