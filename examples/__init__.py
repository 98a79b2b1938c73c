"""Examples, run from the repository's root: ``python -m examples.finetune_digits``."""
