# Two commands set everything up on a fresh machine: `make demo` and `make test`.
# The environment is .venv; PYTHON is the interpreter that creates it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The oldest versions that pyproject.toml allows, and the newest NumPy that works with that triton's
# interpreter; all else as in constraints.txt.
OLDEST := torch==2.11.0 triton==3.6.0 numpy==2.3.5 setuptools==81.0.0
OLDEST_VENV := .venv-oldest
# The python3.12 on PATH may be a shim of pyenv that refuses to run.
PYTHON_OLDEST ?= $(firstword $(shell for python in python3.12 ~/.pyenv/versions/3.12.*/bin/python3 \
	$(PYTHON); do $$python -c "" 2> /dev/null && echo $$python; done))

.PHONY: demo test coverage test-oldest test-isa lint bench report gpu-check clean

demo: $(VENV)/ready
	$(BIN)/python -m examples.finetune_digits $(ARGS)

# Twice: once as users run it, once with the Triton kernels in Triton's interpreter.
test: $(VENV)/ready
	$(BIN)/python -m pytest -n auto --dist loadfile $(COVERAGE) $(ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto $(ARGS)

# The same; the first run prints how much of the package it covers.
coverage: COVERAGE = --cov=rift_kernels --cov-report=term:skip-covered
coverage: test

test-oldest: export RIFT_KERNELS_CUDA = 0
test-oldest: $(OLDEST_VENV)/ready
	$(OLDEST_VENV)/bin/python -m pytest -n auto --dist loadfile $(ARGS)
	TRITON_INTERPRET=1 $(OLDEST_VENV)/bin/python -m pytest -n auto $(ARGS)

# Numerical tests with other instructions, and so other rounding, than this processor's own: SSE, AVX2
# and two threads.
NUMERICS := tests/features/test_statistics.py $(addprefix tests/measures/,test_autograd.py \
	test_golden.py test_inputs.py test_matching.py test_matrix_functions.py test_measures.py \
	test_numerics.py test_precision.py test_properties.py)
test-isa: $(VENV)/ready
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE \
		$(BIN)/python -m pytest -n auto $(NUMERICS) $(ARGS)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
		$(BIN)/python -m pytest -n auto $(NUMERICS) $(ARGS)
	RIFT_TEST_THREADS=2 $(BIN)/python -m pytest $(NUMERICS) $(ARGS)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/ready
	for kind in run frontier scaling step; do \
		$(BIN)/python -m benchmarks.$$kind $(ARGS) || failed=1; done; exit $$failed

report: $(VENV)/ready
	$(BIN)/python -m benchmarks.report $(ARGS)

# Installs nothing: uses PYTHON and its packages.
gpu-check:
	@command -v $(PYTHON) >/dev/null || { echo "gpu-check: there is no interpreter $(PYTHON): name" \
		"another with PYTHON="; exit 2; }
	@$(PYTHON) -c "import torch" || { echo "gpu-check needs a GPU and torch, and $(PYTHON) cannot" \
		"import torch: name another interpreter with PYTHON="; exit 2; }
	$(PYTHON) -m tests.gpu.check $(ARGS)

clean:
	rm -rf $(VENV) $(OLDEST_VENV) build rift_kernels/_C*.so *.egg-info demo ablations continual \
		.pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .coverage*
	find . -name __pycache__ -type d -exec rm -rf {} +

$(VENV)/ready: pyproject.toml constraints.txt setup.py $(wildcard csrc/* csrc/*/*)
	@echo "Installing into $(VENV): about 2.5 GB, some minutes"
	$(PYTHON) -m venv $(VENV)
	RIFT_KERNELS_STRICT=1 $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# Without the CUDA kernels, which depend on neither torch nor triton.
$(OLDEST_VENV)/ready: pyproject.toml constraints.txt setup.py Makefile
	@$(PYTHON_OLDEST) -c "import sys; print('Installing $(OLDEST) for Python', \
		sys.version.split()[0], 'into $(OLDEST_VENV): about 5.5 GB, some minutes')"
	$(PYTHON_OLDEST) -m venv $(OLDEST_VENV)
	sed $(foreach pin,$(OLDEST),-e 's/^$(firstword $(subst =, ,$(pin)))==.*/$(pin)/') \
		constraints.txt > $(OLDEST_VENV)/constraints.txt
	$(OLDEST_VENV)/bin/python -m pip install --quiet \
		--constraint $(OLDEST_VENV)/constraints.txt --editable ".[dev]"
	touch $@
