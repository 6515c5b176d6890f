# Every target sets up what it needs: a virtual environment, pinned packages, the built extension.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# For measurements and training: glibc gives large tensors back to the system at every step, which doubles the times of
# stock torch, and spinning OpenMP threads stall when another process takes a core.
FAST := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456 OMP_WAIT_POLICY=passive
SOURCES := $(shell find csrc -type f)

.PHONY: demo test bench figures lint clean

demo: $(VENV)/.built  ## the main job: toys and classifier, ending with one report.html
	$(FAST) $(BIN)/python -m experiments demo

test: $(VENV)/.built  ## all tests, the doctests and the C++ tests
	$(BIN)/python -m pytest

bench: $(VENV)/.built  ## speed, next to stock PyTorch and the hardware's limit
	$(FAST) $(BIN)/python -m pytest tests/benchmarks --benchmark-only

figures: $(VENV)/.built  ## the paper's figures at full budget
	$(BIN)/python -m experiments toy
	$(FAST) $(BIN)/python -m experiments classifier --all-m 2,4,8,16,32

lint: $(VENV)/.built
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

clean:
	rm -rf build $(VENV) bsfast/lib bsfast/_native*.so

$(VENV)/.installed: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade "pip>=24"
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	$(BIN)/python -m pip install -q --no-deps torchvision==0.28.0
	touch $@

$(VENV)/.built: $(VENV)/.installed pyproject.toml setup.py CMakeLists.txt $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	touch $@
