"""One Plan as two, for two executors: its inner loop, and what is around it. Each is a Plan like any other, and knows nothing of the other.

    around   half 0: the phases before the inner loop; half 1: those after it, and all sums over the tasks
    inside   the inner loop; of a Plan with two entries both halves

What one part makes and the other reads is a result of the one and an input of the other. The sums over the tasks belong to the part that ends last, which so
decides alone which tasks are in them: ``FINITE`` tells it which ones the inner loop has lost (zero, or NaN).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from fastmaml.plan.groups import make_groups
from fastmaml.plan.instructions import Buffer, Instruction, Phase, Plan, Reduction, Ref, Segment
from fastmaml.plan.memory import assign_homes

INNER = "loss.support"  # the inner loop is what makes the support losses, and all that can go with it
FINITE = "finite.inside"


@dataclass(frozen=True)
class Parts:
    """``into``: buffers that the inner loop reads from before it; ``back``: what is read of it afterwards, with the names under which it leaves."""

    around: Plan
    inside: Plan
    into: tuple[str, ...]
    back: dict[str, str]


def divide(plan: Plan, why_not: Callable[[Segment], str | None]) -> Parts:
    """The inner loop with every phase beside it whose segments can go along. ``why_not``: why a segment cannot. Raises NotImplementedError, saying what is in
    the way."""
    reasons = [next((why for name in p.segments if (why := why_not(plan.segments[name]))), None) for p in plan.schedule]
    inner = next((i for i, p in enumerate(plan.schedule) if INNER in _written(plan, [p])), None)
    if inner is None:
        raise NotImplementedError("there is no inner loop")
    if reasons[inner]:
        raise NotImplementedError(reasons[inner])
    first = max((i + 1 for i in range(inner) if reasons[i]), default=0)
    last = min((i for i in range(inner, len(reasons)) if reasons[i]), default=len(reasons))
    return split(plan, first, last)


def split(plan: Plan, first: int, last: int) -> Parts:
    """The phases first .. last - 1 of the schedule, and those around them."""
    before, middle, after = plan.schedule[:first], plan.schedule[first:last], plan.schedule[last:]
    _check_phases(plan, before, middle, after)
    made, kept = _written(plan, middle), _read(plan, middle)
    into = tuple(name for name in plan.buffers if name in _written(plan, before) & kept)
    wanted = _read(plan, after) | {r.source.buffer for r in plan.reductions}
    back = {name: f"{name}.out" for name in plan.buffers if after and name in wanted & made}
    for name in (*into, *back):
        _check_crossing(plan.buffers[name], name in into)
    if {FINITE, f"sum.{FINITE}", *back.values()} & plan.buffers.keys():
        raise NotImplementedError("a buffer has a name that parts of a Plan use")
    buffers, segments = dict(plan.buffers), dict(plan.segments)
    if not after:
        found = _written(plan, before)
        around = _part(plan, before, buffers, segments, (*into, *(name for name in plan.results if name in found)))
        results = [name for name in plan.results if name not in found]
        return Parts(around, _part(plan, middle, _given(buffers, into), segments, results, into, plan.late, plan.reductions), into, {})
    outer = _given(buffers, back) | {FINITE: Buffer(FINITE, home="task"), f"sum.{FINITE}": Buffer(f"sum.{FINITE}", home="meta")}
    phases = [*(replace(p, half=0) for p in before), *(replace(p, half=1) for p in after)]
    results = (*into, *(name for name in plan.results if name not in made))
    around = _part(plan, phases, outer, segments, results, (), (*back, FINITE), (*plan.reductions, Reduction(Ref(FINITE), f"sum.{FINITE}")))
    middle = (*middle, *_hand_over(back, buffers, segments, middle[-1].half))
    results = (*(name for name in plan.results if name in made), *back.values())
    return Parts(around, _part(plan, middle, _given(buffers, into), segments, results, into, plan.late), into, back)


def _written(plan: Plan, phases: Iterable[Phase]) -> set[str]:
    return {ref.buffer for p in phases for s in p.segments for i in plan.segments[s].instructions for ref in i.writes()}


def _read(plan: Plan, phases: Iterable[Phase]) -> set[str]:
    """Also what is the first slot of another buffer."""
    names = {ref.buffer for p in phases for s in p.segments for i in plan.segments[s].instructions for ref in i.reads()}
    return names | {plan.buffers[name].first for name in names if plan.buffers[name].first}


def _check_phases(plan: Plan, before: tuple[Phase, ...], middle: tuple[Phase, ...], after: tuple[Phase, ...]) -> None:
    around = (*before, *after)
    if not before or {s for p in around for s in p.segments} & {s for p in middle for s in p.segments}:
        raise NotImplementedError("nothing comes before the inner loop that has to run elsewhere")
    if after and all(p.scope != "task" for p in after):
        raise NotImplementedError("no phase for each task comes after the inner loop")
    if middle[0].half or middle[-1].half != plan.entries - 1 or _read(plan, around) & set(plan.late):
        raise NotImplementedError("the two halves of the Plan do not meet in its inner loop")
    both = _written(plan, around) & _written(plan, middle)
    if both:
        raise NotImplementedError(f"{min(both)} is written in the inner loop and outside of it")


def _check_crossing(buffer: Buffer, into: bool) -> None:
    """Weights and features cross, and their cotangents."""
    fits = buffer.kind == "real" and not buffer.first and not buffer.columns and buffer.rows != "joint" and not (buffer.rows and buffer.steps)
    if not fits or (buffer.home != "meta" and buffer.steps if into else buffer.home == "meta"):
        what = "of support and query rows together " if buffer.rows == "joint" else ""
        raise NotImplementedError(f"{buffer.name} {what}is needed inside of the inner loop and outside of it")


def _given(buffers: dict[str, Buffer], names: Iterable[str]) -> dict[str, Buffer]:
    """With buffers that another part makes as inputs."""
    return buffers | {name: replace(buffers[name], home="meta" if buffers[name].home == "meta" else "task") for name in names}


def _hand_over(back: dict[str, str], buffers: dict[str, Buffer], segments: dict[str, Segment], half: int) -> Iterable[Phase]:
    """Copies: what has been added to, or lies packed, leaves as an executor's results do."""
    for steps in sorted({buffers[name].steps for name in back}):
        names = [name for name in back if buffers[name].steps == steps]
        buffers.update({back[name]: replace(buffers[name], name=back[name], home="task") for name in names})
        copies = [Instruction("copy_fwd", (Ref(name),), (Ref(back[name]),)) for name in names]
        segment = Segment(f"hand_over.{steps}" if steps else "hand_over", make_groups(copies, buffers))
        segments[segment.name] = segment
        yield Phase((segment.name,), stop=max(steps, 1), half=half)


def _part(
    plan: Plan,
    schedule: Iterable[Phase],
    buffers: dict[str, Buffer],
    segments: dict[str, Segment],
    results: Iterable[str],
    given: tuple[str, ...] = (),
    late: tuple[str, ...] = (),
    reductions: tuple[Reduction, ...] = (),
) -> Plan:
    """What these phases need of a Plan. ``given``, ``late``: inputs that another part makes, or that come with the reverse half."""
    schedule = tuple(schedule)
    segments = {s: segments[s] for p in schedule for s in p.segments}
    used = {ref.buffer for s in segments.values() for i in s.instructions for ref in (*i.reads(), *i.writes())} | {*results, *late}
    used |= {name for r in reductions for name in (r.source.buffer, r.target)}
    used |= {buffers[name].first for name in used if buffers[name].first}
    buffers = {name: b for name, b in buffers.items() if name in used}
    results = tuple(name for name in results if name in used)
    buffers = assign_homes(buffers, segments, schedule, results)
    inputs = (*(name for name in plan.inputs if name in used and name not in late), *given, *late)
    return Plan(plan.name, plan.steps, buffers, segments, schedule, reductions, results, inputs, 2 if late else 1, late)
