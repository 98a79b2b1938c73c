"""What ``examples.finetune_vit`` and ``examples.finetune_text`` share."""
