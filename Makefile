# Everything sets itself up: `make demo` or `make test` on a fresh machine needs Python >= 3.11, a C++20 compiler and
# CMake >= 3.25, and touches nothing outside this folder.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The tests of a file share their fixtures, and so a process; torch's threads would only slow the other processes.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
CXX_FILES := $(wildcard $(foreach room,csrc csrc/* csrc/*/* bench,$(room)/*.h $(room)/*.cpp $(room)/*.cu $(room)/*.cuh))
ENGINE := CMakeLists.txt pyproject.toml constraints.txt $(CXX_FILES) tipl $(wildcard tipl/*/)  # a folder: when files come or go

SETTINGS := --config-settings=cmake.define.TIPL_WERROR=ON
# The tests of CUDA without a GPU: TIPL_PTXRUN is the folder of the emulator, which replaces a shared CUDA runtime and
# runs PTX. Machine code would only take time.
ifdef TIPL_PTXRUN
SETTINGS += --config-settings=cmake.define.TIPL_CUDA_SHARED=ON \
  --config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES='80-virtual;90-virtual'
endif

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast docs sanitize stress stress-smoke bench lint format wheel wheels clean

help:  ## Show what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.runtime  ## Collect, train, forecast and judge on InvertedPendulum, in minutes; goes on where it was stopped
	$(BIN)/tipl demo --output runs/demo --resume

test: $(VENV)/.develop  ## Run the tests, in a process for each core
	$(PYTEST) tests

test-fast: $(VENV)/.develop  ## Run those that take less than a second each, for daily work
	$(PYTEST) tests -m 'not slow'

docs: $(VENV)/.docs  ## Build the site into site/: a broken link or a reference that is not there fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

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
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.develop  ## Apply ruff and clang-format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

wheel: $(VENV)/.runtime  ## Build the wheel into dist/
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

wheels: $(VENV)/.develop  ## Build and test wheels for Python 3.11 to 3.14 into dist/, in Docker
	$(BIN)/cibuildwheel --output-dir dist

clean:  ## Remove what was built, but not runs/
	rm -rf $(VENV) build dist site

# PIP_CONSTRAINT, not -c: it holds in the isolated build environment too.
$(VENV)/.runtime: $(ENGINE)
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet $(SETTINGS) --editable .
	touch $@

$(VENV)/.develop: $(VENV)/.runtime
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet $(SETTINGS) --editable '.[dev]'
	touch $@

# Apart from .develop: the site's tools need Python >= 3.11.5.
$(VENV)/.docs: $(VENV)/.develop
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet $(SETTINGS) --editable '.[dev,docs]'
	touch $@

# llama.cpp is built from source for this machine's instruction set, in minutes, once.
$(VENV)/.bench: $(VENV)/.develop
	CMAKE_ARGS=-DLLAVA_BUILD=OFF CMAKE_BUILD_PARALLEL_LEVEL=$$(nproc) PIP_CONSTRAINT=constraints.txt \
	  $(BIN)/pip install --quiet $(SETTINGS) --editable '.[dev,bench]'
	touch $@
