"""The ``autograd`` executor (executor.py): modules that cannot be traced, as one op (opaque.py)."""
