# Every target makes .venv when it is missing, and makes it anew in place when the pins change.
# Elsewhere than on a CPU: see README, "Install".

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(BIN)/sashiko

.DELETE_ON_ERROR:
.PHONY: help install demo test test-all check bench

help:
	@echo "make demo      real CT, MRI and city images, damaged, restored, measured: demo/report/index.html"
	@echo "make test      style, types, import directions, and the tests that are not slow"
	@echo "make test-all  the slow tests too"
	@echo "make check     style, types and import directions alone"
	@echo "make bench     times on this machine; our solvers beside deepinv's (hours when new)"

install: $(STAMP)

# The constraints pin torch's version; which build of it pip takes is the index's: see README.
# The command itself tells when it was installed, be it by hand.
$(STAMP): pyproject.toml infra/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c infra/constraints.txt
	touch $@

demo: $(STAMP)
	$(BIN)/sashiko demo --output demo

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	$(BIN)/python -m pytest -m "not slow"

test-all: check
	$(BIN)/python -m pytest

.venv-bench/.installed: tests/benchmarks/peer_env.py | $(STAMP)
	$(BIN)/python -m tests.benchmarks.peer_env .venv-bench

# deepinv gets an environment of its own in .venv-bench; rows that are in results/ are not run again.
bench: $(STAMP) .venv-bench/.installed
	$(BIN)/python -m pytest -q tests/benchmarks/bench_times.py
	$(BIN)/python -m tests.benchmarks.unet_vs_monai speed
	$(BIN)/python -m tests.benchmarks.core run
	$(BIN)/python -m tests.benchmarks.core time
	$(BIN)/python -m tests.benchmarks.core report
	$(BIN)/python -m tests.benchmarks.linear_convergence
	$(BIN)/python -m tests.benchmarks.projector --peer-python .venv-bench/bin/python
