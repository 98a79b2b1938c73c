"""The commands of ``python -m rift_kernels``, each in its module."""
