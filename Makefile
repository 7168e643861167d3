# make demo      install, train the quickstart on the CPU, evaluate it, write pictures and a score
# make test      install, run the tests
# make install   the environment in .venv with what running needs; make install-dev adds the test tools
# make lint      ruff, formatting, mypy
# make clean     remove caches; make distclean also removes .venv
#
# On a Linux machine without a GPU, PyPI's torch brings several GB of CUDA libraries: there the small build of PyTorch's own
# index is taken, if it can be reached. Another choice: make demo PIP_FLAGS="..."

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
VENV ?= .venv
CPU_INDEX = https://download.pytorch.org/whl/cpu
PIP_FLAGS ?= $(shell command -v nvidia-smi >/dev/null || \
  { curl -sfIo /dev/null --max-time 5 $(CPU_INDEX)/torch/ && echo --extra-index-url $(CPU_INDEX); })
PYTEST_FLAGS ?=

PIP_INSTALL = $(VENV)/bin/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt
# One thread per test process, one process per core: two threads per process are slower on tests this small.
TEST_ENV = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help demo test install install-dev bench lint format clean distclean

help:
	@sed -n 's/^# make/make/p' Makefile

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

demo: $(VENV)/.installed
	$(VENV)/bin/python -m launch.demo

test: $(VENV)/.installed-dev
	$(TEST_ENV) $(VENV)/bin/python -m pytest -q -n auto --maxprocesses 8 -m "not slow and not gpu" $(PYTEST_FLAGS)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/.installed-bench

$(VENV)/bin/python:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Ropeway needs Python 3.11 or newer; '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1 || echo missing)." \
	       "Name another one: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# The stamps make a second `make demo` start at once; a changed requirement installs again.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) -e '.[dev]'
	@touch $(VENV)/.installed $@

$(VENV)/.installed-bench: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) -e '.[bench]'
	$(PIP_INSTALL) --no-deps autoregressive-diffusion-pytorch
	@touch $(VENV)/.installed $@

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
