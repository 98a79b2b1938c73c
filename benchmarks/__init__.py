"""Benchmarks: ``python -m benchmarks.run``, then ``python -m benchmarks.report``."""

import os

# Peak memory on a CPU comes from torch.profiler, which otherwise writes lines of its own.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
