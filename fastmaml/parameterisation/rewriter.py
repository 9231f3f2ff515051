"""A Program rewritten: leaves become expressions over other leaves, layers are inserted; everything else is copied op by op."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastmaml.parameterisation.base import Kind
from fastmaml.program import Op, Program, ProgramBuilder

NORMS = ("batchnorm", "layernorm", "groupnorm")


@dataclass(frozen=True)
class Rewritten:
    """``program`` as it is planned; ``everything``: the same with the ops that only ``weights`` needs.

    weights    the network's weights after adaptation, {name of the parameter: value of ``everything``}, for a plain module of one task
    constants  leaves that the rewriting brought, by name: functions of dtype and device
    unfolded   why there is no such module, or None
    """

    program: Program
    everything: Program
    weights: Mapping[str, int] = field(default_factory=dict)
    constants: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    unfolded: str | None = None


class Rewriter:
    """What ``Parameterisation.rewrite`` works with. Values are numbers; ``op`` appends ops of ``fastmaml.program.OPS``.

    ``name in r``: whether the network's forward reads this parameter. ``r.leaf(name)``: the value of one of the network's parameters, before any
    substitution; ``r.own(name)``: of one of the parameterisation's leaves; ``r.shape(value)``."""

    def __init__(self, source: Program, prefix: str, kinds: Mapping[str, Kind], own: Mapping[str, tuple[int, ...]]) -> None:
        self.source, self.prefix = source, prefix
        self.builder = ProgramBuilder(source.values[source.input].shape)
        self._leaves: dict[str, int] = {}
        for leaf in source.leaves:
            self._new(leaf.name, source.values[leaf.value].shape, kinds.get(leaf.name, Kind("const")))
            self.builder.leaves[-1] = replace(self.builder.leaves[-1], per_step=leaf.per_step)
        for name, shape in own.items():
            self._new(name, shape, kinds[name])
        self._read = {leaf.name for leaf in source.leaves}
        self._instead: dict[str, int] = {}
        self._by: dict[str, str] = {}
        self._films: dict[int, list[tuple[int, int]]] = {}  # by the source's value
        self._constants: dict[str, Callable[[Tensor], Tensor]] = {}
        self._folded: dict[str, int] = {}
        self._unfolded: str | None = None

    def _new(self, name: str, shape: tuple[int, ...], kind: Kind) -> None:
        value = self.builder.leaf(name, tuple(shape), kind.role, kind.home)
        self.builder.leaves[-1] = replace(self.builder.leaves[-1], learned=kind.learned)
        self._leaves[name] = value

    # ------------------------------------------------------------------------------------------------- reading
    def __contains__(self, name: str) -> bool:
        return name in self._read

    def leaf(self, name: str) -> int:
        return self._leaves[name]

    def own(self, name: str) -> int:
        return self._leaves[f"{self.prefix}.{name}"]

    def shape(self, value: int) -> tuple[int, ...]:
        return self.builder.values[value].shape

    # ------------------------------------------------------------------------------------------------- expressions
    def op(self, name: str, *inputs: int | None, **attrs: Any) -> int:
        return self.builder.op(name, *inputs, **attrs)

    def mul(self, x: int, y: int) -> int:
        return self.op("mul", x, y)

    def add(self, x: int, y: int) -> int:
        return self.op("add", x, y)

    def matmul(self, x: int, y: int) -> int:
        return self.op("matmul", x, y)

    def reshape(self, x: int, *shape: int) -> int:
        return x if self.shape(x) == shape else self.op("reshape", x, shape=shape)

    def matrix(self, x: int) -> int:
        """[out, everything else]."""
        shape = self.shape(x)
        rest = 1
        for n in shape[1:]:
            rest *= n
        return self.reshape(x, shape[0], rest)

    def constant(self, name: str, make: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> int:
        """A leaf with the value ``make(like)``."""
        full = f"{self.prefix}.{name}"
        if full not in self._leaves:
            self._new(full, shape, Kind("const"))
            self._constants[full] = make
        return self._leaves[full]

    # ------------------------------------------------------------------------------------------------- changing the network
    def substitute(self, name: str, value: int) -> None:
        """The network reads ``value`` where it read its parameter ``name``."""
        if self.shape(value) != self.shape(self._leaves[name]):
            raise ValueError(f"{name!r} has shape {list(self.shape(self._leaves[name]))}, what is put in its place {list(self.shape(value))}")
        if self._by.setdefault(name, self.prefix) != self.prefix:
            raise ValueError(f"{name!r} is rewritten by both {self._by[name]} and {self.prefix}: leave it out of one of them, by layers= (of a basis: a mapping of the others; else adapt=)")
        self._instead[name] = value

    def layer(self, weight: str) -> Op:
        """The layer of the source that reads this weight. Raises ValueError where there is not exactly one."""
        value = next((leaf.value for leaf in self.source.leaves if leaf.name == weight), None)
        found = [op for op in self.source.ops if op.name in ("linear", "conv2d") and op.inputs[1] == value]
        if len(found) != 1:
            opaque = any(op.name == "module" for op in self.source.ops)
            why = "the model cannot be traced" if opaque else f"{len(found)} layers read it as their weight"
            raise ValueError(f"parameterisation {self.prefix!r} works on the layer of {weight!r}, but {why}")
        return found[0]

    def film(self, weight: str, gamma: int, beta: int, after_norm: bool) -> None:
        """y becomes gamma * y + beta, channel by channel: y the output of the layer with this weight, or of the normalisation right after it.

        It is a batch normalisation whose mean is 0 and whose variance is 1: all modes of it are there already. Or it goes into the affine of the
        normalisation (``_takes_films``)."""
        layer = self.layer(weight)
        users = [op for op in self.source.ops if layer.output in op.inputs]
        norm = users[0] if after_norm and len(users) == 1 and users[0].name in NORMS else None
        at = layer if norm is None else norm
        self._films.setdefault(at.output, []).append((gamma, beta))
        self._fold(weight, norm, gamma, beta)

    def _fold(self, weight: str, norm: Op | None, gamma: int, beta: int) -> None:
        """For a plain module: gamma and beta go into the layer, or into the affine of its normalisation."""
        names = {leaf.value: leaf.name for leaf in self.source.leaves}
        if norm is None:
            shape = self.shape(self._leaves[weight])
            scale = self.reshape(gamma, shape[0], *[1] * (len(shape) - 1))
            bias = names.get(self.layer(weight).inputs[2], weight.removesuffix("weight") + "bias")
            w, b = weight, bias
            self._folded[w] = self.mul(self._now(w), scale)
        else:
            found = [names.get(v) for v in norm.inputs[1:3]]
            if None in found:
                self._unfolded = f"the normalisation after {weight!r} has no affine that could take the scale and the shift"
                return
            w, b = found
            self._folded[w] = self.mul(self._now(w), gamma)
        self._folded[b] = self.add(self.mul(self._now(b), gamma), beta) if b in self._leaves else beta

    def _now(self, name: str) -> int:
        return self._folded.get(name, self._instead.get(name, self._leaves[name]))

    def _takes_films(self, op: Op, x: int) -> bool:
        """Whether scales and shifts go into the affine of the normalisation that they follow, which saves passes over the samples. Not where the
        normalisation runs before the inner loop: it would become a part of it."""
        moving = {leaf.value for leaf in self.builder.leaves if leaf.role == "adapted" or leaf.per_step}
        for made in self.builder.ops:
            if moving & set(made.inputs):
                moving.add(made.output)
        return op.name in ("batchnorm", "groupnorm") and None not in op.inputs[1:3] and x in moving

    # ------------------------------------------------------------------------------------------------- out
    def finish(self) -> Rewritten:
        source, b = self.source, self.builder
        of = {source.input: b.input}
        of |= {leaf.value: self._instead.get(leaf.name, self._leaves[leaf.name]) for leaf in source.leaves}
        for op in source.ops:
            inputs, films = [None if v is None else of[v] for v in op.inputs], self._films.get(op.output, ())
            if films and self._takes_films(op, inputs[0]):
                for gamma, beta in films:
                    inputs[1:3] = self.mul(inputs[1], gamma), self.add(self.mul(inputs[2], gamma), beta)
                films = ()
            out = b.op(op.name, *inputs, **op.attrs)
            for gamma, beta in films:
                (c,) = self.shape(gamma)
                zeros = self.constant(f"zeros.{c}", lambda like, c=c: like.new_zeros(c), (c,))
                ones = self.constant(f"ones.{c}", lambda like, c=c: like.new_ones(c), (c,))
                out = b.op("batchnorm", out, gamma, beta, zeros, ones, eps=0.0, statistics="running")
            of[op.output] = out
        program = b.build(of[source.output])
        everything = Program(tuple(b.values), tuple(b.leaves), tuple(b.ops), b.input, of[source.output])
        return Rewritten(program, everything, {**self._instead, **self._folded}, self._constants, self._unfolded)


def rewritten(parameterisation: Any, source: Program, kinds: Mapping[str, Kind]) -> Rewritten:
    """``source`` with the roles of ``kinds``, rewritten by the parameterisation."""
    if parameterisation.is_identity:
        leaves = []
        for leaf in source.leaves:
            kind = kinds.get(leaf.name, Kind("const"))
            leaves.append(replace(leaf, role=kind.role, home=kind.home, learned=kind.learned))
        program = replace(source, leaves=tuple(leaves))
        return Rewritten(program, program)
    shapes = {name: tuple(value.shape) for name, value in parameterisation.values().items()}
    r = Rewriter(source, parameterisation.name, kinds, shapes)
    with torch.no_grad():
        parameterisation.rewrite(r)
    return r.finish()
