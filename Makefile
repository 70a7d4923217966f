# Everything runs in .venv, made from this project's own files; a bare machine needs Python 3.11 or newer, pip and git.
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test test-fast test-nightly lint types tests bench clean

demo: .venv/run.stamp
	rm -rf $(DEMO)
	$(BIN)/dsv4 sample $(DEMO)/flash
	@echo
	$(BIN)/dsv4 convert $(DEMO)/flash $(DEMO)/bf16 --to bf16 --names transformers
	@echo
	$(BIN)/dsv4 verify $(DEMO)/flash $(DEMO)/bf16 --level values
	@echo
	@echo "That worked. Try next (after: . $(BIN)/activate):"
	@echo "  dsv4 inspect $(DEMO)/flash                                    what is in it"
	@echo "  dsv4 convert $(DEMO)/bf16 $(DEMO)/again --to native              the released bytes again"
	@echo "  dsv4 verify $(DEMO)/flash $(DEMO)/again --level bytes            proven"
	@echo "  dsv4 verify $(DEMO)/bf16                                      complete, and every SHA-256 right"
	@echo "  (cd $(DEMO)/bf16 && sha256sum -c dsv4.sha256)                 the same without dsv4"
	@echo "  dsv4 generate $(DEMO)/bf16 --text Hello                       it speaks, though not sense: weights are random"
	@echo "  dsv4 convert $(DEMO)/flash $(DEMO)/two --to bf16 --layers 0-1    a smaller model that runs"
	@echo "  dsv4 convert DeepSeek-V4-Flash out --to bf16 --dry-run     the real files, once you have them"

test: lint types tests

# while one edits: lint and what takes no processes killed, no disks filled, no million of mutations
test-fast: lint .venv/dev.stamp
	$(BIN)/python -m pytest -m "not slow"

# the long versions: 5,000 kills, every error at every system call, an hour of fuzzing
test-nightly: lint types .venv/dev.stamp
	$(BIN)/python -m pytest --nightly

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev.stamp
	$(BIN)/mypy

tests: .venv/dev.stamp
	$(BIN)/python -m pytest

bench: .venv/dev.stamp
	$(BIN)/python benchmarks/convert.py

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/run.stamp: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) --editable .
	@touch $@

.venv/dev.stamp: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[dev]'
	@touch $@ .venv/run.stamp

clean:
	rm -rf .venv $(DEMO) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
