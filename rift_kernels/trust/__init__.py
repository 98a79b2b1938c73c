"""Which kernels ``auto`` may use: those that passed a test on known answers."""
