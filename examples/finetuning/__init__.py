"""Modules shared by ``finetune_vit`` and ``finetune_text``."""
