# Everything sets itself up: `make demo` or `make test` on a fresh machine needs Python >= 3.11, a C++20 compiler and
# CMake >= 3.25, and touches nothing outside this folder.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The tests of a file share their fixtures, and so a process; torch's threads would only slow the other processes.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
CXX_FILES := $(wildcard $(foreach room,csrc csrc/* csrc/*/* bench,$(room)/*.h $(room)/*.cpp $(room)/*.cu $(room)/*.cuh))
ENGINE := CMakeLists.txt pyproject.toml constraints.txt $(CXX_FILES) tipl $(wildcard tipl/*/)  # a folder: when files come or go

# Of the kernels, only what all cards can run: machine code for each takes a minute. The tests of CUDA without a GPU:
# TIPL_PTXRUN is the folder of an emulator, which replaces a shared CUDA runtime and runs PTX.
ifdef TIPL_PTXRUN
SETTINGS := -C cmake.define.TIPL_WERROR=ON -C cmake.define.TIPL_CUDA_SHARED=ON \
  -C cmake.define.CMAKE_CUDA_ARCHITECTURES='80-virtual;90-virtual'
else
SETTINGS := -C cmake.define.TIPL_WERROR=ON -C cmake.define.TIPL_CUDA_SHARED=OFF -C cmake.define.CMAKE_CUDA_ARCHITECTURES=80
endif

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast docs sanitize sanitize-fast sanitize-address sanitize-thread stress stress-smoke bench lint format wheel wheels clean

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

sanitize: $(VENV)/.develop  ## Run the engine's tests under ASan and UBSan, and those of its threads under TSan, side by side
	$(MAKE) --jobs=2 --output-sync=target sanitize-address sanitize-thread

sanitize-fast: $(VENV)/.develop  ## Run those of them that take less than a second each without sanitizers
	$(MAKE) --jobs=2 --output-sync=target sanitize-address sanitize-thread SANITIZE_ONLY='-m "not slow"'

sanitize-address sanitize-thread: sanitize-%:
	.ci/sanitize $* $(SANITIZE_ONLY)

stress: $(VENV)/.develop  ## Kills, disk faults, damage, races, hostile input: thousands in an hour, into tests/stress/latest.json
	$(BIN)/python -m tests.stress

stress-smoke: $(VENV)/.develop  ## Some of them, in two minutes
	$(BIN)/python -m tests.stress --scale smoke

bench: $(VENV)/.bench  ## Time the engine beside its peers, most of an hour; ratios must not fall below bench/baseline.json's
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

wheel: | $(BIN)/pip  ## Build the wheel into dist/
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip wheel --quiet --no-deps -C build-dir=build/wheel --wheel-dir dist .

wheels: $(VENV)/.develop  ## Build and test wheels for Python 3.11 to 3.14 into dist/, in Docker
	$(BIN)/cibuildwheel --output-dir dist

clean:  ## Remove what was built, but not runs/
	rm -rf $(VENV) build dist site

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# Each of these builds the engine once, and makes what the ones before it make. PIP_CONSTRAINT, not -c: it holds in the
# isolated build environment too.
$(VENV)/.runtime: $(ENGINE) | $(BIN)/pip
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet $(SETTINGS) --editable .
	touch $@

$(VENV)/.develop: $(ENGINE) | $(BIN)/pip
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet $(SETTINGS) --editable '.[dev]'
	touch $(VENV)/.runtime $@

# Apart from .develop: the site's tools need Python >= 3.11.5.
$(VENV)/.docs: $(ENGINE) | $(BIN)/pip
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet $(SETTINGS) --editable '.[dev,docs]'
	touch $(VENV)/.runtime $(VENV)/.develop $@

# llama.cpp is built from source for this machine's instruction set, in minutes, once.
$(VENV)/.bench: $(ENGINE) | $(BIN)/pip
	CMAKE_ARGS=-DLLAVA_BUILD=OFF CMAKE_BUILD_PARALLEL_LEVEL=$$(nproc) PIP_CONSTRAINT=constraints.txt \
	  $(BIN)/pip install --quiet $(SETTINGS) --editable '.[dev,bench]'
	touch $(VENV)/.runtime $(VENV)/.develop $@
