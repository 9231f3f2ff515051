"""The CUDA device functions as host code: the tests of the CPU kernels, op by op, on the same odd shapes, with the threads of a block forward, reversed
and shuffled. What works on images is skipped there.

A test here is a test there with one choice of its parameters; every STRIDE-th of them, which still is every function with most of its operands absent
or given.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from types import ModuleType

import pytest
import test_activations
import test_batchnorm
import test_cross_entropy
import test_expression
import test_factored_linear
import test_layernorm
import test_linear
import test_mse
import test_relu
import test_update

_cuda_host = pytest.importorskip("fastmaml._cuda_host", reason="fastmaml._cuda_host is built in a source tree: python setup.py build_ext --inplace")

STRIDE = 9
MODULES = (test_activations, test_batchnorm, test_cross_entropy, test_expression, test_factored_linear, test_layernorm, test_linear, test_mse, test_relu, test_update)
ORDERS = ("forward", "reversed", "shuffled1", "shuffled2")
# what blocks of rows and teams of the CPU do, and a weight that is transposed beforehand: a device reads it by columns
CPU_ONLY = ("test_stats_of_far_rows_in_blocks", "test_teams", "test_transposed_weight")
seen: set[str] = set()


def choices(module: ModuleType) -> Iterator[pytest.param]:
    """(test, its keyword arguments) for the tests of kernels, whose parameters are read off their marks."""
    for name, test in vars(module).items():
        if not name.startswith("test_") or "tier" not in inspect.signature(test).parameters or name in CPU_ONLY:
            continue
        axes = []
        for mark in test.pytestmark:
            if mark.name != "parametrize":
                continue
            names, values = mark.args
            names = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)
            if names != ["tier"]:
                axes.append([dict(zip(names, v if len(names) > 1 else (v,), strict=True)) for v in values])
        for at, parts in enumerate(itertools.product(*axes)):
            arguments = {key: value for part in parts for key, value in part.items()}
            if arguments.get("kind") != "images":
                yield pytest.param(test, arguments, id=f"{module.__name__.removeprefix('test_')}-{name.removeprefix('test_')}-{at}")


CHOICES = [choice for module in MODULES for choice in choices(module)]


@pytest.mark.parametrize(("test", "arguments"), CHOICES[::STRIDE])
def test_as_on_the_cpu(test, arguments: dict, request: pytest.FixtureRequest) -> None:
    order = ORDERS[len(request.node.name) % len(ORDERS)]
    test(tier=f"device {order}", **arguments)
