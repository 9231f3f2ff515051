"""A network of layers drawn at random, as a Program."""

from __future__ import annotations

import math
import random

from fastmaml.program import ProgramBuilder

ROLES = ("adapted", "adapted", "outer", "const")
ACTIVATIONS = {
    "relu": ({},),
    "leaky_relu": ({"slope": 0.1},),
    "tanh": ({},),
    "sigmoid": ({},),
    "elu": ({"alpha": 1.3},),
    "gelu": ({"approximate": "none"}, {"approximate": "tanh"}),
    "silu": ({},),
    "softplus": ({"beta": 1.5, "threshold": 20.0},),
    "exp": ({},),
}


class Network:
    """Builds one random Program. ``native``: only what the cpu executor runs."""

    def __init__(self, rng: random.Random, conv: bool, native: bool, roles: tuple[str, ...] = ROLES) -> None:
        self.rng, self.roles, self.native = rng, roles, native
        self.statistics = rng.choice(["batch", "support", "running"])
        self.norms = ["batchnorm", "none"] if native and not conv else ["batchnorm", "layernorm", "groupnorm", "none"]
        self.positive: set[str] = set()
        shape = (
            (rng.choice([1, 3]), rng.choice([6, 7]), rng.choice([6, 8])) if conv else (rng.choice([1, 5, 7, 17, 33]),)
        )
        if conv and native:
            sides = [3, 5, 8, 9, 13]
            shape = (rng.choice([1, 2, 3, 16, 17]), rng.choice(sides), rng.choice(sides))
        flat = conv and native and self.chance(0.15)
        self.builder = ProgramBuilder((math.prod(shape),) if flat else shape)
        v = self.builder.op("reshape", 0, shape=shape) if flat else 0
        if conv:
            if native and self.chance(0.15):
                v = self.rng.choice([self.norm, self.activation, self.native_pool])(v)
            v = self.native_images(v) if native else self.images(v)
        for _ in range(rng.randint(0 if conv and native else 1, 3)):
            v = self.layer(v)
        self.outputs = rng.choice([4, 4, 2, 7])
        head = self.leaf((self.outputs, self.shape(v)[0]), "adapted" if self.chance(0.7) else None)
        program = self.builder.build(self.builder.op("linear", v, head, self.leaf((self.outputs,))))
        if all(leaf.role != "adapted" for leaf in program.leaves):
            name = next(leaf.name for leaf in program.leaves if leaf.value == head)
            roles_of = {leaf.name: leaf.role for leaf in program.leaves} | {name: "adapted"}
            program = program.with_roles(roles_of.__getitem__)
        self.program = program

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def shape(self, v: int) -> tuple[int, ...]:
        return self.builder.values[v].shape

    def leaf(self, shape: tuple[int, ...], role: str | None = None) -> int:
        return self.builder.leaf(f"p{len(self.builder.leaves)}", shape, role or self.rng.choice(self.roles))

    def optional(self, shape: tuple[int, ...], p: float) -> int | None:
        return self.leaf(shape) if self.chance(p) else None

    def activation(self, v: int) -> int:
        name = self.rng.choice(list(ACTIVATIONS))
        if name == "exp":
            v = self.builder.op("tanh", v)
        return self.builder.op(name, v, **self.rng.choice(ACTIVATIONS[name]))

    def norm(self, v: int) -> int:
        name, shape, b = self.rng.choice(self.norms), self.shape(v), self.builder
        if name == "batchnorm":
            affine = self.optional(shape[:1], 0.7), self.optional(shape[:1], 0.7)
            running = ()
            if self.statistics == "running":
                running = self.leaf(shape[:1], "const"), self.leaf(shape[:1], "const")
                self.positive.add(b.leaves[-1].name)
            return b.op(name, v, *affine, *running, eps=1e-3, statistics=self.statistics)
        if name == "layernorm":
            dims = self.rng.randint(1, len(shape))
            affine = self.optional(shape[-dims:], 0.7), self.optional(shape[-dims:], 0.7)
            return b.op(name, v, *affine, eps=1e-3, dims=dims)
        if name == "groupnorm":  # a group of one number has no gradient
            groups = [
                g for g in range(1, shape[0] + 1) if shape[0] % g == 0 and (len(shape) > 1 or g < shape[0] or g == 1)
            ]
            affine = self.optional(shape[:1], 0.7), self.optional(shape[:1], 0.7)
            return b.op(name, v, *affine, eps=1e-3, groups=self.rng.choice(groups))
        return v

    def images(self, v: int) -> int:
        b, rng = self.builder, self.rng
        for _ in range(rng.randint(1, 2)):
            out, kernel = rng.choice([2, 3, 4]), (rng.choice([1, 2, 3]), rng.choice([1, 3]))
            w, bias = self.leaf((out, self.shape(v)[0], *kernel)), self.optional((out,), 0.6)
            padding = tuple(rng.choice([0, 1]) for _ in range(4))
            v = b.op("conv2d", v, w, bias, stride=(rng.choice([1, 2]), rng.choice([1, 2])), padding=padding)
            v = self.activation(self.norm(v))
            if min(self.shape(v)[1:]) >= 2:
                v = self.pool(v)
        if rng.random() < 0.2:  # samples that are matrices
            v = b.op("reshape", v, shape=(self.shape(v)[0], self.shape(v)[1] * self.shape(v)[2]))
            v = self.activation(b.op("linear", v, self.leaf((3, self.shape(v)[1])), self.optional((3,), 0.5)))
            return b.op("reshape", v, shape=(self.builder.values[v].numel,))
        if rng.random() < 0.4:
            return b.op("global_avgpool2d", v)
        return b.op("reshape", v, shape=(b.values[v].numel,))

    def pool(self, v: int) -> int:
        b, rng = self.builder, self.rng
        choice = rng.randint(0, 3)
        if choice == 0:
            v = b.op("maxpool2d", v, kernel=(2, 2), stride=(rng.choice([1, 2]), 2), padding=(0, 1))
        if choice == 1:
            v = b.op("avgpool2d", v, kernel=(2, 2), stride=(2, 1), padding=(1, 0), count_include_pad=self.chance(0.5))
        if choice == 2:
            v = b.op("pad2d", v, padding=(1, 0, 0, 2))
        return v if min(self.shape(v)[1:]) >= 3 else b.op("pad2d", v, padding=(1, 1, 1, 1))

    def native_images(self, v: int) -> int:
        """Convolutions of odd sizes, with what comes around them in any order."""
        b, rng = self.builder, self.rng
        for _ in range(rng.randint(1, 3)):
            (c, h, w), before = self.shape(v), v
            if self.chance(0.25) and min(h, w) >= 2:  # as it was, for a residual
                out, kernel, stride, padding = c, *rng.choice([((3, 3), (1, 1), (1, 1, 1, 1)), ((1, 1), (1, 1), (0,) * 4)])
            else:
                out, stride = rng.choice([1, 2, 3, 4, 7, 16, 17, rng.choice([63, 64, 65])]), (rng.choice([1, 1, 2, 3]), rng.choice([1, 1, 2]))
                padding = tuple(rng.choice([0, 1, 1, 2]) for _ in range(4))
                kernel = (
                    min(rng.choice([1, 2, 3, 3, 5]), h + padding[0] + padding[1]),
                    min(rng.choice([1, 2, 3, 3, 4]), w + padding[2] + padding[3]),
                )
            v = b.op("conv2d", v, self.filters(out, c, kernel), self.optional((out,), 0.6), stride=stride, padding=padding)
            after = [self.norm, self.images_activation]
            rng.shuffle(after)
            if min(self.shape(v)[1:]) >= 2:
                after.insert(rng.randint(0, 2), self.native_pool)
            for layer in after:
                v = layer(v)
            if self.shape(v) == self.shape(before) and self.chance(0.6):
                v = b.op("add", v, before)
        if self.chance(0.1):  # the same numbers as other images, which nobody would do
            c, h, w = self.shape(v)
            v = b.op("reshape", v, shape=(w, c, h))
        if rng.random() < 0.35 or b.values[v].numel > 600:
            return b.op("global_avgpool2d", v)
        return b.op("reshape", v, shape=(b.values[v].numel,))

    def images_activation(self, v: int) -> int:
        name = self.rng.choice(["relu", "relu", "leaky_relu", "none", "other"])
        if name == "other":
            return self.activation(v)
        return v if name == "none" else self.builder.op(name, v, **ACTIVATIONS[name][0])

    def native_pool(self, v: int) -> int:
        """Windows that tile, that overlap, that leave the last rows out."""
        b, rng = self.builder, self.rng
        choice, size = rng.randint(0, 8), self.shape(v)[1:]
        whole = {"padding": (0, 0), "kernel": tuple(min(3, n) for n in size)}
        if choice in (0, 1, 2):
            return b.op("maxpool2d", v, kernel=(2, 2), stride=(2, 2), padding=(0, 0))
        if choice == 3:
            return b.op("maxpool2d", v, stride=(rng.choice([1, 2, 4]), rng.choice([2, 3])), **whole)
        if choice == 4:
            return b.op("maxpool2d", v, kernel=(2, 2), stride=(rng.choice([1, 2]), 2), padding=(rng.choice([0, 1]), 1))
        if choice == 5:
            return b.op("maxpool2d", v, kernel=size, stride=size, padding=(0, 0))  # 1 x 1 is left
        if choice == 6:
            return b.op("avgpool2d", v, kernel=(2, 2), stride=(2, rng.choice([1, 2])), padding=(rng.choice([0, 1]), 0), count_include_pad=self.chance(0.5))
        if choice == 7:
            return b.op("pad2d", v, padding=tuple(rng.choice([0, 1, 2]) for _ in range(4)))
        return v

    def filters(self, out: int, into: int, kernel: tuple[int, int]) -> int:
        """A weight of a convolution, a leaf or made of leaves."""
        b, shape = self.builder, (out, into, *kernel)
        kind = self.rng.choice(["leaf"] * 8 + ["mul", "matmul", "reshape", "slice", "add", "tied", "tied"])
        tied = [op.inputs[1] for op in b.ops if op.name == "conv2d" and self.shape(op.inputs[1]) == shape]
        if kind == "tied" and tied:
            return tied[0]
        if kind == "mul":
            return b.op("mul", self.leaf(shape), self.leaf((out, 1, 1, 1)))
        if kind == "matmul":
            return b.op("reshape", b.op("matmul", self.leaf((out, 2)), self.leaf((2, math.prod(shape[1:])))), shape=shape)
        if kind == "reshape":
            return b.op("reshape", self.leaf((out, math.prod(shape[1:]))), shape=shape)
        if kind == "slice":
            return b.op("slice", self.leaf((out, into + 2, *kernel)), dim=1, start=1, stop=into + 1)
        if kind == "add":
            return b.op("add", self.leaf(shape), b.op("exp", self.leaf(kernel)))
        return self.leaf(shape)

    def weight(self, out: int, into: int) -> int:
        b = self.builder
        tied = [op.inputs[1] for op in b.ops if op.name == "linear" and self.shape(op.inputs[1]) == (out, into)]
        kind = self.rng.choice(
            ["leaf", "leaf", "leaf", "leaf", "mul", "matmul", "transpose", "slice", "add", "tied", "tied"]
        )
        if kind == "tied" and tied:
            return tied[0]
        if kind == "mul":
            return b.op("mul", self.leaf((out, into)), self.leaf((out, 1)))
        if kind == "matmul":
            return b.op("matmul", self.leaf((out, 2)), self.leaf((2, into)))
        if kind == "transpose":
            return b.op("transpose", self.leaf((into, out)))
        if kind == "slice":
            return b.op("slice", self.leaf((out + 2, into)), dim=0, start=1, stop=out + 1)
        if kind == "add":
            return b.op("add", self.leaf((out, into)), b.op("exp", self.leaf((into,))))
        return self.leaf((out, into))

    def layer(self, v: int) -> int:
        into = self.shape(v)[0]
        out = self.rng.choice([3, 4, 6, into] if not self.native else [1, 3, 7, 17, 65, into])
        u = self.builder.op("linear", v, self.weight(out, into), self.optional((out,), 0.6))
        u = self.activation(self.norm(u))
        return self.builder.op("add", u, v) if out == into and self.chance(0.5) else u
