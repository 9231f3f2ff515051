"""The ``autograd`` executor: any nn.Module, as the torch executor on a Program with one opaque op ``module``. Not a second sweep.

    module_fwd       z = f(x; leaves), with torch's graph of this one step
    module_bwd       J^T dz
    module_replay    z again, from the same random numbers; z keeps its graph here, and so does dz, the loss's gradient at z
    module_jvp       g = J^T dz with create_graph, then its double backward in direction u: the whole Hessian-vector product, loss included
    module_bwd_jvp   hands that product over

Where the Plan has zt = J u and what the loss makes of it, there is nothing left to compute: zt stands for <g, u>, the loss's tangent, which is what a
learned rate reads. The graph of the last inner step is kept, as its Hessian-vector product follows at once. Double backward, not forward-mode AD: it
exists for every module that the plain training loop already runs.

Buffers (running statistics) are cloned, random numbers replayed, attention goes through its math kernel, tasks run one after another. A module holds its
parameters while it runs, so calls of several threads take turns.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmaml.executors.autograd.opaque import Opaque, inputs_of
from fastmaml.executors.call import Call, Results
from fastmaml.executors.torch.executor import Key, Task, TorchExecutor
from fastmaml.executors.torch.kernels import KERNELS
from fastmaml.plan.instructions import Instruction, Plan, Ref

HALF, KEPT, QUERY_STATE, USED = (("module", i) for i in range(4))  # kept with a task's buffers


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
        size = float(self.y.nan_to_num(0, 0, 0).abs().max())
        if not torch.equal(y, self.y) and not torch.allclose(y, self.y, rtol=1e-3, atol=1e-3 * size, equal_nan=True):
            raise RuntimeError(
                "the model gives other outputs when a step is computed again: its forward keeps state, or draws random numbers outside torch. "
                "Draw them with torch, and keep state in buffers."
            )


@dataclass
class Graph:
    """One forward of the module: the parameters it ran with (those that are asked for require grad) and its output.

    ``gradients``: by number of the parameter, differentiable; of the last inner step alone."""

    parameters: list[Tensor]
    y: Tensor
    gradients: dict[int, Tensor | None] | None = None


class AutogradExecutor(TorchExecutor):
    """Runs Plans whose Program is one opaque module."""

    name = "autograd"

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        own = ("module_fwd", "module_replay", "module_bwd", "module_jvp", "module_bwd_jvp")
        self.run_by = {name: getattr(self, f"_{name}") for name in own}
        for loss in ("cross_entropy", "mse"):
            self.run_by |= {f"{loss}_bwd": self._loss_bwd, f"{loss}_jvp": self._loss_jvp, f"{loss}_bwd_jvp": self._loss_jvp}
        self.wanted: dict[str, set[int]] = {}  # by graph: which parameters some gradient of it is asked for
        self.tangent = False  # whether the loss's tangent is read
        self.operand: dict[str, str] = {}  # leaves that the module reads as they are: the name of the parameter they stand for
        second: set[int] = set()
        for _, instr in plan.instructions():
            if instr.kernel in ("module_fwd", "module_replay"):
                self.function: Opaque = instr.attrs["function"]
                if instr.kernel == "module_fwd":
                    self.operand |= {ref.buffer.removeprefix("theta."): name for ref, name in zip(instr.inputs[1:], instr.attrs["leaves"], strict=True)}
            elif instr.kernel.startswith("module_"):
                refs = [*instr.inputs[2:], *instr.outputs[1:]] if instr.kernel == "module_jvp" else instr.outputs
                wanted = {i % len(instr.attrs["leaves"]) for i, ref in enumerate(refs) if ref is not None}
                self.wanted.setdefault(instr.inputs[0].buffer, set()).update(wanted)
                second |= wanted if instr.kernel == "module_jvp" else set()
            elif instr.kernel in ("cross_entropy_jvp", "mse_jvp"):
                self.tangent = True
        self.second = second

    def forward(self, call: Call) -> Results:
        with self.function.running():
            return super().forward(call)

    def reverse(self, state: Any, given: Mapping[str, Tensor]) -> Results:
        with self.function.running():
            return super().reverse(state, given)

    # ------------------------------------------------------------------------------------------------------- around the sweep
    def _task(self, call: Call, meta: dict[Key, Any], t: int) -> Task:
        task = super()._task(call, meta, t)
        data = call.batch.task(t)
        for name, x in (("x.support", data[0]), ("x.query", data[2])):
            if name in self.plan.buffers:
                task.env[name, 0] = inputs_of(x, self.dtype)
        for key, value in task.env.items():
            if isinstance(value, Tensor) and value.is_inference():  # autograd saves none of these
                task.env[key] = value.clone()
        return task

    def _half(self, call: Call, meta: dict[Key, Any], tasks: list[Task], half: int) -> Results:
        for task in tasks:
            task.env[HALF] = half
        results = super()._half(call, meta, tasks, half)
        used = set().union(*(task.env.get(USED, ()) for task in tasks))
        for name in [n for n in results.values if isinstance(n, str) and n.startswith("grad.")]:
            leaf = name.removeprefix("grad.")
            if leaf in self.operand and self.operand[leaf] not in used and leaf in call.leaves:
                del results.values[name]  # torch gives None where nothing reads a parameter
        return results

    def _run(self, task: Task, instr: Instruction, step: int, replay: Mapping[Key, list[Tensor]]) -> None:
        run = self.run_by.get(instr.kernel)
        if run is None:
            return super()._run(task, instr, step, replay)
        inputs = [None if ref is None else task.env[self._key(ref, step)] for ref in instr.inputs]
        for ref, value in zip(instr.outputs, run(task, instr, step, *inputs), strict=False):
            if ref is not None:
                task.env[self._key(ref, step)] = value

    # ------------------------------------------------------------------------------------------------------- forward
    def _forward(self, wanted: Collection[int], x: Tensor, leaves: Sequence[Tensor]) -> Graph:
        parameters = [leaf.detach().requires_grad_() if i in wanted else leaf.detach() for i, leaf in enumerate(leaves)]
        with torch.set_grad_enabled(bool(wanted)):
            return Graph(parameters, self.function(parameters, x))

    def _again(self, wanted: Collection[int], x: Tensor, leaves: Sequence[Tensor], state: Drawn) -> Graph:
        present = Drawn.now(x)
        state.set(x)
        try:
            graph = self._forward(wanted, x, leaves)
        finally:
            present.set(x)
        state.check(graph.y.detach())
        return graph

    def _module_fwd(self, task: Task, instr: Instruction, step: int, x: Tensor, *leaves: Tensor) -> tuple[Tensor, Graph, Drawn]:
        handle, inner = instr.outputs[1], instr.outputs[2] is not None
        wanted = self.wanted.get(handle.buffer, set()) if handle is not None else set()
        if task.env[HALF] == 1:  # the reverse half computes the query rows again
            state = task.env[QUERY_STATE]
            graph = self._again(wanted, x, leaves, state)
            return graph.y.detach(), graph, state
        keep = inner and step == self.plan.steps - 1 and self.plan.entries == 1
        state = Drawn.now(x)
        graph = self._forward(wanted | self.second if keep else wanted, x, leaves)
        state.y = graph.y.detach()
        if keep:
            task.env[KEPT], graph.gradients = graph, {}
            return graph.y, graph, state
        if self.plan.entries == 2:
            task.env[QUERY_STATE] = state  # of the last forward of the half
        return state.y, graph, state

    def _module_replay(self, task: Task, instr: Instruction, step: int, x: Tensor, *leaves_and_state: Any) -> tuple[Tensor, Graph]:
        *leaves, state = leaves_and_state
        graph = task.env.pop(KEPT, None) or self._again(self.wanted[instr.outputs[1].buffer], x, leaves, state)
        return graph.y, graph

    # ------------------------------------------------------------------------------------------------------- backward
    def _grad(
        self,
        task: Task,
        instr: Instruction,
        ys: Sequence[Tensor | None],
        dys: Sequence[Tensor],
        graph: Graph,
        asked: Sequence[int],
        **options: Any,
    ) -> dict[int, Tensor | None]:
        """By number of the parameter: the gradient of the parameters ``asked`` for, None where nothing reads one."""
        pairs = [(y, d) for y, d in zip(ys, dys, strict=True) if y is not None and y.requires_grad]
        if not pairs or not asked:
            return dict.fromkeys(asked)
        ys, dys = zip(*pairs, strict=True)
        found = torch.autograd.grad(ys, [graph.parameters[i] for i in asked], dys, allow_unused=True, **options)
        out = dict(zip(asked, found, strict=True))
        task.env.setdefault(USED, set()).update(instr.attrs["leaves"][i] for i, g in out.items() if g is not None)
        return out

    @staticmethod
    def _filled(graph: Graph, found: Mapping[int, Tensor | None], refs: Sequence[Ref | None]) -> list[Tensor | None]:
        """In the order of the operands, zeros where nothing reads a parameter."""
        zeros = torch.zeros_like
        return [None if ref is None else zeros(graph.parameters[i]) if found[i] is None else found[i] for i, ref in enumerate(refs)]

    def _module_bwd(self, task: Task, instr: Instruction, step: int, graph: Graph, dy: Tensor) -> list[Tensor | None]:
        asked = [i for i, ref in enumerate(instr.outputs) if ref is not None]
        if graph.gradients and all(i in graph.gradients for i in asked):  # of the Hessian-vector product, which has made them
            return self._filled(graph, {i: None if (g := graph.gradients[i]) is None else g.detach() for i in asked}, instr.outputs)
        if graph.gradients is None:
            return self._filled(graph, self._grad(task, instr, [graph.y], [dy], graph, asked), instr.outputs)
        graph.gradients = self._grad(task, instr, [graph.y], [dy], graph, asked, create_graph=True)
        detached = {i: None if g is None else g.detach() for i, g in graph.gradients.items()}
        return self._filled(graph, detached, instr.outputs)

    def _module_jvp(self, task: Task, instr: Instruction, step: int, graph: Graph, dy: Tensor, *dots: Tensor | None) -> tuple:
        moved = {i: u for i, u in enumerate(dots) if u is not None}
        if graph.gradients is None:
            graph.gradients = self._grad(task, instr, [graph.y], [dy], graph, list(moved), create_graph=True)
        gradients = [graph.gradients[i] for i in moved]
        tangent = None
        if self.tangent:
            pairs = [(g.detach(), u) for g, u in zip(gradients, moved.values(), strict=True) if g is not None]
            tangent = sum((torch.sum(g * u) for g, u in pairs), dy.new_zeros(()))
        asked = [i for i, ref in enumerate(instr.outputs[1:]) if ref is not None]
        product = self._grad(task, instr, gradients, list(moved.values()), graph, asked)
        return tangent, *self._filled(graph, product, instr.outputs[1:])

    def _module_bwd_jvp(self, task: Task, instr: Instruction, step: int, graph: Graph, dyt: None, *product: Tensor | None) -> tuple[Tensor | None, ...]:
        return product

    # ------------------------------------------------------------------------------------------------------- the loss around it
    def _loss_bwd(self, task: Task, instr: Instruction, step: int, *inputs: Any) -> tuple[Tensor]:
        with torch.enable_grad():  # a graph where the module's output has one
            return (KERNELS[instr.kernel](task, instr.attrs, *inputs),)

    def _loss_jvp(self, task: Task, instr: Instruction, step: int, y: Tensor, target: Tensor, weight: Tensor | None, tangent: Any) -> tuple:
        return (tangent,)
