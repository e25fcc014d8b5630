PYTHON ?= python3
BIN := .venv/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
OLDEST_TORCH := $(shell sed -n 's/^dependencies = \["torch>=\([0-9.]*\)".*/\1/p' pyproject.toml)

.PHONY: demo test slow lint docs dist oldest bench clean

# Characterize four networks, train three, and write normfree-report/.
demo: .venv/installed
	$(BIN)/normfree demo

# Run the tests but for the slow ones, in two processes of one thread each: more would be in each other's way.
test: .venv/installed
	$(PYTEST) -m "not slow"

# Run the slow tests: 600 layers, studies end to end, processes that are killed, other runtimes.
slow: .venv/installed
	$(PYTEST) -m slow

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Build the site, docs/_build/html/index.html; notebooks are run.
docs: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs docs/_build/html

# Build sdist and wheel, and try the wheel in an environment that has nothing else.
dist: .venv/installed
	rm -rf dist build/dist && mkdir -p build/dist
	$(BIN)/python -m build --no-isolation
	$(PYTHON) -m venv build/dist/env
	build/dist/env/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt \
		"$$(ls $(CURDIR)/dist/*.whl)[demo,export]"
	cd build/dist && env/bin/normfree demo --seeds 1 --depth 26 --epochs 1 && env/bin/normfree spp nf_resnet26 timm:resnet18 --size 64 --out spp.html
	cd build/dist && env/bin/normfree train digits --epochs 1 --out run && env/bin/normfree export run --to onnx --size 64
	rm -rf build/dist

# Try the core install on the oldest torch that pyproject.toml allows.
oldest: .venv/installed
	rm -rf build/oldest
	$(PYTHON) -m venv build/oldest
	build/oldest/bin/python -m pip install --disable-pip-version-check --quiet "torch==$(OLDEST_TORCH).*" pytest .
	OMP_NUM_THREADS=2 build/oldest/bin/python -m pytest -o addopts= -o filterwarnings=default --import-mode=importlib \
		tests/test_core.py
	rm -rf build/oldest

# Print what a measurement costs, in time and memory.
bench: .venv/installed
	$(BIN)/python -m normfree.benchmarks.measurement_cost
	$(BIN)/python -m normfree.benchmarks.page_time

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("normfree needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist docs/_build normfree-report
