# Everything sets itself up: `make demo` or `make test` on a fresh machine needs Python >= 3.11, a C++20 compiler and
# CMake >= 3.25, and touches nothing outside this folder.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A file's tests share their fixtures and so one process; torch's threads would only get in the way of the others.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
ENGINE := CMakeLists.txt pyproject.toml constraints.txt $(wildcard csrc/*) tipl $(wildcard tipl/*/)  # a folder: when files come or go

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast sanitize stress stress-smoke bench lint format wheel clean

help:  ## Show what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.runtime  ## Collect, train, forecast and judge on InvertedPendulum, in minutes; goes on where it was stopped
	$(BIN)/tipl demo --output runs/demo --resume

test: $(VENV)/.develop  ## Run the tests, in a process for each core
	$(PYTEST) tests

test-fast: $(VENV)/.develop  ## Run those that take less than a second each, for daily work
	$(PYTEST) tests -m 'not slow'

sanitize: $(VENV)/.develop  ## Run the engine's tests under ASan and UBSan, and those of its threads under TSan
	.ci/sanitize address
	.ci/sanitize thread

stress: $(VENV)/.develop  ## Kills, disk faults, damage, races, hostile input: thousands in an hour, into tests/stress/latest.json
	$(BIN)/python -m tests.stress

stress-smoke: $(VENV)/.develop  ## Some of them, in two minutes
	$(BIN)/python -m tests.stress --scale smoke

bench: $(VENV)/.bench  ## Time the engine beside its peers, half an hour; ratios must not fall below bench/baseline.json's
	$(BIN)/python -m pytest bench

lint: $(VENV)/.develop  ## ruff, ruff format, mypy --strict, import-linter, clang-format: all only check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*.cpp bench/*.cpp

format: $(VENV)/.develop  ## Apply ruff and clang-format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.h csrc/*.cpp bench/*.cpp

wheel: $(VENV)/.runtime  ## Build the wheel into dist/
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

clean:  ## Remove what was built, but not runs/
	rm -rf $(VENV) build dist

# PIP_CONSTRAINT, not -c: it holds in the isolated build environment too.
$(VENV)/.runtime: $(ENGINE)
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet --config-settings=cmake.define.TIPL_WERROR=ON --editable .
	touch $@

$(VENV)/.develop: $(VENV)/.runtime
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet --config-settings=cmake.define.TIPL_WERROR=ON --editable '.[dev]'
	touch $@

# llama.cpp is built from source for this machine's instruction set, in minutes, once.
$(VENV)/.bench: $(VENV)/.develop
	CMAKE_ARGS=-DLLAVA_BUILD=OFF CMAKE_BUILD_PARALLEL_LEVEL=$$(nproc) PIP_CONSTRAINT=constraints.txt \
	  $(BIN)/pip install --quiet --config-settings=cmake.define.TIPL_WERROR=ON --editable '.[dev,bench]'
	touch $@
