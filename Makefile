# Two commands: `make run` sees HeteroFL train, `make test` runs everything that CI runs.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: run test lint format clean

run: $(STAMP)
	$(BIN)/hetfl train --config=configs/heterofl_digits.py --overwrite

test: $(STAMP) lint
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=20

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
