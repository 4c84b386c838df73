# Every target makes its own environment in .venv; nothing else needs to be installed but Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO ?= demo

OLDEST ?= .venv-oldest

.PHONY: demo test test-slow check check-oldest lint fix docs schema bench bench-quality bench-speed clean

demo: $(STAMP)  ## compress the built-in model on the built-in images, offline, and print the report
	@mkdir -p $(DEMO)
	$(BIN)/vitcompress compress fashion_vit --share 12 --out $(DEMO)/mini.safetensors

test: $(STAMP)  ## the fast tests
	$(BIN)/python -m pytest -n auto --dist worksteal

test-slow: $(STAMP)  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

check: lint test  ## what CI runs

# Needs the lowest versions on the index that pip is set up for, and a Python that they have wheels for.
check-oldest:  ## the fast tests with the lowest torch and timm that pyproject.toml allows
	$(PYTHON) -m venv $(OLDEST)
	$(PYTHON) tests/oldest.py pyproject.toml > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --constraint $(OLDEST)/constraints.txt --editable '.[dev]'
	$(OLDEST)/bin/python -m pytest -n auto --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: $(STAMP)  ## format, and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)  ## the site, into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

schema: $(STAMP)  ## the report's JSON Schema, anew from the code
	$(BIN)/python -m vitcompress.report.schema

bench: $(STAMP)  ## what is measured rather than asserted
	$(BIN)/python -m tests.benchmarks

# The full form takes hours; started again it goes on where it stopped, and it writes its tables into docs/:
#   .venv/bin/python -m tests.benchmarks quality --full
bench-quality: $(STAMP)  ## every method at equal size, images and steps, on the built-in model; into build/
	$(BIN)/python -m tests.benchmarks quality

# Some minutes per model on an idle core; with options:
#   .venv/bin/python -m tests.benchmarks speed --models tiny small swin --parts step student inference memory compile --threads 2
bench-speed: $(STAMP)  ## times of a step and of inference as ratios to plain timm's, and peak memory
	$(BIN)/python -m tests.benchmarks speed

clean:
	rm -rf $(VENV) $(OLDEST) $(DEMO) .mypy_cache .pytest_cache .ruff_cache

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name it: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@
