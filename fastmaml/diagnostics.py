"""verify: is the meta-gradient right, on the user's own model and tasks, and what does it cost?

The truth is torch's own autograd in float64: a plain MAML loop with create_graph on a copy of the model. Ours, and the
same plain loop in the model's own precision, are held against it. Float32 flips a few ReLU and pooling decisions that
stand within rounding of a tie, and after a flip two gradients differ by more than rounding, for plain torch as for us.
So the flips are counted, and the float64 Plan also runs with our decisions replayed.
"""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmaml import options
from fastmaml.batch import TaskBatch
from fastmaml.counts import check_count
from fastmaml.executors.autograd.opaque import is_opaque
from fastmaml.plain_loop import PlainLoop
from fastmaml.rewritten_loop import RewrittenLoop

BOUND = 3e-5  # of a float32 meta-gradient whose decisions are those of the truth (DESIGN.md, section 5)
MEDIANS = 4  # from this many tasks on
Gradient = Mapping[str, Tensor]


@dataclass(frozen=True)
class Verification:
    """Distances of meta-gradients: norm of the difference over norm of the truth, all trained parameters together.

    error, plain_error                 from float64 autograd: ours, and a plain torch loop in the model's precision
    median_error, plain_median_error   the same task by task, the median (None with fewer than 4 tasks)
    loss_error, plain_loss_error       relative, of the outer loss
    decisions, flips                   ReLU and pooling decisions; how many of ours differ from float64's
    equal_error                        ours from the float64 Plan with our decisions replayed
    plan_error                         the Plan in float64 from float64 autograd: the mathematics without the rounding
    seconds, plain_seconds             of one meta-gradient, medians

    decisions, flips, equal_error and plan_error are None for a module that could not be traced.
    """

    executor: str
    dtype: str
    tasks: int
    steps: int
    error: float
    plain_error: float
    median_error: float | None
    plain_median_error: float | None
    loss_error: float
    plain_loss_error: float
    decisions: int | None
    flips: int | None
    equal_error: float | None
    plan_error: float | None
    seconds: float
    plain_seconds: float

    @property
    def ok(self) -> bool:
        """As near as plain torch within a factor of 2, or wrong by nothing but decisions within rounding of a tie."""
        if self.error <= max(2 * self.plain_error, BOUND):
            return True
        return self.equal_error is not None and max(self.equal_error, self.plan_error) <= BOUND

    @property
    def speedup(self) -> float:
        return self.plain_seconds / self.seconds

    def __str__(self) -> str:
        steps = f"{self.steps} inner step{'' if self.steps == 1 else 's'}"
        tasks = f"{self.tasks} task{'' if self.tasks == 1 else 's'}"
        plain = f"plain {self.dtype} torch: {self.plain_error:.1e}"
        lines = [
            f"verify: {tasks}, {steps}, {self.executor} executor, {self.dtype}",
            f"  agreement  {self.error:.1e} from float64 autograd ({plain})  {'OK' if self.ok else 'NOT OK'}",
        ]
        if self.median_error is not None:
            plain = f"plain torch: {self.plain_median_error:.1e}"
            lines.append(f"  per task   {self.median_error:.1e} in the median ({plain})")
        lines.append(f"  loss       {self.loss_error:.1e} (plain torch: {self.plain_loss_error:.1e})")
        if self.decisions:
            of = f"{self.flips:,} of {self.decisions:,} at ReLUs and poolings"
            lines.append(f"  decisions  {of} differ from float64's")
            if self.flips:
                lines.append(f"             with them replayed in float64: {self.equal_error:.1e}")
        if self.plan_error is not None:
            lines.append(f"  the Plan   {self.plan_error:.1e} from autograd where both run in float64")
        times = f"{_time(self.seconds)}, plain torch loop {_time(self.plain_seconds)}"
        return "\n".join([*lines, f"  time       {times}: {self.speedup:.3g} x as fast"])


def verify(maml: Any, tasks: Any, *, repeats: int = 5) -> Verification:
    """Holds the meta-gradient of ``maml`` on ``tasks`` against float64 autograd; times it against a plain torch loop.

    The truth runs task by task in float64: take few tasks of a large model. Nothing of the user's is changed:
    parameters, ``.grad``, buffers, random state. ``repeats``: of the timing.

    Where a parameterisation rewrites the network, the truth is float64 autograd of the rewritten network (``rewritten_loop.py``).
    Raises NotImplementedError for a mixture of initialisations and for batchnorm="joint", which the plain loop does not know.
    """
    loop = _loop_of(maml)
    batch, repeats = TaskBatch.of(tasks), check_count("repeats", repeats, 1)
    with _undisturbed(maml):
        seeds = options.task_seeds(None, len(batch))
        ours, double = _copy(maml), _copy(maml).double()
        opaque = is_opaque(ours.plan(batch))
        double.backend = "auto" if opaque else "torch"
        double.plan(batch)  # building a Plan may draw random numbers: not between the runs below
        plain, truth = loop(ours, batch, seeds), loop(double, batch.to(torch.float64), seeds)
        state = _random_state(ours)
        out = ours.meta_grad(batch, task_seeds=seeds)
        gradient = _take_gradient(ours)
        _random_state(ours, state)
        sums = _each_task(ours, batch, plain, truth, out.finite.tolist(), seeds)
        fields: dict[str, Any] = dict.fromkeys(("decisions", "flips", "equal_error", "plan_error"))
        if not opaque:
            fields = _decisions(ours, double, batch, seeds, gradient, sums.truth)
        seconds, plain_seconds = _seconds(ours, batch, plain, repeats)
    true_loss = sums.truth_loss or 1.0
    return Verification(
        executor=out.executor,
        dtype=str(plain.dtype).removeprefix("torch."),
        tasks=len(batch),
        steps=ours.inner_steps,
        error=distance(gradient, sums.truth),
        plain_error=distance(sums.plain, sums.truth),
        median_error=statistics.median(sums.errors) if sums.errors else None,
        plain_median_error=statistics.median(sums.plain_errors) if sums.errors else None,
        loss_error=abs(float(out.loss) - sums.truth_loss) / abs(true_loss),
        plain_loss_error=abs(sums.plain_loss - sums.truth_loss) / abs(true_loss),
        **fields,
        seconds=seconds,
        plain_seconds=plain_seconds,
    )


def _loop_of(maml: Any) -> Callable[[Any, TaskBatch, Sequence[int]], PlainLoop]:
    """(maml, batch, seeds) -> the plain loop that it is compared with."""
    p = maml.parameterisation
    rewrites = not p.is_identity or p.kinds or p.has_prologue
    if maml.batchnorm == "joint" or (rewrites and maml.batchnorm == "support"):
        raise NotImplementedError(f"verify compares with a plain loop, which knows no batchnorm={maml.batchnorm!r}{' of a rewritten network' if rewrites else ''}")
    if p.name == "mixture":
        raise NotImplementedError("verify compares with a plain loop of one initialisation, and knows no mixture of them")
    return RewrittenLoop if rewrites else lambda maml, batch, seeds: PlainLoop(maml, batch)


def distance(gradient: Gradient, truth: Gradient) -> float:
    """Norm of the difference over norm of the truth, all parameters together (the difference alone if that is zero)."""
    wrong = sum(float((gradient[name].double() - value.double()).square().sum()) for name, value in truth.items())
    right = sum(float(value.double().square().sum()) for value in truth.values())
    return math.sqrt(wrong / right) if right else math.sqrt(wrong)


# -- comparing ---------------------------------------------------------------------------------------------------------


@dataclass
class _Sums:
    """Means over the tasks, as the outer loss takes them, and the errors task by task."""

    truth: dict[str, Tensor]
    plain: dict[str, Tensor]
    errors: list[float]
    plain_errors: list[float]
    truth_loss: float = 0.0
    plain_loss: float = 0.0


def _each_task(ours: Any, batch: TaskBatch, plain: PlainLoop, truth: PlainLoop, finite: list[bool], seeds: Sequence[int]) -> _Sums:
    sums = _Sums({n: torch.zeros_like(p) for n, p in truth.wanted.items()}, {}, [], [])
    sums.plain = {n: torch.zeros_like(p) for n, p in plain.wanted.items()}
    for t in range(len(batch)):
        if not finite[t]:
            continue  # on_nonfinite="skip"
        state = _random_state(ours)
        true_loss, true = truth.task(t)
        _random_state(ours, state)
        plain_loss, found = plain.task(t)
        sums.truth_loss += true_loss / len(batch)
        sums.plain_loss += plain_loss / len(batch)
        for name in true:
            sums.truth[name] += true[name] / len(batch)
            sums.plain[name] += found[name] / len(batch)
        if len(batch) >= MEDIANS:
            _random_state(ours, state)
            ours.meta_grad(batch.select([t]), task_seeds=[seeds[t]])
            sums.errors.append(distance(_take_gradient(ours), true))
            sums.plain_errors.append(distance(found, true))
    return sums


def _decisions(ours: Any, double: Any, batch: TaskBatch, seeds: Sequence[int], gradient: Gradient, truth: Gradient) -> dict[str, Any]:
    """How many ReLU masks and pooling indices differ from float64's, and the errors of the Plan itself."""
    batch64 = batch.to(torch.float64)
    mine, theirs = _recorded(ours, batch, seeds), _recorded(double, batch64, seeds)
    made, true = mine.results.values, theirs.results.values
    keys = [key for key in true if isinstance(key, tuple)]
    pairs = [(a.to(b), b) for key in keys for a, b in zip(made[key], true[key], strict=True)]
    flips = sum(int((a != b).sum()) for a, b in pairs)
    replay = {key: [a.to(b) for a, b in zip(made[key], true[key], strict=True)] for key in keys}
    replayed = _recorded(double, batch64, seeds, replay) if flips else theirs
    return {
        "decisions": sum(b.numel() for _, b in pairs),
        "flips": flips,
        "equal_error": distance(gradient, _gradients(double, replayed)),
        "plan_error": distance(_gradients(double, theirs), truth),
    }


def _recorded(maml: Any, batch: TaskBatch, seeds: Sequence[int], replay: Mapping | None = None) -> Any:
    """A run that brings its discrete decisions out, or takes those given."""
    return maml._run(batch, "train", record=True, replay=replay, task_seeds=seeds)


def _gradients(maml: Any, ran: Any) -> Gradient:
    names = {id(p): name for name, p in maml.named_parameters()}
    found = {names[id(p)]: g for p, g in maml._gradients(ran, ran.results, maml._trained(ran)) if g is not None and id(p) in names}
    return {name: found.get(name, torch.zeros_like(p)) for name, p in maml.named_parameters() if p.requires_grad}


def _take_gradient(maml: Any) -> Gradient:
    wanted = {name: p for name, p in maml.named_parameters() if p.requires_grad}
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in wanted.items()}
    maml.zero_grad(set_to_none=True)
    return found


def _seconds(ours: Any, batch: TaskBatch, plain: PlainLoop, repeats: int) -> tuple[float, float]:
    """Medians, taken in turns. The plain loop is not charged for adding up its gradients."""
    synchronize = torch.cuda.synchronize if batch.device.type == "cuda" else lambda: None
    times: list[tuple[float, float]] = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        ours.meta_grad(batch)
        synchronize()
        middle = time.perf_counter()
        for t in range(len(batch)):
            plain.task(t)
        synchronize()
        times.append((middle - start, time.perf_counter() - middle))
        ours.zero_grad(set_to_none=True)
    return statistics.median(a for a, _ in times), statistics.median(b for _, b in times)


# -- leaving things as they are ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _undisturbed(maml: Any) -> Iterator[None]:
    """Random states are put back; every operator has a double backward; a fallback is not warned of again."""
    cuda = range(torch.cuda.device_count()) if next(maml.model.parameters()).is_cuda else ()
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="(?s).*autograd executor")
        warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")  # torch's, from mkldnn.flags
        stack.enter_context(torch.random.fork_rng(list(cuda)))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(m, nn.RNNBase) for m in maml.model.modules()):  # the fused ones have none
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


def _copy(maml: Any) -> Any:
    out = copy.deepcopy(maml)
    out.zero_grad(set_to_none=True)
    return out


def _random_state(maml: Any, state: Any = None) -> Any:
    """The state of the generators; given one, sets it."""
    cuda = next(maml.model.parameters()).is_cuda
    if state is None:
        return torch.get_rng_state(), torch.cuda.get_rng_state_all() if cuda else None
    torch.set_rng_state(state[0])
    if cuda:
        torch.cuda.set_rng_state_all(state[1])
    return state


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
