"""The ``triton`` executor (executor.py): a Plan becomes launches (lowering.py, by the rules of rules/) of the kernels in fastmaml.kernels."""
