# Every target sets up what it needs, on a fresh machine too: a virtual environment in .venv with the versions of
# constraints.txt. The set-up runs again only when pyproject.toml or constraints.txt has changed.
#
#   make quickstart [ARGS="--method sam"]    make test [ARGS="-k sam"]    make lint    make format    make bench    make docs
#   make test-fast: in about a minute one look at every method, the engine, the Trainer, the loop, the optimizer and the settings
#   make generated: what follows from the presets' signatures and docstrings (exports, types, tables) is written anew
#   make test-oldest: the Trainer's tests with the oldest versions supported, in an environment of their own
#   make test-wheel: the same for the built wheel; make test-main: all tests with the main branches of the Hugging Face libraries
#   make dist: source archive and wheel into dist/; make version: the version that they get
# Tests run in two processes; JOBS=0 runs them in one, which a debugger needs.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
JOBS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Installed first and by its exact version: a bare `torch` may bring gigabytes of another build.
TORCH ?= $(shell grep '^torch==' constraints.txt)
OLDEST ?= .venv-oldest
OLDEST_TESTS := $(addprefix tests/,test_trainer.py test_doors.py test_checkpoints.py test_contract.py soak distributed/test_ddp.py)
WHEEL ?= .venv-wheel
WHEEL_TESTS := $(addprefix tests/,test_trainer.py test_checkpoints.py test_old_checkpoints.py test_contract.py)
DIST ?= .venv-dist
MAIN ?= .venv-main
MAIN_BRANCHES := $(foreach name,transformers accelerate peft trl,"git+https://github.com/huggingface/$(name)")
SOURCES := $(wildcard hf_sharp recipes benchmarks examples tests tools)

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-fast test-oldest test-wheel test-main generated lint format bench docs dist version release-check clean

help:
	@sed -n '1,10s/^# \{0,1\}//p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "hf_sharp needs Python 3.10 or newer; name one: make PYTHON=python3.11 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Setting up $(VENV) (some minutes the first time) ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check "$(TORCH)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[recipes,trl,dev,docs]'
	@touch $@

quickstart: $(STAMP)
	@$(BIN)/accelerate launch recipes/glue_fsam.py $(ARGS)

test test-fast: export HF_HUB_OFFLINE = 1
test test-fast: export HF_DATASETS_OFFLINE = 1
test: $(STAMP)
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

test-fast: $(STAMP)
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m fast tests $(ARGS)

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	@echo "Setting up $(OLDEST) (some minutes the first time) ..."
	@$(OLDEST)/bin/python -m pip install -qq --disable-pip-version-check "$$(grep '^torch==' constraints-oldest.txt)"
	@$(OLDEST)/bin/python -m pip install -qq --disable-pip-version-check -c constraints-oldest.txt -e . pytest pytest-xdist
	@touch $@

test-oldest: export HF_HUB_OFFLINE = 1
test-oldest: $(OLDEST)/.installed
	@$(OLDEST)/bin/python -m pytest -n $(JOBS) $(OLDEST_TESTS) $(ARGS)

# The tests are copied to a folder that has no hf_sharp in it: what they import can only be the wheel's.
test-wheel: export HF_HUB_OFFLINE = 1
test-wheel: dist
	@rm -rf $(WHEEL) && $(PYTHON) -m venv $(WHEEL)
	@$(WHEEL)/bin/python -m pip install -qq --disable-pip-version-check "$(TORCH)"
	@$(WHEEL)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt dist/*.whl peft pytest pytest-xdist
	@mkdir -p $(WHEEL)/clone && cp -R tests pyproject.toml $(WHEEL)/clone
	@cd $(WHEEL)/clone && ../bin/python -m pytest -n $(JOBS) $(WHEEL_TESTS) $(ARGS)

test-main: export HF_HUB_OFFLINE = 1
test-main: export HF_DATASETS_OFFLINE = 1
test-main:
	@rm -rf $(MAIN) && $(PYTHON) -m venv $(MAIN)
	@$(MAIN)/bin/python -m pip install -qq --disable-pip-version-check -e '.[recipes,trl,dev]'
	@$(MAIN)/bin/python -m pip install -qq --disable-pip-version-check --upgrade $(MAIN_BRANCHES)
	@$(MAIN)/bin/python -m pytest -n $(JOBS) $(ARGS)

lint: $(STAMP)
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP)
	@$(BIN)/ruff check --fix $(SOURCES)
	@$(BIN)/ruff format $(SOURCES)

generated: $(STAMP)
	@$(BIN)/python tools/generate.py

bench: $(STAMP)
	@$(BIN)/python benchmarks/step.py $(ARGS)

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(STAMP)
	@$(BIN)/python -m mkdocs build --strict --quiet
	@echo "The pages are in site/; open site/index.html"

dist:
	@test -x $(DIST)/bin/python || $(PYTHON) -m venv $(DIST)
	@$(DIST)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt build
	@rm -rf dist && $(DIST)/bin/python -m build --outdir dist .

release-check:
	@version="v$$($(MAKE) --no-print-directory version)"; \
	test "$$TAG" = "$$version" || { echo "The tag '$$TAG' is not $$version"; exit 1; }

version:
	@sed -n 's/^__version__ = "\(.*\)"$$/\1/p' hf_sharp/__init__.py

clean:
	rm -rf $(VENV) $(OLDEST) $(WHEEL) $(MAIN) $(DIST) dist build
