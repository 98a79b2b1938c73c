"""What runs on a GPU alone: ``make gpu-check``, compiling for it elsewhere, and their tests."""
