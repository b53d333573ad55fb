# Everything sets itself up: `make demo` or `make test` on a fresh machine needs Python >= 3.11, a C++20 compiler and
# CMake >= 3.25, and touches nothing outside this folder.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ENGINE := CMakeLists.txt pyproject.toml constraints.txt $(wildcard csrc/*) tipl tipl/report  # a folder: when files come or go

.DEFAULT_GOAL := help
.PHONY: help demo test bench lint format wheel clean

help:  ## Show what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(VENV)/.runtime  ## Collect, train, forecast and judge on InvertedPendulum, in minutes; goes on where it was stopped
	$(BIN)/tipl demo --output runs/demo --resume

test: $(VENV)/.develop  ## Run the tests
	$(BIN)/python -m pytest tests

bench: $(VENV)/.develop  ## Time the engine beside its peers
	$(BIN)/python -m pytest bench --benchmark-columns=min,median,iqr,rounds

lint: $(VENV)/.develop  ## ruff, ruff format, mypy --strict, clang-format: all only check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*.cpp

format: $(VENV)/.develop  ## Apply ruff and clang-format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.h csrc/*.cpp

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
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet --config-settings=cmake.define.TIPL_WERROR=ON --editable '.[dev,bench]'
	touch $@
