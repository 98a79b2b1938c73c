"""Examples: ``python -m examples.finetune_digits``."""
