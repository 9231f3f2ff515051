"""The one sweep over inner steps and back: a Program and an Arrangement become a Plan.

    prologue   what does not depend on the adapted leaves: weight expressions once per meta-iteration, frozen layers once per task
    begin      theta_0 and the inner optimizer's state, where these do not begin as the leaves are
    k = 0..K-1 gradient at theta_k on the support rows; theta_{k+1} = update(theta_k, g_k, rate_k)
    query      outer loss at theta_K (with multi-step losses at every step); theta_bar = its gradient, zeta_bar = that of every other leaf
    k = K-1..0 u = cotangent of g_k; HVP in direction u: theta_bar += H_theta,theta u, zeta_bar += H_zeta,theta u; rate gradients
    epilogue   the prologue's reverse; sums over tasks

Where one scalar rate serves all adapted leaves the direction is theta_bar itself and the rate scales what is accumulated; its own gradient is then
the loss tangent of the HVP. Any other rate reads the stored g_k. ``notes/sweep_check`` style mathematics: Finn et al. 2017; Pearlmutter 1994.
"""

from __future__ import annotations

from dataclasses import replace

from fastmaml.optimizers import ImplicitGradient
from fastmaml.plan.arrangement import Arrangement
from fastmaml.plan.epilogue import Epilogue
from fastmaml.plan.groups import make_groups
from fastmaml.plan.implicit import Implicit
from fastmaml.plan.inner import Inner
from fastmaml.plan.instructions import Phase, Plan, Segment
from fastmaml.plan.memory import assign_homes
from fastmaml.plan.outer import Outer
from fastmaml.plan.patches import statistics_from_patches
from fastmaml.plan.pooling import pool_first
from fastmaml.plan.reassociate import reassociate
from fastmaml.plan.reverse import Reverse
from fastmaml.plan.rewrite import STATE, factor_first_layers
from fastmaml.plan.tidy import live, unkept
from fastmaml.program import Program


def build_plan(program: Program, arrangement: Arrangement) -> Plan:
    """The Plan of one meta-iteration. Raises ValueError where no adapted leaf reaches the output."""
    program = pool_first(program)
    if arrangement.support_rows and arrangement.steps and arrangement.entry in ("train", "halves", "evaluate"):
        program = reassociate(program, arrangement.support_rows)
        factors = arrangement.meta_gradient == "unrolled" and arrangement.optimizer.linear
        scalar = {name: rate.shape == () and factors for name, rate in arrangement.rates.items()}
        program, factored = factor_first_layers(program, scalar, arrangement.support_rows)
        states = {f.weight + STATE: arrangement.rates[f.weight] for f in factored}
        arrangement = replace(arrangement, rates={**arrangement.rates, **states})
    if arrangement.steps and arrangement.entry != "predict":
        program = statistics_from_patches(program, arrangement.entry, arrangement.steps, _products(arrangement))
    return _Sweep(program, arrangement).build()


def _products(a: Arrangement) -> int:
    """How many Hessian-vector products there are."""
    if a.entry not in ("train", "halves") or a.meta_gradient == "reptile":
        return 0
    if isinstance(a.meta_gradient, ImplicitGradient):
        return a.meta_gradient.cg_steps
    return 0 if a.first_order else a.steps


class _Sweep(Inner, Outer, Reverse, Implicit, Epilogue):
    """The segments in the order of the schedule."""

    def build(self) -> Plan:
        self._inputs()
        self._prologue()
        if self.steps:
            self._gradient()
            self.segments["update"] = self.update.forward()
        if self.a.entry == "adapt":
            for leaf in self.adapted:
                self._result(f"adapted.{leaf.name}", self.program.values[leaf.value].shape, "finish", self._theta(leaf.name))
        elif self.a.entry == "halves":
            self._query("query", gradients=False)
            self._query("query_reverse", gradients=True)
        else:
            self._query("query", gradients=self.unrolls or (self.trains and self.a.meta_gradient != "reptile"))
            if self.a.query_from is not None and self.steps:
                self._query("query_step", gradients=self.trains)
        if self.trains:
            if self.second_order or (self.steps and self.unrolls and self.update.has_reverse):
                self._reverse()
            if self.implicit:
                self._implicit()
            if self.a.meta_gradient == "reptile":
                self._reptile()
            self._epilogue()
        return self._assemble()

    def _schedule(self) -> list[Phase]:
        k, first = self.steps, self.a.query_from
        half = 1 if self.a.entry == "halves" else 0
        back = ("update_bwd", "hvp")
        phases = [Phase(("prologue_meta",), "meta"), Phase(("prologue_batch",), "batch"), Phase(("prologue",)), Phase(("begin",))]
        phases.append(Phase(("gradient", "update"), start=0, stop=k))
        phases.append(Phase(("query",), start=k, stop=k + 1))
        phases.append(Phase(("reptile",), start=k, stop=k + 1))
        phases.append(Phase(("query_reverse",), start=k, stop=k + 1, half=half))
        phases += self._implicit_phases(half) if self.implicit else []
        if first is None:
            phases.append(Phase(back, start=k - 1, stop=-1, stride=-1, half=half))
        else:  # at each step back the query loss of theta_k joins in
            phases.append(Phase((*back, "query_step"), start=k - 1, stop=first - 1, stride=-1, half=half))
            phases.append(Phase(back, start=min(first, k) - 1, stop=-1, stride=-1, half=half))
        phases.append(Phase(("epilogue",), half=half))
        phases.append(Phase(("finish",), start=k, stop=k + 1, half=half))
        phases.append(Phase(("epilogue_batch",), "batch", half=half))
        phases.append(Phase(("epilogue_meta",), "meta", half=half))
        return phases

    def _assemble(self) -> Plan:
        results = list(self.results)
        if self.a.record_masks:
            results += [b.name for b in self.buffers.values() if b.kind in ("mask", "index") and not b.name.startswith("hvp.")]
        reductions = tuple(getattr(self, "reductions", ()))
        self.segments = live(self.segments, results, reductions)
        schedule = []
        for phase in self._schedule():
            names = tuple(name for name in phase.segments if self.segments.get(name))
            if names and len(phase.steps()):
                schedule.append(Phase(names, phase.scope, phase.start, phase.stop, phase.stride, phase.half))
        scheduled = {name for phase in schedule for name in phase.segments}
        segments = {
            name: Segment(name, make_groups(instructions, self.buffers))
            for name, instructions in self.segments.items()
            if name in scheduled
        }
        used = {ref.buffer for s in segments.values() for i in s.instructions for ref in (*i.reads(), *i.writes())}
        used |= {b.first for b in self.buffers.values() if b.name in used and b.first}
        used |= {name for r in reductions for name in (r.source.buffer, r.target)}
        results = [name for name in results if name in used]
        buffers = {name: b for name, b in self.buffers.items() if name in used}
        buffers = assign_homes(unkept(buffers, segments, results), segments, schedule, results)
        inputs = tuple(name for name in self.inputs if name in used)
        entries = 2 if self.a.entry == "halves" else 1
        late = tuple(name for name in inputs if name == "dlogits")
        return Plan(self.a.entry, self.steps, buffers, segments, tuple(schedule), reductions, tuple(results), inputs, entries, late)
