# make demo   venv, install, build, fine-tune the bundled ViT on digits four ways, merge and compare
# make test   the same set-up, then every test
# Neither needs a GPU; with one, both use it. PYTHON=python3.12 picks the interpreter.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)

# One architecture: that of the GPU that is here, else Hopper's (it compiles and links without a GPU).
ifndef TORCH_CUDA_ARCH_LIST
TORCH_CUDA_ARCH_LIST := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -Eo '^[0-9]+\.[0-9]+$$' | head -n 1 | sed 's/^9\.0$$/9.0a/')
ifeq ($(strip $(TORCH_CUDA_ARCH_LIST)),)
TORCH_CUDA_ARCH_LIST := 9.0a
endif
endif

SOURCES := $(shell find csrc build_support alore_ext -type f -not -name '*.so' -not -name '*.pyc' -not -name '_build_record.json')
CXX_FILES := $(shell find csrc benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# Idle OpenMP threads sleep: spinning ones slow each other down several times over where cores are shared.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test install lint format harness clean

demo: install
	$(BIN)/alore-ext finetune

test: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal

install: $(VENV)/.installed

$(VENV)/.torch: .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --constraint .ci/constraints.txt torch torchvision
	touch $@

$(VENV)/.tools: $(VENV)/.torch
	$(BIN)/pip install -q --constraint .ci/constraints.txt setuptools wheel ninja pybind11 numpy ruff clang-format
	touch $@

$(VENV)/.installed: $(VENV)/.tools $(SOURCES) setup.py pyproject.toml
	rm -rf build/lib.*
	PATH="$(abspath $(BIN)):$$PATH" TORCH_CUDA_ARCH_LIST="$(TORCH_CUDA_ARCH_LIST)" MAX_JOBS=$(JOBS) \
	  $(BIN)/pip install -q --no-build-isolation --constraint .ci/constraints.txt ".[demo,dev]"
	$(BIN)/alore-ext info
	touch $@

lint: $(VENV)/.tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# The C++ benchmark harness: kernels alone, no torch and no Python.
harness:
	cmake -S . -B build/harness -DCMAKE_BUILD_TYPE=Release
	cmake --build build/harness --parallel $(JOBS)

clean:
	rm -rf build *.egg-info $(VENV)/.installed
