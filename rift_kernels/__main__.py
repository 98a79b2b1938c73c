"""``python -m rift_kernels``: what can run here, and why not."""

from .dispatch import backend_report

print(backend_report())
