"""Which Triton kernels run an instruction of the Plan, on which operands and grid: one short rule for each ``<op>_<mode>``.

A rule takes (site, attrs, inputs, outputs) and emits launches; operands are Views, absent ones None. Tiles follow from the shape of a layer alone, so that the
results of a task do not depend on the batch that it is in.
"""

from fastmaml.executors.triton.rules import activations, images, losses, norms, patches, products, updates, weights
from fastmaml.executors.triton.site import RULES

__all__ = ["RULES", "activations", "images", "losses", "norms", "patches", "products", "updates", "weights"]
