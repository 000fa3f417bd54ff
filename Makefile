# make demo and make test are all that a newcomer needs. TORCH_INDEX: index of another torch build, e.g.
# https://download.pytorch.org/whl/cpu
PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow check proto bench help

help:
	@echo "make demo       read a long text into a memory service, kill it, recall"
	@echo "make test       all quick tests"
	@echo "make test-slow  the tests that take minutes"
	@echo "make check      ruff, mypy, buf lint"
	@echo "make proto      regenerate the stubs"
	@echo "make bench      measure against floors"

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kvbank needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/kvbank demo $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -m 'not slow' $(ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	@if command -v npx >/dev/null; then npx --yes @bufbuild/buf@1.75.0 lint; \
	else echo 'buf lint SKIPPED: npx is not installed'; fi

proto: $(STAMP)
	$(BIN)/python proto/generate.py

bench: $(STAMP)
	$(BIN)/python -m benchmarks $(ARGS)
