# Every target sets up what it needs: a virtual environment, pinned packages, the built extension.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# For measurements and training: glibc gives large tensors back to the system at every step, which doubles the times of
# stock torch; large pages save about 2 % of a step; and spinning OpenMP threads stall when another process takes a core.
FAST := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456 GLIBC_TUNABLES=glibc.malloc.hugetlb=1 OMP_WAIT_POLICY=passive
SOURCES := $(shell find csrc -type f)

.PHONY: demo setup test test-device codegen-full gpu gpu-sanitize gpu-bench bench bench-full figures lint clean

demo: $(VENV)/.built  ## the main job: toys and classifier, ending with one report.html
	$(FAST) $(BIN)/python -m experiments demo

setup: $(VENV)/.built  ## virtual environment, pinned packages and native code, nothing else

test: $(VENV)/.built  ## all tests, the doctests and the C++ tests; a process for each core, as each test has one thread
	$(BIN)/python -m pytest -n auto --dist loadfile

test-device: $(VENV)/.built build/device-tools/.installed  ## the CUDA kernels, emulated and compiled, without a GPU
	BSFAST_TEST_DEVICE=1 $(BIN)/python -m pytest tests/device -rs -n auto --dist loadfile

codegen-full: $(VENV)/.installed build/device-tools/.installed  ## every CUDA kernel compiled for every architecture
	BSFAST_TEST_DEVICE=full $(BIN)/python -m pytest tests/device/test_every_instance.py -rs --durations=0

# With what PYTHON has: torch with CUDA, numpy, Triton with a C compiler and Python's headers; pytest, pytest-benchmark and
# hypothesis for tests; and nvcc, a C++ compiler, CMake, Ninja and pybind11 unless BSFAST_CUDA_LIBRARY names a library
# built elsewhere. Nothing begins after 8 minutes; a call ends with status 2 if work is left, and the next goes on there;
# GPU_ARGS holds further options, such as --seconds=1200.
GPU_ARGS ?=
gpu:  ## on a machine with a GPU: operator tests on it, and a short benchmark
	$(PYTHON) -m tests.gpu test bench $(GPU_ARGS)

gpu-sanitize:  ## the kernels' tests under compute-sanitizer
	$(PYTHON) -m tests.gpu sanitize $(GPU_ARGS)

gpu-bench:  ## everything next to stock PyTorch and the roofline; the classifier, too, if BSFAST_DATA has CIFAR-10
	$(PYTHON) -m tests.gpu bench --full $(GPU_ARGS)

bench: $(VENV)/.built  ## speed, next to stock PyTorch and the hardware's limit, in at most 15 minutes
	$(FAST) $(BIN)/python -m pytest tests/benchmarks --benchmark-only -rs -m "not full"
	$(BIN)/python -m tests.benchmarks.table

bench-full: $(VENV)/.built  ## all networks, in about an hour; and the convolutions with the default malloc too
	$(FAST) $(BIN)/python -m pytest tests/benchmarks --benchmark-only -rs -m "not quick"
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest tests/benchmarks/test_conv_speed.py --benchmark-only -rs
	$(BIN)/python -m tests.benchmarks.table

figures: $(VENV)/.built  ## the paper's figures at full budget
	$(BIN)/python -m experiments toy
	$(FAST) $(BIN)/python -m experiments classifier --all-m 2,4,8,16,32

lint: $(VENV)/.built
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

# Compilers and disassemblers of CUDA; what cannot be installed, its tests skip.
build/device-tools/.installed: tests/device/requirements.txt | $(VENV)/.installed
	$(BIN)/python -m pip install -q --no-deps --upgrade --target $(@D) -r $< && touch $@ || \
	  echo "bsfast: CUDA's tools could not be installed; the checks that need them skip" >&2

clean:
	rm -rf build $(VENV) bsfast/lib bsfast/_native*.so

$(VENV)/.installed: requirements-dev.txt
	@$(PYTHON) -c "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))" || { \
	  echo "bsfast: $(PYTHON) is not Python 3.10 to 3.13, which the pinned packages need;" \
	    "name another, for example: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c "import ensurepip, venv" 2>/dev/null || { \
	  echo "bsfast: $(PYTHON) cannot make virtual environments; install them" \
	    "(Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade "pip>=24"
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	$(BIN)/python -m pip install -q --no-deps torchvision==0.28.0
	touch $@

$(VENV)/.built: $(VENV)/.installed pyproject.toml setup.py CMakeLists.txt $(SOURCES)
	BSFAST_WERROR=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	touch $@
