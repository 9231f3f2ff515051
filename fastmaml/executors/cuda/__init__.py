"""The ``cuda`` executor (executor.py): small tasks, one launch for each half; where its kernels come from (nvrtc.py, cubins.py)."""
