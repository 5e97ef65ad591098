# `make run` sees HeteroFL train, `make test` runs the whole suite, `make quick` what one runs all day,
# `make docs` builds the site into site/ and runs its notebooks.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
DOCS_STAMP := .venv/installed-docs
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: run test quick docs lint format clean

run: $(STAMP)
	$(BIN)/hetfl train --config=heterofl_digits --overwrite

test: $(STAMP) lint
	$(PYTEST) --durations=20

quick: $(STAMP) lint
	$(PYTEST) --exitfirst -m "not slow and not vectors"

docs: $(DOCS_STAMP)
	$(BIN)/mkdocs build --strict

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

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $(DOCS_STAMP)

clean:
	rm -rf .venv
