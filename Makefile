# Everything runs in .venv, which each target makes for itself on a fresh machine.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
# A fresh environment without pip's build isolation pulling a CUDA build: constraints.txt pins the tested versions.
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
STAMP  := $(VENV)/.ready
OUT    ?= runs/demo

.PHONY: demo test lint bench clean help

help:
	@echo "make demo   set up, train the default model on the embedded digits, show samples and scores (about 5 minutes)"
	@echo "make test   set up, then lint, type check, import check and all tests: what CI runs"
	@echo "make lint   the checks without the tests"
	@echo "make bench  speed and memory side by side with diffusers (about 15 minutes)"

$(STAMP): pyproject.toml constraints.txt
	@echo "== setting up $(VENV) (a few minutes the first time)"
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; set PYTHON to a Python >= 3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[dev]'
	@touch $@

demo: $(STAMP)
	@echo "== training the default model on 1,617 handwritten digits into $(OUT)"
	@rm -rf $(OUT)
	$(BIN)/osmose train ddpm --data digits --out $(OUT) --seed 0
	@echo "== sampling"
	$(BIN)/osmose sample $(OUT) -n 64 --out $(OUT)/digits.png
	@echo "== scoring against real digits (the column 'real data' is what real digits score)"
	$(BIN)/osmose evaluate $(OUT)
	@echo "== look at $(OUT)/digits.png"

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

clean:
	rm -rf $(VENV) runs/demo build dist .mypy_cache .ruff_cache .pytest_cache
