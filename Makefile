# Each target sets up .venv by itself (tools/setup_venv.sh); nothing else need be installed but Python 3.11 and its venv.

export OMP_NUM_THREADS ?= 1
export ORT_DISABLE_TELEMETRY = 1
python = .venv/bin/python

.PHONY: help setup demo test test-slow check

help:  ## print this
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

setup:  ## make .venv, or bring it up to date
	@bash tools/setup_venv.sh

demo: setup  ## train, decode, export and stream a small model on made speech; goes on where it stopped
	@PATH="$(CURDIR)/.venv/bin:$$PATH" bash egs/made/run.sh

test: setup  ## the tests of every day, minutes
	$(python) -m pytest -n 2

test-slow: setup  ## the long ones: training until it converges, full sizes, a GPU where there is one
	$(python) -m pytest -m "slow or gpu"

check: setup  ## linter, formatter, types
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy
