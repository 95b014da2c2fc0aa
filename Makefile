# Everything runs in .venv, which `make` sets up on the way. Systems without make: the same commands are in README.md.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.PHONY: demo test test-slow lint format bench clean

demo: .venv/.ready  ## prepare a corpus, train about three minutes, print samples
	$(BIN)/python train.py $(ARGS)

test: .venv/.ready-dev  ## all tests that need neither a GPU nor minutes of their own
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

test-slow: .venv/.ready-dev  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: .venv/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.ready  ## side by side with nanoGPT: make bench PEER=path/to/nanoGPT TEXT=path/to/tinyshakespeare.txt
	@test -n "$(PEER)" -a -n "$(TEXT)" || { echo "usage: make bench PEER=path/to/nanoGPT TEXT=path/to/tinyshakespeare.txt"; exit 2; }
	$(BIN)/python bench/shakespeare_char_cpu.py --peer "$(PEER)" --text "$(TEXT)"
	$(BIN)/python bench/generate.py --peer "$(PEER)"
	$(BIN)/python bench/time_to_loss.py --peer "$(PEER)" --text "$(TEXT)"

.venv/.ready: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/.ready-dev: requirements.txt requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch .venv/.ready $@

clean:  ## the environment and caches; data/ and runs/ stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
