# Needs a C++17 compiler, GNU make and Python 3.10 or newer. `make demo` is the first thing to try.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
TESTS  ?= tests

BIN    := $(VENV)/bin
CPP     = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# The threads of two programs that share the cores must not spin: beside other load that costs a multiple.
PASSIVE := OMP_WAIT_POLICY=passive
PYTEST := $(PASSIVE) $(BIN)/pytest -q

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

install: $(VENV)/native ## .venv with torch, the native half built, fastmaml installed editable

demo: install ## train, adapt, draw: three minutes
	$(PASSIVE) $(BIN)/python examples/demo.py

test: install ## every test, or those in TESTS=
	$(PYTEST) -n 2 $(TESTS)

bench: install $(VENV)/peers ## fastmaml beside what people run today: about twenty minutes
	$(BIN)/python -m benchmarks.run

lint: install ## ruff, clang-format
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: install ## rewrite to pass lint
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CPP)

# A second copy of the package in build/sanitize, found before the editable one. The report goes past pytest's capture.
sanitize: install ## the quick tests under the address and undefined-behaviour sanitizers
	rm -rf build/sanitize
	FASTMAML_SANITIZE=1 $(BIN)/python setup.py -q build --build-lib build/sanitize
	LD_PRELOAD="$$(ldd build/sanitize/fastmaml/_cpu*.so | awk '/lib(asan|ubsan|stdc\+\+)/ { print $$3 }' | xargs)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	PYTHONPATH=build/sanitize $(PYTEST) --capture=sys -p no:cacheprovider -m 'not slow' $(TESTS)

# In isolation, as a user's pip would; --no-deps: never torch.
wheels: install ## dist/*.whl for this Python and any other from 3.10 to 3.13 found here
	rm -rf build/lib.*
	@own=$$($(BIN)/python -c 'import sys; print("python%d.%d" % sys.version_info[:2])'); \
	for python in $(BIN)/python $(foreach minor,10 11 12 13,python3.$(minor)); do \
	  if [ $$python = $$own ] || ! $$python -m pip --version >/dev/null 2>&1; then continue; fi; \
	  echo "$$python -m pip wheel --no-deps --wheel-dir dist ."; \
	  $$python -m pip wheel -q --no-deps --wheel-dir dist . || exit 1; \
	done

clean: ## everything that was built; .venv stays
	rm -rf build dist *.egg-info fastmaml/_c*.so $(VENV)/native

# Torch comes first and by itself: a Python that has one lends it, and fastmaml then finds it installed.
$(VENV)/torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	{ echo '$(PYTHON) is not a Python 3.10 or newer. Name one, for instance: make demo PYTHON=python3.12'; exit 1; }
	if $(PYTHON) -c 'import torch' 2>/dev/null; then $(PYTHON) -m venv --system-site-packages $(VENV); \
	else $(PYTHON) -m venv $(VENV); fi
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install -q '$(TORCH)'
	touch $@

$(VENV)/fastmaml: pyproject.toml | $(VENV)/torch
	$(BIN)/python -m pip install -q --upgrade 'setuptools>=77' 'pybind11>=2.13' ninja
	$(BIN)/python -m pip install -q --no-build-isolation -e '.[test]'
	$(BIN)/python -m pip install -q 'triton>=3.6' || echo 'no triton: its tests are skipped'
	touch $@

# What cannot be installed here is a row with the reason.
$(VENV)/peers: | $(VENV)/fastmaml
	for peer in higher torchopt jax; do $(BIN)/python -m pip install -q $$peer || echo "no $$peer"; done
	touch $@

$(VENV)/native: setup.py $(shell find csrc) $(VENV)/fastmaml
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@

.PHONY: help install demo test bench lint format sanitize wheels clean
