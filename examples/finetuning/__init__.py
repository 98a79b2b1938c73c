"""What ``finetune_vit`` and ``finetune_text`` share."""
