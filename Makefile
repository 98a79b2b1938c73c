# Two commands set everything up on a fresh machine: `make demo` and `make test`.
# The environment is .venv; PYTHON names the interpreter that makes it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench report gpu-check clean

demo: $(VENV)/ready
	$(BIN)/python -m examples.finetune_digits $(ARGS)

# Twice: once as users run it, once with the Triton kernels in their interpreter.
test: $(VENV)/ready
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto $(ARGS)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/ready
	$(BIN)/python -m benchmarks.suite $(ARGS)

report: $(VENV)/ready
	$(BIN)/python -m benchmarks.report $(ARGS)

# Installs nothing: uses PYTHON and what it has.
gpu-check:
	@command -v $(PYTHON) >/dev/null || { echo "gpu-check: there is no interpreter $(PYTHON): name" \
		"another with PYTHON="; exit 2; }
	@$(PYTHON) -c "import torch" || { echo "gpu-check needs a GPU and torch, and $(PYTHON) cannot" \
		"import torch: name another interpreter with PYTHON="; exit 2; }
	$(PYTHON) -m benchmarks.gpu_check

clean:
	rm -rf $(VENV) build rift_kernels/_C*.so *.egg-info demo ablations continual \
		.pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -exec rm -rf {} +

$(VENV)/ready: pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	@echo "Installing into $(VENV): about 2.5 GB, some minutes"
	$(PYTHON) -m venv $(VENV)
	RIFT_KERNELS_STRICT=1 $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
