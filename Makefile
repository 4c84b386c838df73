# Every target makes its environment in .venv; only Python 3.11 or newer must be installed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEV := $(VENV)/.dev
DEMO ?= demo

OLDEST ?= .venv-oldest

.PHONY: demo test test-slow check check-oldest lint fix docs schema bench bench-quality bench-speed clean

demo: $(INSTALLED)  ## compress the built-in model on the built-in images, offline, and print the report
	@mkdir -p $(DEMO)
	$(BIN)/vitcompress compress fashion_vit --share 12 --out $(DEMO)/mini.safetensors

test: $(DEV)  ## the tests for while you work: at most five minutes on two cores
	$(BIN)/python -m pytest -n auto --dist worksteal

test-slow: $(DEV)  ## the tests that run only on request
	$(BIN)/python -m pytest -m slow

check: lint  ## what CI runs: lint, types, and the tests of `make test` together with the thorough ones
	$(BIN)/python -m pytest -n auto --dist worksteal -m 'not slow'

# Needs the lowest versions on the index that pip is set up for, and a Python that they have wheels for.
check-oldest:  ## the tests of `make check` with the lowest torch and timm that pyproject.toml allows
	$(PYTHON) -m venv $(OLDEST)
	$(PYTHON) tests/oldest.py pyproject.toml > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --constraint $(OLDEST)/constraints.txt --editable '.[dev]'
	$(OLDEST)/bin/python -m pytest -n auto --dist worksteal -m 'not slow'

lint: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: $(DEV)  ## format, and fix what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(DEV)  ## build the site into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

schema: $(DEV)  ## write the report's JSON Schema from the code
	$(BIN)/python -m vitcompress.report.schema

bench: $(DEV)  ## every measurement of tests/benchmarks
	$(BIN)/python -m tests.benchmarks

# The full form takes hours, continues where it stopped, and writes its tables into docs/:
#   .venv/bin/python -m tests.benchmarks quality --full
bench-quality: $(DEV)  ## compare every method at equal size, images and steps on the built-in model; into build/
	$(BIN)/python -m tests.benchmarks quality

# Takes minutes per model on an idle core; with options:
#   .venv/bin/python -m tests.benchmarks speed --models tiny small swin --parts step student inference memory compile --threads 2
bench-speed: $(DEV)  ## measure training against a bare loop, steps and inference against timm's, and peak memory
	$(BIN)/python -m tests.benchmarks throughput
	$(BIN)/python -m tests.benchmarks speed

clean:
	rm -rf $(VENV) $(OLDEST) $(DEMO) .mypy_cache .pytest_cache .ruff_cache

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name it: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(DEV): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@
