# Two commands set everything up on a fresh machine: `make demo` and `make test`.
# The environment is .venv; PYTHON names the interpreter that makes it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench report gpu-check clean

demo: $(VENV)/ready
	$(BIN)/python examples/finetune_digits.py $(ARGS)

test: $(VENV)/ready
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/ready
	$(BIN)/python -m benchmarks.run $(ARGS)

report: $(VENV)/ready
	$(BIN)/python -m benchmarks.report $(ARGS)

# Installs nothing: uses PYTHON and what it has.
gpu-check:
	@$(PYTHON) -c "import torch" 2>/dev/null || { echo "gpu-check needs a GPU and torch, and $(PYTHON) has" \
		"no torch: name another interpreter with PYTHON="; exit 2; }
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu_check

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks demo
	find . -name __pycache__ -type d -exec rm -rf {} +

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
