"""What ``finetune_digits``, ``ablate`` and ``continual`` share."""
