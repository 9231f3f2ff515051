"""The ``torch`` executor (executor.py): any Plan by the functions of kernels/, the truth that the others are held against."""
