"""Which kernels ``auto`` may use: tests on known answers, and the verdicts they leave."""
