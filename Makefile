# Two commands are enough: `make compare` (the main job) and `make test`. Both build the environment they need.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# TensorFlow wants other versions of some libraries
TFVENV := .venv-tensorflow
# what a test compiles it runs once or twice
QUICK_XLA := "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
JOBS   ?= 2

.PHONY: compare test test-keras lint docs bench bench-keras zoo format browser clean help

help:            ## this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(BIN)/python $(TFVENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("batchnorm needs Python 3.11 or later" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(@D:/bin=)

# A stamp for each set of extras, so that a second call starts at once.
$(VENV)/.lab: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[lab]'
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/.lab

$(VENV)/.zoo: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[zoo]'
	@touch $@

$(TFVENV)/.dev: $(TFVENV)/bin/python pyproject.toml constraints-tensorflow.txt
	$(TFVENV)/bin/python -m pip install --quiet --constraint constraints-tensorflow.txt --editable '.[dev-tensorflow]'
	@touch $@

compare: $(VENV)/.lab  ## train with and without batch normalization on real data; ends in comparison/report.html
	$(BIN)/batchnorm compare digits --out comparison --jobs $(JOBS)

test: $(VENV)/.dev browser lint docs  ## everything that needs no TensorFlow
	XLA_FLAGS=$(QUICK_XLA) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
	KERAS_BACKEND=jax JAX_PLATFORMS=cpu XLA_FLAGS=$(QUICK_XLA) $(BIN)/python -m pytest tests/backends -n $(JOBS) --dist worksteal

test-keras: $(TFVENV)/.dev  ## what holds on every backend of Keras, on TensorFlow
	KERAS_BACKEND=tensorflow $(TFVENV)/bin/python -m pytest tests/backends -n $(JOBS) --dist worksteal
	KERAS_BACKEND=jax $(TFVENV)/bin/python -m pytest tests/backends/test_exported_backends.py

lint: $(VENV)/.dev  ## format, style, types, floors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.dev  ## the documentation site, built strictly, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

zoo: $(VENV)/.zoo  ## fold other people's models by the dozen (slow)
	$(BIN)/python -m pytest -m zoo -n $(JOBS) --dist worksteal --timeout=1800

bench: $(VENV)/.zoo  ## the measured figures of README and docs, in benchmarks/
	$(BIN)/batchnorm bench compare --out benchmarks
	$(BIN)/batchnorm bench effects --out benchmarks
	$(BIN)/batchnorm bench op --out benchmarks
	$(BIN)/batchnorm bench layer --out benchmarks
	$(BIN)/batchnorm bench network --out benchmarks
	$(BIN)/batchnorm bench memory --out benchmarks
	$(BIN)/batchnorm bench fold --out benchmarks
	$(BIN)/batchnorm bench recalibrate --out benchmarks
	$(BIN)/batchnorm bench check --out benchmarks
	$(BIN)/batchnorm bench sync --out benchmarks
	$(BIN)/batchnorm bench keras --out benchmarks

bench-keras: $(TFVENV)/.dev  ## the figures of Keras on torch, JAX and TensorFlow, in benchmarks/
	$(TFVENV)/bin/batchnorm bench keras --out benchmarks

format: $(VENV)/.dev  ## mend format and style in place
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

browser:  # the report is tested in a real browser
	@./.ci/browser

clean:           ## remove everything that was built
	rm -rf $(VENV) $(TFVENV) site comparison benchmarks build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
