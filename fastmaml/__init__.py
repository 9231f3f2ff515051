"""fastmaml: the drop-in fast backend for MAML and its family.

    maml = fastmaml.MAML(model, inner_lr=0.4, inner_steps=5)
    out = maml(tasks)                     # a TaskBatch, or (support_x, support_y, query_x, query_y)
    out.loss.backward()                   # second-order meta-gradient in .grad of the model's own parameters
"""

from fastmaml import executors as _executors
from fastmaml import functional, methods, nn, parameterisation, tasks
from fastmaml.adapted import AdaptedModel
from fastmaml.batch import TaskBatch
from fastmaml.executors import BackendError
from fastmaml.maml import MAML
from fastmaml.optimizers import SGD, ImplicitGradient
from fastmaml.output import MetaOutput, NonFiniteError
from fastmaml.trace import TraceError, trace

__version__ = "0.1.0"
__all__ = [
    "MAML",
    "SGD",
    "AdaptedModel",
    "BackendError",
    "ImplicitGradient",
    "MetaOutput",
    "NonFiniteError",
    "TaskBatch",
    "TraceError",
    "functional",
    "methods",
    "nn",
    "parameterisation",
    "tasks",
    "trace",
]

if _executors.cpu.executor.IMPORT_ERROR is not None:
    import warnings as _warnings

    _warnings.warn(
        f"fastmaml._cpu is not built ({_executors.cpu.executor.IMPORT_ERROR}): everything runs on the slow torch executor. "
        "In a source tree run: python setup.py build_ext --inplace (or pip install -e .)",
        stacklevel=2,
    )
