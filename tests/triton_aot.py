"""Compiles the kernels of launches for a GPU that is not there, and reads what they take: for test_triton_compile.py."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8"}


def signature(launch: Any) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], list]]:
    """(types, constants, what is divisible by 16) of the arguments, as Triton specialises a launch."""
    types, constants, attrs = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            types[parameter.name], constants[i,] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[parameter.name] = TYPES[value.dtype]
            attrs[i,] = [["tt.divisibility", 16]]
        else:
            types[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                attrs[i,] = [["tt.divisibility", 16]]
    return types, constants, attrs


def binary_of(launch: Any, capability: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, constants, attrs = signature(launch)
    source = ASTSource(launch.kernel, types, constants, attrs)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)


def compiled(launch: Any, capability: int) -> dict[str, int]:
    """Bytes and registers: REG, STACK, LOCAL (of cuobjdump), shared."""
    import triton

    binary = binary_of(launch, capability)
    dump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(binary.asm["cubin"])
        said = subprocess.run([dump, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    usage = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    return usage | {"shared": binary.metadata.shared}
