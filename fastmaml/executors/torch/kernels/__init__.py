"""One short function per ``<op>_<mode>``: the readable truth that every other executor is held against.

Each takes (task, attrs, *inputs) and returns its outputs. Absent operands are None and count as zero. Plain torch functions, any dtype and device, no
autograd. ``task`` knows the rows of each extent and the ways. Formulas: x, w, b, y values; dx, dy gradients; a trailing t marks a tangent.
"""

from fastmaml.executors.torch.kernels import activations, images, losses, norms, patches, products, updates, weights
from fastmaml.executors.torch.kernels.registry import KERNELS

__all__ = ["KERNELS", "activations", "images", "losses", "norms", "patches", "products", "updates", "weights"]
