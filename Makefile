# make demo, make test, make bench: each does all the set-up that is missing. PYTHON chooses the interpreter,
# INSTALL_FLAGS go to pip install: --config-settings=cmake.define.JAXKERN_CUDA=OFF leaves the CUDA kernels out though
# nvcc is there.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
PIP = $(RUN) -m pip install --quiet --disable-pip-version-check
INSTALL_FLAGS ?=
CODE = $(wildcard cpu/*.h cpu/*.cc $(foreach folder,bindings bindings/* cuda cuda/*,$(addprefix $(folder)/*.,h cc cu))) $(wildcard tests/sim/*.cu)
ifeq ($(origin CXX),default)
CXX = c++
endif

.PHONY: demo test test-slow sanitize kernels lint format bench docs install clean

demo: install
	$(RUN) examples/shakespeare.py

# Two workers for two cores; the slow part is `make test-slow`.
test: lint
	$(RUN) -m pytest -n 2 -m "not slow"

# What compares times has the machine to itself.
test-slow: install
	$(RUN) -m pytest -n 2 -m "slow and not alone"
	$(RUN) -m pytest -m alone

# The kernels built with AddressSanitizer and UndefinedBehaviorSanitizer, under the tests that reach their corners.
sanitize: install
	PYTHON=$(RUN) sh tests/sanitize.sh

# The Hopper kernels compiled for a GPU, without one: no spills, nothing that ptxas had to repair, and a table of all.
kernels: install
	$(RUN) -m benchmarks.kernels

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CODE)

format: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CODE)

bench: install
	$(RUN) -m benchmarks

docs: install
	$(PIP) --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

install: $(VENV)/installed

# Again after any change to what is compiled or to the dependencies.
$(VENV)/installed: pyproject.toml CMakeLists.txt $(CODE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "jaxkern needs Python 3.11 or later as $(PYTHON); choose another with: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "jaxkern needs Python's venv module (on Debian: apt-get install python3-venv)"; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; p = sysconfig.get_path("include") + "/Python.h"; sys.exit(not os.path.exists(p))' || { \
	  echo "jaxkern needs the C headers of $(PYTHON) (on Debian: apt-get install python3-dev)"; exit 1; }
	@echo 'int main() {}' | $(CXX) -std=c++20 -fsyntax-only -x c++ - 2>/dev/null || { \
	  echo "jaxkern needs a C++20 compiler as $(CXX) (on Debian: apt-get install g++); choose one with: make CXX=..."; exit 1; }
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo "Installing jaxkern and what it needs into $(VENV) (once; a few minutes)"
	@$(PIP) $(INSTALL_FLAGS) --editable ".[demo,test]"
	@touch $@

clean:
	rm -rf $(VENV) .venv-* .jax_cache build
