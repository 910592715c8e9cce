# Each target sets up .venv by itself. PYTHON names the interpreter that it is made with.
PYTHON ?= python3
# What pip may install: a CPU build of torch where one is offered. `make CONSTRAINTS=/dev/null` leaves the choice to pip.
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin

.PHONY: setup demo test lint bench docs clean

setup: .venv/.done

.venv/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e ".[all]" --group dev
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
