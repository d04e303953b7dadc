# `make help` lists the targets. Each one sets up .venv first, if that has not been done.
PYTHON ?= python3
BIN := .venv/bin
DEMO_OUTPUT ?= demo-output
BENCH_OUTPUT ?= bench-output

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench docs clean

help:  ## List the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

setup: .venv/installed  ## Make .venv and install the package with all that demo, tests and checks need

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,dev]"
	touch $@

demo: setup  ## Run the main job on a real encoder and real reviews (DEMO_OUTPUT=dir, DEMO_ARGS=--full)
	$(BIN)/transformers-badge demo --output-dir $(DEMO_OUTPUT) $(DEMO_ARGS)

test: setup  ## Run the linters, the type checker and the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: setup  ## Mend what the linters can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup  ## Run the timed comparisons (BENCH_OUTPUT=dir)
	$(BIN)/python benchmarks/run.py --output-dir $(BENCH_OUTPUT)
	test -d $(DEMO_OUTPUT)/checkpoint || $(BIN)/transformers-badge demo --output-dir $(DEMO_OUTPUT)
	$(BIN)/python benchmarks/engines.py $(DEMO_OUTPUT)/checkpoint --output-dir $(BENCH_OUTPUT)

docs: setup  ## Make the tables, the README's figures and the picture from the records in docs/records
	$(BIN)/python benchmarks/write_docs.py

clean:  ## Remove what the other targets made
	rm -rf .venv $(DEMO_OUTPUT) $(BENCH_OUTPUT)
