# make demo: set up in .venv and run the whole loop.   make test: set up in .venv and run the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test setup check board clean
.DEFAULT_GOAL := demo

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@bash examples/../.ci/setup $(PYTHON) $(VENV)
	@touch $@
