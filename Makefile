PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench clean

# Characterize four networks and write normfree-report/.
demo: .venv/installed
	$(BIN)/normfree demo

# Run every test, in two processes of one thread each: more would be in each other's way.
test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What a measurement costs, in time and memory.
bench: .venv/installed
	$(BIN)/python -m normfree.benchmarks.measurement_cost

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("normfree needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv normfree-report
