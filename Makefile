# Everything runs in .venv, which these targets set up. README.md has the same commands for systems without make.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.PHONY: demo test test-slow torture lint format bench bench-gpu clean

demo: .venv/.ready  ## prepare a corpus, train for about three minutes, print samples
	$(BIN)/python train.py $(ARGS)

test: .venv/.ready-dev  ## all tests except those marked slow or gpu
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

test-slow: .venv/.ready-dev  ## tests that take minutes, or need a browser or a package index
	$(BIN)/python -m pytest -m slow $(ARGS)

torture: .venv/.ready-dev  ## Sprout under faults, as one table; ARGS="kill_worker --trials=5", --section=kills, or --list
	OMP_NUM_THREADS=1 $(BIN)/python tests/torture.py $(ARGS)

lint: .venv/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

BENCH_USAGE = usage: make bench PEER=path/to/nanoGPT TEXT=path/to/tinyshakespeare.txt
bench: .venv/.ready  ## compare with a checkout of nanoGPT
	@test -n "$(PEER)" -a -n "$(TEXT)" || { echo "$(BENCH_USAGE)"; exit 2; }
	$(BIN)/python bench/shakespeare_char_cpu.py --peer "$(PEER)" --text "$(TEXT)"
	$(BIN)/python bench/generate.py --peer "$(PEER)"
	$(BIN)/python bench/time_to_loss.py --peer "$(PEER)" --text "$(TEXT)"

MINUTES ?= 13
bench-gpu: .venv/.ready-dev  ## measure, tune and test on a GPU, within so many MINUTES; PEER and TEXT as above, optional
	$(BIN)/python bench/gpu_session.py --minutes=$(MINUTES) $(if $(PEER),--peer="$(PEER)") $(if $(TEXT),--text="$(TEXT)") $(ARGS)

.venv/.ready: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/.ready-dev: requirements.txt requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch .venv/.ready $@

clean:  ## remove the environment and caches; data/ and runs/ are kept
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
