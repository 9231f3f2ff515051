"""Triton kernels, imported as ``fastmaml.kernels``: one module per op, ``<op>.py``, holding all of its modes.

They come with the GPU executors. A module here imports torch and triton only, never fastmaml, so that a kernel can be
read, tested and timed alone; importing this package imports neither.
"""
