"""Modules shared by ``finetune_digits``, ``ablate`` and ``continual``."""
