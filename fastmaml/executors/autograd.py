"""The ``autograd`` executor: any nn.Module, as the torch executor on a Program with one opaque op ``module``. Not a second sweep.

    module_fwd       z = f(x; leaves), with torch's graph of this one step
    module_bwd       J^T dz
    module_replay    z again, from the same random numbers; z keeps its graph here, and so does dz, the loss's gradient at z
    module_jvp       g = J^T dz with create_graph, then its double backward in direction u: the whole Hessian-vector product, loss included
    module_bwd_jvp   hands that product over

So where the Plan has zt = J u and what the loss makes of it, there is nothing left to compute: zt stands for <g, u>, the loss's tangent, which is what a
learned rate reads. Double backward, not forward-mode AD: it exists for every module that the plain training loop already runs.

Buffers (running statistics) are cloned, random numbers replayed, attention goes through its math kernel, tasks run one after another. A module holds its
parameters while it runs, so calls of several threads take turns.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmaml.executors.call import Call, Results
from fastmaml.executors.torch import Key, Task, TorchExecutor
from fastmaml.executors.torch_kernels import KERNELS
from fastmaml.plan.instructions import Instruction, Plan, Ref
from fastmaml.program import Program, ProgramBuilder

_turn = threading.RLock()
QUERY_STATE, USED = ("module.query_state", 0), ("module.used", 0)  # kept with a task's buffers


class Opaque:
    """A module as a function of its parameters, which leaves the module's own state alone. ``batchnorm``: see ``trace``."""

    def __init__(self, model: nn.Module, batchnorm: str | None) -> None:
        self.model = model
        index = {id(p): i for i, p in enumerate(model.parameters())}
        tables = [m._parameters for m in model.modules()]
        self.places = [(table, key, index[id(p)]) for table in tables for key, p in table.items() if p is not None]
        self.buffers = [m._buffers for m in model.modules() if m._buffers]
        self.norms = _norms(model, batchnorm)
        self.recurrent = any(isinstance(m, nn.RNNBase) for m in model.modules())

    def __call__(self, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
        own = [(table, key, table[key]) for table, key, _ in self.places]  # functional_call does the same, ten times slower
        own += [(table, key, b) for table in self.buffers for key, b in table.items()]
        own += [(vars(norm), "training", norm.training) for norm, _ in self.norms]
        try:
            for table, key, i in self.places:
                table[key] = parameters[i]
            for table in self.buffers:
                table.update({key: b.clone() for key, b in table.items() if b is not None})
            for norm, training in self.norms:
                norm.training = training
            return self.model(x)
        finally:
            for table, key, value in own:
                table[key] = value

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """What the module needs to have a double backward, and to be alone."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(_turn)
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if self.recurrent:  # the fused layers of oneDNN and cuDNN have none
                stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            yield


def opaque_program(model: nn.Module, sample: Tensor, batchnorm: str | None) -> Program:
    """A Program with one op for the whole ``model``. ``sample`` [n, ...]: a row of it is run, to learn the shape of the output."""
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("a scripted module hides its parameters: pass the nn.Module that it was made from")
    function, parameters = Opaque(model, batchnorm), dict(model.named_parameters())
    rows = _inputs(sample[[0, -1]], next(iter(parameters.values())).dtype)
    try:
        with function.running(), torch.random.fork_rng([rows.device] if rows.is_cuda else []):
            y = function(list(parameters.values()), rows)
    except Exception as error:
        shape = list(sample.shape[1:])
        raise ValueError(f"the model cannot run on samples of shape {shape} ({sample.dtype}): {type(error).__name__}: {error}") from error
    if not isinstance(y, Tensor) or y.dim() < 2 or len(y) != 2 or not y.is_floating_point():
        got = f"{y.dtype} {list(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"the model returns {got} for 2 samples: expected a tensor [n, outputs] of floating-point numbers")
    builder = ProgramBuilder(tuple(sample.shape[1:]))
    leaves = [builder.leaf(n, tuple(p.shape), "outer") for n, p in parameters.items()]
    return builder.build(builder.op("module", 0, *leaves, function=function, leaves=tuple(parameters), shape=tuple(y.shape[1:])))


def _norms(model: nn.Module, batchnorm: str | None) -> list[tuple[nn.Module, bool]]:
    """The batch normalisations, and whether each takes the statistics of its batch."""
    out = []
    for name, m in model.named_modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            layer, tracked = f"layer {name!r} ({type(m).__name__})", m.running_mean is not None
            if batchnorm == "support":
                raise ValueError(f"batchnorm='support' needs a model that can be traced; here {layer} runs on the autograd executor: choose 'batch' or 'running'")
            if batchnorm == "running" and not tracked:
                raise ValueError(f"batchnorm='running', but {layer} has no running statistics: say batchnorm='batch', or build it with track_running_stats=True")
            if batchnorm is None and tracked and not m.training:
                raise ValueError(f"{layer} is in eval mode and has running statistics: say batchnorm='batch' or batchnorm='running', or call model.train()")
            out.append((m, batchnorm == "batch" or (batchnorm is None and m.training)))
    return out


def _inputs(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Images of bytes become floats; other integers are the model's business (tokens of an embedding)."""
    return x.to(dtype) if x.is_floating_point() or x.dtype is torch.uint8 else x


def is_opaque(plan: Plan) -> bool:
    return any(instr.kernel.startswith("module_") for _, instr in plan.instructions())


@dataclass
class Drawn:
    """The random numbers a forward pass drew, and what it gave."""

    cpu: Tensor
    cuda: Tensor | None
    y: Tensor | None = None

    @classmethod
    def now(cls, x: Tensor) -> Drawn:
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(x.device) if x.is_cuda else None)

    def set(self, x: Tensor) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, x.device)

    def check(self, y: Tensor) -> None:
        if not torch.equal(y, self.y) and not torch.allclose(y, self.y, rtol=1e-3, atol=1e-3 * float(self.y.abs().max()), equal_nan=True):
            raise RuntimeError(
                "the model gives other outputs when a step is computed again: its forward keeps state, or draws random numbers outside torch. "
                "Draw them with torch, and keep state in buffers."
            )


@dataclass
class Graph:
    """One forward of the module: the parameters it ran with (those that are asked for require grad) and its output."""

    parameters: list[Tensor]
    y: Tensor
    product: list[Tensor | None] | None = None


class AutogradExecutor(TorchExecutor):
    """Runs Plans whose Program is one opaque module."""

    name = "autograd"

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.wanted: dict[str, set[int]] = {}  # by graph: which parameters some gradient of it is asked for
        self.tangent = False  # whether the loss's tangent is read
        for _, instr in plan.instructions():
            if instr.kernel in ("module_fwd", "module_replay"):
                self.function: Opaque = instr.attrs["function"]
            elif instr.kernel.startswith("module_"):
                refs = [*instr.inputs[2:], *instr.outputs[1:]] if instr.kernel == "module_jvp" else instr.outputs
                wanted = {i % len(instr.attrs["leaves"]) for i, ref in enumerate(refs) if ref is not None}
                self.wanted.setdefault(instr.inputs[0].buffer, set()).update(wanted)
            elif instr.kernel in ("cross_entropy_jvp", "mse_jvp"):
                self.tangent = True

    def forward(self, call: Call) -> Results:
        with self.function.running():
            return super().forward(call)

    def reverse(self, state: Any, dlogits: list[Tensor]) -> Results:
        with self.function.running():
            return super().reverse(state, dlogits)

    # ------------------------------------------------------------------------------------------------------- around the sweep
    def _task(self, call: Call, meta: dict[Key, Any], t: int) -> Task:
        task = super()._task(call, meta, t)
        data = call.batch.task(t)
        for name, x in (("x.support", data[0]), ("x.query", data[2])):
            if name in self.plan.buffers:
                task.env[name, 0] = _inputs(x, self.dtype)
        for key, value in task.env.items():
            if isinstance(value, Tensor) and value.is_inference():  # autograd saves none of these
                task.env[key] = value.clone()
        return task

    def _half(self, call: Call, meta: dict[Key, Any], tasks: list[Task], half: int) -> Results:
        for task in tasks:
            task.half = half  # type: ignore[attr-defined]
        results = super()._half(call, meta, tasks, half)
        used = set().union(*(task.env.get(USED, ()) for task in tasks))
        for name in [n for n in results.values if isinstance(n, str) and n.startswith("grad.")]:
            leaf = name.removeprefix("grad.")
            if leaf not in used and leaf in call.leaves:
                del results.values[name]  # torch gives None where nothing reads a parameter
        return results

    def _run(self, task: Task, instr: Instruction, step: int, replay: Mapping[Key, list[Tensor]]) -> None:
        run = getattr(self, f"_{instr.kernel}", None)
        if run is None:
            return super()._run(task, instr, step, replay)
        inputs = [None if ref is None else task.env[self._key(ref, step)] for ref in instr.inputs]
        for ref, value in zip(instr.outputs, run(task, instr, *inputs), strict=False):
            if ref is not None:
                task.env[self._key(ref, step)] = value

    # ------------------------------------------------------------------------------------------------------- the module
    def _forward(self, instr: Instruction, x: Tensor, leaves: Sequence[Tensor]) -> Graph:
        handle = instr.outputs[1]
        wanted = self.wanted.get(handle.buffer, ()) if handle is not None else ()
        parameters = [leaf.detach().requires_grad_() if i in wanted else leaf.detach() for i, leaf in enumerate(leaves)]
        with torch.set_grad_enabled(bool(wanted)):
            return Graph(parameters, self.function(parameters, x))

    def _module_fwd(self, task: Task, instr: Instruction, x: Tensor, *leaves: Tensor) -> tuple[Tensor, Graph, Drawn]:
        if task.half and QUERY_STATE in task.env:  # the reverse half computes the query rows again
            graph = self._again(instr, x, leaves, task.env[QUERY_STATE])
            return graph.y.detach(), graph, task.env[QUERY_STATE]
        state = Drawn.now(x)
        graph = self._forward(instr, x, leaves)
        state.y = graph.y.detach()
        if self.plan.entries == 2:
            task.env[QUERY_STATE] = state  # of the last forward of the half
        return state.y, graph, state

    def _module_replay(self, task: Task, instr: Instruction, x: Tensor, *leaves_and_state: Any) -> tuple[Tensor, Graph]:
        *leaves, state = leaves_and_state
        graph = self._again(instr, x, leaves, state)
        return graph.y, graph

    def _again(self, instr: Instruction, x: Tensor, leaves: Sequence[Tensor], state: Drawn) -> Graph:
        present = Drawn.now(x)
        state.set(x)
        try:
            graph = self._forward(instr, x, leaves)
        finally:
            present.set(x)
        state.check(graph.y.detach())
        return graph

    def _vjp(self, task: Task, instr: Instruction, ys: Sequence[Tensor], parameters: Sequence[Tensor], refs: Sequence[Ref | None], dys: Any) -> list:
        """Gradients of the parameters that ``refs`` ask for: zeros where nothing reads a parameter."""
        asked = [i for i, ref in enumerate(refs) if ref is not None]
        ys, dys = zip(*pairs, strict=True) if (pairs := [(y, d) for y, d in zip(ys, dys, strict=True) if y.requires_grad]) else ((), ())
        found = torch.autograd.grad(ys, [parameters[i] for i in asked], dys, allow_unused=True) if ys else [None] * len(asked)
        used, out = task.env.setdefault(USED, set()), [None] * len(refs)
        for i, g in zip(asked, found, strict=True):
            out[i] = torch.zeros_like(parameters[i]) if g is None else g
            if g is not None:
                used.add(instr.attrs["leaves"][i])
        return out

    def _module_bwd(self, task: Task, instr: Instruction, graph: Graph, dy: Tensor) -> list[Tensor | None]:
        return self._vjp(task, instr, [graph.y], graph.parameters, instr.outputs, [dy])

    def _module_jvp(self, task: Task, instr: Instruction, graph: Graph, dy: Tensor, *dots: Tensor | None) -> tuple:
        moved = [(p, u) for p, u in zip(graph.parameters, dots, strict=True) if u is not None]
        grads: Sequence[Tensor | None] = [None] * len(moved)
        if graph.y.requires_grad:
            grads = torch.autograd.grad(graph.y, [p for p, _ in moved], dy, create_graph=True, allow_unused=True)
        pairs = [(g, u) for g, (_, u) in zip(grads, moved, strict=True) if g is not None]
        tangent = sum(torch.sum(g.detach() * u) for g, u in pairs) if self.tangent else None
        product = self._vjp(task, instr, [g for g, _ in pairs], graph.parameters, instr.outputs[1:], [u for _, u in pairs])
        return tangent, *product

    def _module_bwd_jvp(self, task: Task, instr: Instruction, graph: Graph, dyt: None, *product: Tensor | None) -> tuple[Tensor | None, ...]:
        return product

    # ------------------------------------------------------------------------------------------------------- the loss around it
    def _loss_bwd(self, task: Task, instr: Instruction, *inputs: Any) -> tuple[Tensor]:
        with torch.enable_grad():  # a graph where the module's output has one
            return (KERNELS[instr.kernel](task, instr.attrs, *inputs),)

    _cross_entropy_bwd = _mse_bwd = _loss_bwd

    def _loss_jvp(self, task: Task, instr: Instruction, y: Tensor, target: Tensor, weight: Tensor | None, tangent: Any) -> tuple:
        return (tangent,)

    _cross_entropy_jvp = _mse_jvp = _cross_entropy_bwd_jvp = _mse_bwd_jvp = _loss_jvp
