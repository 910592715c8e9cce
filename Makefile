# Each target sets up .venv by itself. PYTHON names the interpreter that it is made with.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test lint bench docs clean

setup: .venv/.done

.venv/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[all]" --group dev
	touch $@

demo: setup
	$(BIN)/mlopt tapweight demo --output runs/demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python -m benchmarks.hypergrad --quick
	$(BIN)/python -m benchmarks.tapweight --quick

docs: setup
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv runs dist site
