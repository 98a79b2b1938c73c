"""``make gpu-check``, compiling for it on another machine, and their tests.

Only test_gpu.py needs a GPU.
"""
