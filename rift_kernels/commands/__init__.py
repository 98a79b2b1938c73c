"""The commands of ``python -m rift_kernels``, a module each."""
