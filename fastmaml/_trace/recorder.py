"""What stands for the values of a Program while a forward runs, and the mode that writes its ops down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fastmaml._trace import layers, pooling  # noqa: F401  (they fill the table of rules)
from fastmaml._trace.rules import QUERIES, UNREAD_GETTERS, VIEWS, Refusal, refusal_of, rule_of
from fastmaml.nn import per_step_buffers, per_step_parameters
from fastmaml.program import Op, ProgramBuilder


class Tracked(torch.Tensor):
    """Stands for one value of the Program while forward runs: shape [n, ...] for samples, dtype, device; no data."""

    value: int
    memory: Memory
    stale: bool = False  # an in-place op through another view changed it

    # requires_grad, so that a custom autograd.Function runs (and is noticed) as in training
    @staticmethod
    def __new__(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tracked:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device, requires_grad=True)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Refusal(f"{func} runs inside compiled code or a custom autograd.Function, where the trace cannot look")


class Memory:
    """The traced tensors that share memory in torch: a tensor and its views. In-place ops must know."""

    def __init__(self, is_input: bool = False) -> None:
        self.is_input = is_input
        self.tensors: list[Tracked] = []


class Missing:
    """Stands for an argument of forward without a default: it may be passed on, not used."""

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "_name", name)

    def __getattr__(self, *args: Any, **kwargs: Any) -> Any:
        name = object.__getattribute__(self, "_name")
        raise Refusal(f"forward uses its argument {name!r}, which has no default to take as a constant")

    __bool__ = __index__ = __int__ = __float__ = __len__ = __iter__ = __contains__ = __getitem__ = __getattr__
    __call__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = __getattr__
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __truediv__ = __neg__ = __getattr__


class Recorder(TorchFunctionMode):
    """Sees every torch function of one forward, refuses it or appends its ops to the Program."""

    def __init__(self, model: nn.Module, input_shape: tuple[int, ...], samples: int, batchnorm: str | None) -> None:
        super().__init__()
        self.samples, self.batchnorm = samples, batchnorm
        self.builder = ProgramBuilder(input_shape)
        self._made: dict[int, Op] = {}
        self._leaves: dict[int, int] = {}
        self._buffers = {id(buffer): (name, buffer) for name, buffer in model.named_buffers()}
        self._per_step_buffers, per_step = per_step_buffers(model), per_step_parameters(model)
        for name, parameter in model.named_parameters():
            role = "outer" if parameter.requires_grad else "const"
            shape = tuple(parameter.shape)
            self._leaves[id(parameter)] = self.builder.leaf(name, shape[1:] if name in per_step else shape, role)
            if name in per_step:
                self.builder.leaves[-1] = replace(self.builder.leaves[-1], per_step=True)
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        norms = [norm for norm in norms if norm.running_mean is not None]
        self.layer_statistics = {id(norm.running_mean) for norm in norms}
        # BatchNorm counts its batches in forward; it shall count copies
        counters = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
        self._counters = {id(counter): counter.clone() for counter in counters}
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        self.dtype, self.device = like.dtype, like.device
        self.input = self._track(self.builder.input, Memory(is_input=True))

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.__name__
        if name == "__get__":
            name = getattr(func.__self__, "__name__", "") or func.__self__.fget.__name__
            if name not in UNREAD_GETTERS:
                return func(*args)
        elif name in QUERIES:
            return func(*args, **kwargs)
        elif name in ("__repr__", "__format__", "__str__") and isinstance(args[0], Tracked):
            return f"<traced tensor {self.builder.values[args[0].value]}>"
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        if tensors and id(tensors[0]) in self._counters:
            counter = self._counters[id(tensors[0])]
            result = func(counter, *args[1:], **kwargs)
            return args[0] if result is counter else result
        in_place = bool(kwargs.pop("inplace", False)) or name in ("__iadd__", "__imul__")
        in_place = in_place or (name.endswith("_") and not name.endswith("__"))
        bind = rule_of(name)
        if bind is None:
            raise Refusal(refusal_of(name))
        if not torch.is_grad_enabled():
            raise Refusal(f"{name} runs without gradient (torch.no_grad, or inside a custom autograd.Function)")
        value = bind(self, args, kwargs)
        return self._assign(tensors[0], value, name) if in_place else self._wrap(value, name, tensors)

    def _track(self, value: int, memory: Memory) -> Tracked:
        tensor = Tracked(self.full_shape(value), self.dtype, self.device)
        tensor.value, tensor.memory = value, memory
        memory.tensors.append(tensor)
        return tensor

    def _wrap(self, value: int, name: str, tensors: list[torch.Tensor]) -> Tracked:
        source = tensors[0]
        shared = isinstance(source, Tracked) and (name in VIEWS or source.value == value)
        return self._track(value, source.memory if shared and name != "clone" else Memory())

    def _assign(self, target: torch.Tensor, value: int, name: str) -> torch.Tensor:
        """An in-place op: ``target`` becomes ``value``; what shares its memory must not be read any more."""
        if not isinstance(target, Tracked):
            raise Refusal(f"{name} changes a parameter or buffer in place")
        if target.memory.is_input:
            raise Refusal(f"{name} changes the input in place")
        if self.full_shape(value) != tuple(target.shape):
            raise Refusal(f"{name} in place changes the shape")
        if value != target.value:
            for other in target.memory.tensors:
                other.stale = other is not target
        target.value = value
        return target

    # what the rules use

    def use(self, tensor: Any) -> int:
        """The value of an operand: a traced tensor, a parameter or a buffer."""
        if isinstance(tensor, Tracked):
            if tensor.stale:
                raise Refusal("a tensor is read after an in-place op on a view of it")
            return tensor.value
        if id(tensor) in self._leaves:
            return self._leaves[id(tensor)]
        if id(tensor) in self._buffers and tensor.is_floating_point():
            name, buffer = self._buffers[id(tensor)]
            per_step = name in self._per_step_buffers
            self._leaves[id(tensor)] = self.builder.leaf(name, tuple(buffer.shape[1:] if per_step else buffer.shape), "const")
            self.builder.leaves[-1] = replace(self.builder.leaves[-1], per_step=per_step)
            return self._leaves[id(tensor)]
        if isinstance(tensor, torch.Tensor):
            what = f"a tensor {list(tensor.shape)} of {tensor.dtype}"
            raise Refusal(f"{what} is no parameter or floating-point buffer of the model (register_buffer)")
        raise Refusal(f"{tensor!r} as an operand: operands are samples, parameters and buffers")

    def op(self, name: str, *inputs: int | None, **attrs: Any) -> int:
        try:
            value = self.builder.op(name, *inputs, **attrs)
        except ValueError as error:
            raise Refusal(str(error)) from error
        self._made[value] = self.builder.ops[-1]
        return value

    def producer(self, value: int) -> Op | None:
        """The op that made the value; None for the input and leaves."""
        return self._made.get(value)

    def is_running(self, tensor: Any) -> bool:
        """Whether these are the running statistics of a layer."""
        return id(tensor) in self.layer_statistics or (isinstance(tensor, Tracked) and self.is_per_step(tensor.value))

    def is_per_step(self, value: int) -> bool:
        return any(leaf.value == value and leaf.per_step for leaf in self.builder.leaves)

    def is_rows(self, value: int) -> bool:
        return self.builder.values[value].rows

    def shape(self, value: int) -> tuple[int, ...]:
        """Of one sample, or of the weight."""
        return self.builder.values[value].shape

    def full_shape(self, value: int) -> tuple[int, ...]:
        """As torch sees it: with the sample axis."""
        return (self.samples, *self.shape(value)) if self.is_rows(value) else self.shape(value)
