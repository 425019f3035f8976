# Everything runs in .venv, which `make install` builds from pyproject.toml and constraints.txt.
# Another interpreter: make install PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
EXTRAS := cpu,numbers,report,deepspeed,dev
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4

.DEFAULT_GOAL := help
.PHONY: help install quickstart test unit lint bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "%-12s%s\n", $$1, $$2}' Makefile

install: $(STAMP) ## .venv with the package (editable) and its development tools

# A stamp in an environment whose interpreter is gone proves nothing.
ifneq ($(shell test -x $(PY) && echo usable),usable)
.PHONY: $(STAMP)
endif

# Rebuilt only when a dependency may have changed. A virtual environment that is broken, or
# was made by another Python, is replaced; a working one is kept and brought up to date.
# The build tools come first, pinned, and build isolation is off, so that packages which come
# as source are built with them too.
$(STAMP): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "cmkd_scale needs Python 3.11 or newer: make install PYTHON=/path/to/python" >&2; exit 2; }
	@version=$$("$(PYTHON)" -c 'import sys; print(sys.version_info[:2])'); \
	  found=$$($(PY) -c 'import pip, sys; print(sys.version_info[:2])' 2>/dev/null || true); \
	  if [ "$$found" != "$$version" ]; then \
	    echo "creating $(VENV)" && "$(PYTHON)" -m venv --clear $(VENV); fi
	$(PY) -m pip install -q -c constraints.txt setuptools wheel
	$(PY) -m pip install -q -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@

quickstart: install ## the whole story on real data; writes runs/quickstart
	$(VENV)/bin/cmkd quickstart --out runs/quickstart

unit: install ## the fast tests
	$(PYTEST) -m "not multirank and not slow"

test: unit ## all tests: the fast ones, then the slow ones and those on several processes
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal -m "multirank or slow"

lint: install ## style, types, import rules
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/shellcheck launchers/*.sh launchers/slurm.sbatch .ci/run

bench: install ## every benchmark of tools/bench, short form; writes runs/bench
	@mkdir -p runs/bench
	@set -e; for file in tools/bench/[a-z]*.py; do \
	  test -e "$$file" || { echo "no benchmark in tools/bench" >&2; exit 2; }; \
	  name=$$(basename "$$file" .py); echo "== $$name"; \
	  $(PY) "$$file" --quick --json "runs/bench/$$name.json"; done

clean: ## remove .venv, caches and build output; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
