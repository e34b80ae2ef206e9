# make demo: set up in .venv, then run the whole loop on this machine.     make test: set up in .venv, then run the tests.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
SHELL := /bin/bash

.PHONY: demo test setup check board bench docs clean
.DEFAULT_GOAL := demo

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt .ci/setup
	@.ci/setup "$(PYTHON)" "$(VENV)"
	@touch $@

demo: setup
	@PATH="$(abspath $(BIN)):$$PATH" bash examples/demo.sh

test: setup
	@start=$$SECONDS; $(BIN)/python -m pytest && echo "tests took $$((SECONDS - start)) s"

check: setup  ## ruff, and strict mypy over the very files that the wheel installs
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@.ci/typecheck "$(BIN)"

board: setup  ## the tests on an emulated arm64 board (first: .ci/board-packages, as root)
	@start=$$SECONDS; $(BIN)/python -m pytest -m board && echo "board tests took $$((SECONDS - start)) s"

bench: setup
	@$(BIN)/python tests/bench/host_prediction.py

docs: setup  ## write docs/cli.md from --help
	@$(BIN)/python docs/make_cli.py

clean:
	rm -rf $(VENV) build dist *.egg-info
