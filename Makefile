# Everything runs in .venv, which each target makes for itself on a fresh machine.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
# constraints.txt pins the versions that are tested.
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
STAMP  := $(VENV)/.ready
DEMO   := runs/demo

.PHONY: demo test lint bench clean help

help:
	@echo "make demo   set up, train the default model on the embedded digits, show samples and scores (about 5 minutes)"
	@echo "make test   set up, then lint, type check, import check and all tests: what CI runs"
	@echo "make lint   the checks without the tests"
	@echo "make bench  speed and memory side by side with diffusers (about 15 minutes), and the time to quality"

$(STAMP): pyproject.toml constraints.txt
	@echo "== setting up $(VENV) (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: set PYTHON to a Python >= 3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[dev]'
	@touch $@

demo: $(STAMP)
	@echo "== training the default model on 1,617 handwritten digits into $(DEMO)"
	@rm -rf $(DEMO)
	$(BIN)/osmose train edm --data digits --out $(DEMO) --seed 0
	@echo "== sampling"
	$(BIN)/osmose sample $(DEMO) -n 64 --out $(DEMO)/digits.png
	@echo "== scoring against real digits (the column 'real data' is what real digits score)"
	$(BIN)/osmose evaluate $(DEMO)
	@echo "== look at $(DEMO)/digits.png"

lint: $(STAMP)
	@echo "== ruff, mypy, imports run downhill"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	@echo "== tests"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations=10

bench: $(STAMP)
	$(PIP) -e '.[bench]'
	$(BIN)/python benchmarks/speed.py --out benchmarks/results
	@if [ -n "$$OSMOSE_DATA_ROOT" ]; then \
		$(BIN)/python benchmarks/time_to_quality.py --data-root "$$OSMOSE_DATA_ROOT"; \
	else echo "== set OSMOSE_DATA_ROOT to the folder that holds fashion-mnist/ to measure the time to quality as well"; fi

clean:
	rm -rf $(VENV) runs/demo build dist .mypy_cache .ruff_cache .pytest_cache
