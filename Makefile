# `make run` sees HeteroFL train, `make test` runs everything that CI runs, `make quick` what one runs all day.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: run test quick lint format clean

run: $(STAMP)
	$(BIN)/hetfl train --config=heterofl_digits --overwrite

test: $(STAMP) lint
	$(PYTEST) --durations=20

quick: $(STAMP) lint
	$(PYTEST) --exitfirst -m "not slow and not vectors"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $(STAMP)

clean:
	rm -rf .venv
