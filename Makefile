# Everything a newcomer or a change needs. Wants Python 3.11 or newer, with its venv module, and make; nothing else.
# PYTHON=/path/to/python chooses another Python than the one found here. All of it goes into .venv.

VENV := .venv
BIN := $(VENV)/bin
# pip need not compile all modules, which takes as long as the rest: Python compiles each when it is first imported. A short
# run sees to those of every run, even where PYTHONDONTWRITEBYTECODE is set, and shows that the installation works.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile
FIRST_RUN = folder=$$(mktemp -d) && PYTHONDONTWRITEBYTECODE= $(BIN)/qfleet train CartPole-v1 --env-steps 2000 --quiet \
	--run-dir $$folder/run >/dev/null && rm -r $$folder

# The first of these that runs and can make environments: a name on the path may be a shim that only fails.
CAN_MAKE_ENVIRONMENTS := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3 python; do \
	"$$python" -c '$(CAN_MAKE_ENVIRONMENTS)' >/dev/null 2>&1 && echo "$$python" && break; done)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint format docs dist bench-peers clean

help:
	@echo "make demo         train CartPole until it is solved, and show the result"
	@echo "make test         run the tests"
	@echo "make lint         check style, format and types"
	@echo "make format       put imports and lines in order"
	@echo "make docs         build the documentation into site/"
	@echo "make dist         build a wheel into dist/"
	@echo "make bench-peers  install what qfleet is measured against"
	@echo "make clean        delete what these commands have made, except runs/"

demo: $(VENV)/.installed-core
	$(BIN)/qfleet train CartPole-v1 --preset pqn --stop-return 475
	$(BIN)/qfleet eval latest

# Most of a test's time is compilation, so XLA leaves out what makes programs fast, and not what makes them right.
# `make test XLA_FLAGS=` compiles them as in a user's run.
test: export XLA_FLAGS ?= --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false \
	--xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1
# Nor does it note for each operation which lines of Python it comes from, which only profiles show.
test: export JAX_TRACEBACK_IN_LOCATIONS_LIMIT ?= 0
# The tests start hundreds of processes. Without Python's own cache, each would compile the whole package.
test: export PYTHONDONTWRITEBYTECODE :=
test: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Zensical is the theme too; plain MkDocs takes its own, which Zensical doesn't have.
docs: export QFLEET_DOCS_THEME := zensical
docs: $(VENV)/.installed-dev
	@$(BIN)/python docs/tools/reference.py
	$(BIN)/zensical build --strict --clean
	@echo "Now open site/index.html, or serve it: $(BIN)/python -m http.server --directory site"

dist: $(VENV)/pyvenv.cfg
	$(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir dist .
	@ls dist/qfleet-*.whl

bench-peers: $(VENV)/pyvenv.cfg
	$(BIN)/python benchmarks/install.py

clean:
	rm -rf $(VENV) benchmarks/.peers build dist site .cache .pytest_cache .mypy_cache .ruff_cache
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed-core: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	@echo "Installing qfleet into $(VENV): about 740 MB, a minute or two ..."
	@$(PIP) --constraint constraints.txt --editable .
	@$(FIRST_RUN)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	@echo "Installing qfleet and its development tools into $(VENV): about 1.8 GB, a minute or two ..."
	@$(PIP) --constraint constraints.txt --editable '.[dev]'
	@$(FIRST_RUN)
	@touch $(VENV)/.installed-core $@

$(VENV)/pyvenv.cfg:
	@"$(PYTHON)" -c '$(CAN_MAKE_ENVIRONMENTS)' 2>/dev/null || { \
		echo "qfleet needs Python 3.11 or newer with its venv module, and found none$(if $(PYTHON), ($(PYTHON) is not))." >&2; \
		echo "Install one (on Debian or Ubuntu: apt install python3 python3-venv), or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2; \
		exit 1; }
	@"$(PYTHON)" -m venv $(VENV)
