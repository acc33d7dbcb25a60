# `make demo` and `make test` are all the set-up there is: each creates .venv, installs what it needs and runs.
# A CPU-only torch on other machines: make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
PIP_FLAGS ?=
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_FLAGS)

.PHONY: demo test test-slow lint clean
.DELETE_ON_ERROR:

demo: .venv/installed
	$(BIN)/python -m jobs.prune jobs/configs/demo.toml

test: .venv/installed
	$(BIN)/python -m pytest

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright

# torch first and pinned: left to itself pip may replace it while it resolves the rest
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) --upgrade pip
	$(INSTALL) torch
	$(INSTALL) --editable '.[demo]' --group dev
	touch $@

clean:
	rm -rf .venv runs
