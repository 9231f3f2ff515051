"""The torch executor, by which the others are judged, in float64 against torch.autograd with create_graph."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from random_programs import Case, error, gradients, norm, numbers_for, outer_losses, random_case, randoms
from torch import Tensor

import fastmaml.nn as nets
from fastmaml.executors.torch.executor import TorchExecutor
from fastmaml.plan import Arrangement, Rate
from fastmaml.program import Loss, Program, ProgramBuilder
from fastmaml.trace import trace

ZERO = 1e-9  # gradients below are zero to float64's rounding
IMAGE, MINI, LINE = (1, 28, 28), (3, 84, 84), (1,)


def worst_error(case: Case, bound: float) -> float:
    """Error of the gradients, or that of the losses if it is larger.

    Float64 has chaos of its own (a rate that is too large, BN over rows that hardly differ): an error above ``bound``
    may be up to 100 times what the truth moves by when inputs and leaves move by 1e-14, relatively.
    """
    results = TorchExecutor(case.plan()).forward(case.call())
    losses, truth = case.truth()
    if not bool(torch.isfinite(losses).all()):  # it diverges, and must be seen to
        assert torch.equal(results.finite, torch.isfinite(losses))
        return 0.0
    worst = max(
        error({"loss": outer_losses(case, results)}, {"loss": losses}, 1e-12),
        error(gradients(results, truth), truth, ZERO),
    )
    if worst > bound:
        moved = error(case.moved(1e-14).truth()[1], truth, ZERO)
        assert worst <= 100 * moved, f"error {worst:.2g}, conditioning explains {moved:.2g}"
        return 0.0
    return worst


# --------------------------------------------------------------------------------------------------- the reference nets

# net, shape of a sample, whether gamma and beta stay outside the inner loop, steps
NETS = {
    "sinusoid": (nets.SinusoidMLP, LINE, False, (0, 1, 5)),
    "mlp-tanh": (lambda: nets.MLP(5, 8, 8, 3, activation=torch.nn.Tanh), (5,), False, (0, 1, 5)),
    "omniglot-fc": (nets.OmniglotFC, IMAGE, False, (0, 1, 5)),
    "cbfinn-omniglot": (lambda: nets.CbfinnOmniglot(filters=8), IMAGE, True, (0, 1, 5)),
    "cbfinn-mini": (lambda: nets.CbfinnMiniImagenet(filters=4), MINI, True, (0, 1, 2)),
    "dragen-omniglot": (nets.DragenOmniglot, IMAGE, False, (0, 1, 2)),
    "dragen-mini": (lambda: nets.DragenMiniImagenet(filters=4), MINI, False, (0, 1, 2)),
    "l2l-omniglot": (lambda: nets.OmniglotCNN(filters=8), IMAGE, False, (0, 1, 5)),
    "l2l-cnn4": (lambda: nets.CNN4(filters=4, side=32), (3, 32, 32), False, (0, 1, 5)),
    "htymaml": (lambda: nets.HTYMAMLNet(filters=8), IMAGE, True, (0, 1, 5)),
    "pytorch-maml": (lambda: nets.PyTorchMAMLConv(filters=8), IMAGE, True, (0, 1, 5)),
    "higher": (lambda: nets.HigherOmniglot(filters=8), IMAGE, False, (0, 1, 5)),
}


def one_rate(program: Program, **options: object) -> dict[str, Rate]:
    return {leaf.name: Rate("lr", **options) for leaf in program.leaves if leaf.role == "adapted"}


def net_case(name: str, steps: int, first_order: bool) -> Case:
    build, shape, outer_norms, _ = NETS[name]
    torch.manual_seed(0)
    net = build().train()
    program = trace(net, shape).with_roles(lambda leaf: "outer" if outer_norms and ".norm." in leaf else "adapted")
    loss = Loss("mse") if name == "sinusoid" else Loss()
    a = Arrangement(steps=steps, loss=loss, rates=one_rate(program), first_order=first_order)
    case = numbers_for(program, a, 0, [(5, 3), (5, 3)], rate=0.01 if name == "sinusoid" else 0.05)
    parameters = {n: p.detach() + 0.05 * torch.randn_like(p) for n, p in net.named_parameters()}
    return dataclasses.replace(case, leaves={n: parameters[n] for n in case.leaves})


@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize(("name", "steps"), [(n, k) for n in NETS for k in NETS[n][3]])
def test_reference_nets(name: str, steps: int, first_order: bool) -> None:
    assert worst_error(net_case(name, steps, first_order), 1e-11) <= 1e-11


# -------------------------------------------------------------------------------------------------------------- options


def small_program(kind: str, statistics: str = "batch", outer: str = "norm") -> Program:
    """Two layers with batch normalisation: body.*, norm.*, head.*. ``outer``: the layer that is not adapted."""
    b = ProgramBuilder((2, 6, 6) if kind == "conv" else (16,))

    def leaf(name: str, *shape: int) -> int:
        role = "const" if "running" in name else "outer" if name.startswith(outer) else "adapted"
        return b.leaf(name, shape, role)

    if kind == "conv":
        v = b.op("conv2d", 0, leaf("body.w", 3, 2, 3, 3), leaf("body.b", 3), stride=(1, 1), padding=(1, 1, 1, 1))
    else:
        v = b.op("linear", 0, leaf("body.w", 7, 16), leaf("body.b", 7))
    c = b.values[v].shape[:1]
    running = (leaf("norm.running_mean", *c), leaf("norm.running_var", *c)) if statistics == "running" else ()
    v = b.op("batchnorm", v, leaf("norm.gamma", *c), leaf("norm.beta", *c), *running, eps=1e-3, statistics=statistics)
    v = b.op("relu", v)
    if kind == "conv":
        v = b.op("maxpool2d", v, kernel=(2, 2), stride=(2, 2), padding=(0, 0))
        v = b.op("reshape", v, shape=(27,))
    v = b.op("linear", v, leaf("head.w", 4, b.values[v].shape[0]), leaf("head.b", 4))
    return b.build(v)


def rates_of(program: Program, kind: str, learned: bool, per_step: bool) -> dict[str, Rate]:
    adapted = {leaf.name: program.values[leaf.value].shape for leaf in program.leaves if leaf.role == "adapted"}
    if kind == "one":
        return one_rate(program, learned=learned, per_step=per_step)
    return {n: Rate(f"lr.{n}", s if kind == "element" else (), per_step, learned) for n, s in adapted.items()}


OPTIONS = {
    "plain": {},
    "multi-step": {"query_from": 0},
    "multi-step-from-1": {"query_from": 1},
    "multi-step-last": {"query_from": 3},
    "rate-per-step": {"rates": ("one", False, True)},
    "rate-per-tensor": {"rates": ("tensor", False, False)},
    "rate-per-element": {"rates": ("element", False, False)},
    "learned-rate": {"rates": ("one", True, False)},
    "learned-rate-per-step": {"rates": ("one", True, True)},
    "learned-per-tensor": {"rates": ("tensor", True, False)},
    "learned-per-tensor-and-step": {"rates": ("tensor", True, True)},
    "learned-per-element": {"rates": ("element", True, False)},
    "learned-per-element-and-step": {"rates": ("element", True, True)},
    "learned-multi-step": {"rates": ("one", True, True), "query_from": 0},
    "class-weight": {"loss": Loss(class_weight=True)},
    "class-weight-smoothing": {"loss": Loss(class_weight=True, label_smoothing=0.2)},
    "label-smoothing": {"loss": Loss(label_smoothing=0.1)},
    "sum": {"loss": Loss(reduction="sum")},
    "divisor": {"loss": Loss(reduction=5.0)},
    "divisor-class-weight": {"loss": Loss(reduction=5.0, class_weight=True, label_smoothing=0.1)},
    "mse": {"loss": Loss("mse")},
    "mse-sum": {"loss": Loss("mse", "sum")},
    "mse-divisor": {"loss": Loss("mse", 5.0)},
    "running": {"statistics": "running"},
    "support": {"statistics": "support"},
    "factored": {"support_rows": 7},
    "factored-learned": {"support_rows": 7, "rates": ("one", True, True)},
    "factored-per-tensor": {"support_rows": 7, "rates": ("tensor", True, False)},
    "factored-multi-step": {"support_rows": 7, "query_from": 0},
    "factored-support": {"support_rows": 7, "statistics": "support"},
    "support-multi-step": {"statistics": "support", "query_from": 0},
    "task-weights": {"task_weights": torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)},
    "ways": {"ways": [2, 4, 3]},
    "one-row": {"sizes": [(1, 1)]},
    "outer-body": {"outer": "body"},
    "outer-head": {"outer": "head"},
    "outer-weights": {"outer": ("body.w", "head.w")},
}


def option_case(kind: str, first_order: bool, memory: str, option: str) -> Case:
    options = dict(OPTIONS[option])
    program = small_program(kind, options.pop("statistics", "batch"), options.pop("outer", "norm"))
    rates = rates_of(program, *options.pop("rates", ("one", False, False)))
    sizes, ways = options.pop("sizes", [(5, 4), (3, 2), (7, 1)]), options.pop("ways", None)
    task_weights = options.pop("task_weights", None)
    a = Arrangement(steps=3, rates=rates, first_order=first_order, memory=memory, **options)
    case = numbers_for(program, a, 1, sizes, ways, rate=0.2, positive=("norm.running_var",))
    return dataclasses.replace(case, task_weights=task_weights)


@pytest.mark.parametrize("memory", ["constant", "fast"])
@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("option", OPTIONS)
def test_options(option: str, kind: str, first_order: bool, memory: str) -> None:
    assert worst_error(option_case(kind, first_order, memory, option), 1e-11) <= 1e-11


def run_halves(executor, case: Case, outer, dtype: torch.dtype = torch.float64) -> tuple[Tensor, dict[str, Tensor]]:
    """(losses [tasks], gradients) of the mean over the tasks of a torch function (logits, query_y)."""
    call = case.call(dtype, total=True, task_weights=None)
    forward = executor.forward(call)
    logits = [v.clone().requires_grad_() for v in forward.values["logits"].split(case.batch.query_sizes)]
    losses = torch.stack([outer(z, case.batch.task(t)[3]) for t, z in enumerate(logits)])
    dlogits = torch.autograd.grad(losses.mean(), logits)
    return losses.detach(), executor.reverse(forward.state, {"dlogits": torch.cat(dlogits)}).values


def focal(z: Tensor, y: Tensor) -> Tensor:
    p = z.softmax(1)
    return F.cross_entropy(z, y) + ((1 - p) ** 2 * p.log()).mean() - 0.1 * z.sin().sum()


@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize(
    "option", ["plain", "learned-per-element", "learned-rate", "support", "running", "outer-body", "factored-learned"]
)
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_two_halves_around_a_torch_loss(kind: str, option: str, first_order: bool) -> None:
    case = option_case(kind, first_order, "constant", option)
    losses, truth = case.truth(outer=focal)
    got, values = run_halves(TorchExecutor(case.plan(entry="halves")), case, focal)
    assert torch.allclose(got, losses, rtol=1e-12)
    assert error({n: values[f"grad.{n}"] for n in truth}, truth, ZERO) <= 1e-11


# ------------------------------------------------------------------------------------------------------ random Programs


@pytest.mark.parametrize(("conv", "count"), [(False, 200), (True, 130)], ids=["linear", "conv"])
def test_random_programs(conv: bool, count: int) -> None:
    errors = [worst_error(random_case(rng, conv), 1e-10) for rng in randoms(count)]
    assert sorted(errors)[len(errors) // 2] <= 1e-13


def test_random_halves() -> None:
    for rng in randoms(40):
        case = dataclasses.replace(random_case(rng, loss=Loss(), query_from=None), task_weights=None)
        losses, truth = case.truth(outer=focal)
        own = {leaf.name for leaf in case.program.leaves if leaf.home == "task"}
        truth = {n: v / len(losses) if n in own else v for n, v in truth.items()}  # the mean over the tasks is in dlogits
        _, values = run_halves(TorchExecutor(case.plan(entry="halves")), case, focal)
        assert error({n: values.get(f"grad.{n}", torch.zeros_like(v)) for n, v in truth.items()}, truth, ZERO) <= 1e-9


@pytest.mark.parametrize("role", ["outer", "const"])
def test_leaves_of_a_task_that_are_not_adapted(role: str) -> None:
    b = ProgramBuilder((3,))
    mask, w = b.leaf("mask", (2, 3), role, "task"), b.leaf("w", (2, 3), "outer")
    program = b.build(b.op("linear", 0, b.op("mul", w, mask), b.leaf("b", (2,), "adapted")))
    a = Arrangement(steps=1, loss=Loss("mse"), rates={"b": Rate("lr")})
    assert worst_error(numbers_for(program, a, 0, [(3, 2), (3, 2)]), 1e-11) <= 1e-11


def test_factored_layer_behind_a_reshape() -> None:
    b = ProgramBuilder((2, 8))
    x = b.op("reshape", 0, shape=(16,))
    program = b.build(b.op("linear", x, b.leaf("w", (3, 16), "adapted")))
    a = Arrangement(steps=1, rates={"w": Rate("lr")}, support_rows=4)
    assert worst_error(numbers_for(program, a, 0, [(4, 2), (3, 2)]), 1e-11) <= 1e-11


# ----------------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("option", ["plain", "learned-per-tensor", "multi-step", "support", "factored-learned"])
def test_finite_differences(kind: str, option: str) -> None:
    """Independent of autograd: the loss of a Plan without gradients, at leaves and rates a little to each side."""
    case = option_case(kind, False, "constant", option)
    executor, gradient = (
        TorchExecutor(case.plan(entry="evaluate")),
        TorchExecutor(case.plan()).forward(case.call()).values,
    )
    generator = torch.Generator().manual_seed(0)
    call, direction, eps = case.call(), {}, 1e-6
    names = [n.removeprefix("grad.") for n in gradient if isinstance(n, str) and n.startswith("grad.")]
    for name in names:
        v = call.leaves[name] if name in call.leaves else call.rates[name]
        direction[name] = torch.randn(v.shape, generator=generator, dtype=v.dtype)

    def loss(sign: int) -> float:
        def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {n: v + sign * eps * direction[n] if n in direction else v for n, v in tensors.items()}

        results = executor.forward(dataclasses.replace(call, leaves=moved(call.leaves), rates=moved(call.rates)))
        return float(outer_losses(case, results).mean())

    slope = (loss(1) - loss(-1)) / (2 * eps)
    expected = float(sum((gradient[f"grad.{n}"] * direction[n]).sum() for n in names))
    assert abs(slope - expected) <= 1e-6 * max(abs(expected), 1e-2)


@pytest.mark.parametrize("memory", ["constant", "fast"])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_the_hessian_is_symmetric(kind: str, memory: str) -> None:
    """With one step gradient = u - lr H u, where u is the outer gradient: what the first-order Plan returns."""
    case = option_case(kind, False, memory, "plain")
    case = dataclasses.replace(
        case, arrangement=dataclasses.replace(case.arrangement, steps=1), batch=case.batch.select(0)
    )
    second, first = (TorchExecutor(case.plan(entry="halves", first_order=order)) for order in (False, True))
    adapted = [f"grad.{leaf.name}" for leaf in case.program.leaves if leaf.role == "adapted"]

    def both(seed: int) -> tuple[Tensor, Tensor]:
        """u and lr H u."""
        d = torch.randn(
            case.batch.query_sizes[0], 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        full, u = (
            torch.cat([e.reverse(e.forward(case.call(total=True)).state, {"dlogits": d}).values[n].flatten() for n in adapted])
            for e in (second, first)
        )
        return u, u - full

    (u, hu), (v, hv) = both(1), both(2)
    assert float(hu.norm()) > 1e-4 * float(u.norm())
    assert abs(float(u @ hv - v @ hu)) <= 1e-12 * float(u.norm() * hv.norm())


def recorded(results) -> dict:
    return {key: value for key, value in results.values.items() if isinstance(key, tuple)}


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_replay_gives_the_same_bits(kind: str) -> None:
    case = option_case(kind, False, "constant", "multi-step")
    executor = TorchExecutor(case.plan(record_masks=True))
    first = executor.forward(case.call(record=True))
    again = executor.forward(case.call(replay=recorded(first)))
    steps = case.arrangement.steps
    decisions = (2 if kind == "conv" else 1) * (steps + steps + 1)  # ReLU and pool: each support pass, each query pass
    assert len(recorded(first)) == decisions
    for name, value in first.values.items():
        if isinstance(name, str):
            assert torch.equal(value, again.values[name]), name


def test_replayed_masks_are_obeyed() -> None:
    """With every mask open a ReLU network is the linear one."""
    case = option_case("linear", False, "constant", "plain")
    executor = TorchExecutor(case.plan(record_masks=True))
    masks = {key: [torch.ones_like(m) for m in value] for key, value in recorded(executor.forward(case.call())).items()}
    open_relu = {"name": "leaky_relu", "attrs": {"slope": 1.0}}
    ops = tuple(dataclasses.replace(op, **open_relu) if op.name == "relu" else op for op in case.program.ops)
    linear = dataclasses.replace(case, program=dataclasses.replace(case.program, ops=ops))
    _, truth = linear.truth()
    assert norm(truth) > 1e-3
    assert error(gradients(executor.forward(case.call(replay=masks)), truth), truth, ZERO) <= 1e-11
