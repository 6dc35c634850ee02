# `make quickstart` and `make test` need Python >= 3.11 and make, nothing else.
#   make quickstart           install, make the corpus and its shards, train, evaluate, report
#   make quickstart QUICK=1   the same in miniature: 40 clips, 20 steps
#   make test                 install and run the tests;  PYTEST_ARGS='tests/unit -k clip'
#   make chaos                inject faults in full, write tests/faults/report.md;  SUITES='shards media'
#   make lint types layers wheel table constraints clean
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
OUT := runs/quickstart
WORKERS := $(shell getconf _NPROCESSORS_ONLN)
PYTEST_ARGS ?=
SUITES ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export DS_BUILD_OPS := 0# DeepSpeed is installed as pure Python: no compiler needed

ifneq ($(filter-out 0,$(QUICK)),)
SIZE := quick
CLIPS := --train 40 --val 20 --test 40
STEPS := train.steps=20
else
SIZE := full
CLIPS :=
STEPS :=
endif

.PHONY: help install quickstart test chaos lint types layers wheel table constraints clean

help:
	@sed -n '1,6s/^# \{0,1\}//p' Makefile

# ---------------------------------------------------------------- environment

install: $(VENV)/.installed

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "$(PYTHON) is older than 3.11: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null \
	    || { echo "$(PYTHON) has no venv module: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install --prefer-binary -c constraints.txt -e '.[dev]'
	@touch $@

# ---------------------------------------------------------------- quickstart

quickstart: $(OUT)/.evaluated-$(SIZE)
	@cat $(OUT)/table.txt
	@echo "report: $(OUT)/report.html"

# results of the other size are moved aside, never deleted
$(OUT)/.size-$(SIZE):
	@if [ -e $(OUT) ]; then mv -v $(OUT) $(OUT)-$$(date +%Y%m%d-%H%M%S); fi
	@mkdir -p $(OUT) && touch $@

$(OUT)/.corpus: $(OUT)/.size-$(SIZE) | $(VENV)/.installed
	$(PY) -m data_tools.synth --out $(OUT)/corpus --workers $(WORKERS) $(CLIPS)
	@touch $@

$(OUT)/.shards: $(OUT)/.corpus
	$(PY) -m data_tools.make_shards $(OUT)/corpus $(OUT)/shards --workers $(WORKERS)
	$(PY) -m data_tools.train_tokenizer $(OUT)/shards/train $(OUT)/shards/tokenizer.model
	@touch $@

# an interrupted training goes on where it stopped
$(OUT)/.trained-$(SIZE): $(OUT)/.shards configs/runs/quickstart.yaml
	$(PY) -m mmssl.cli train configs/runs/quickstart.yaml out=$(OUT) $(STEPS)
	@touch $@

$(OUT)/.evaluated-$(SIZE): $(OUT)/.trained-$(SIZE)
	$(PY) -m mmssl.cli eval bouncing $(OUT) > $(OUT)/table.txt
	@touch $@

# ---------------------------------------------------------------- checks

test: $(VENV)/.installed
	$(PY) -m pytest -n auto --maxprocesses 4 $(PYTEST_ARGS)

chaos: $(VENV)/.installed
	$(PY) -m tests.faults $(SUITES)

lint: $(VENV)/.installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

types: $(VENV)/.installed
	$(VENV)/bin/mypy

layers: $(VENV)/.installed
	$(VENV)/bin/lint-imports

wheel: $(VENV)/.installed
	rm -rf dist
	$(PY) -m build --wheel --outdir dist .

# ---------------------------------------------------------------- upkeep

# the README's method table
table: $(VENV)/.installed
	$(PY) -m mmssl.catalogue --write README.md

# run after the tests have passed with the newest versions that pyproject.toml allows
constraints: $(VENV)/.installed
	$(PY) -m pip list --format=freeze --exclude-editable --exclude pip \
	    | sed 's/_/-/g' | tr '[:upper:]' '[:lower:]' | LC_ALL=C sort > constraints.txt.new
	mv constraints.txt.new constraints.txt
	@touch $(VENV)/.installed

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
