"""The truth of the tests: a Program evaluated with torch's own differentiable functions, and MAML over it by autograd with create_graph."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from inner_sgd import moves

from fastmaml.plan import Arrangement
from fastmaml.program import CLASS_WEIGHT, Loss, Program


def batchnorm(x, gamma, beta, running_mean, running_var, eps, statistics, n_support):
    dims = (0, *range(2, x.dim()))
    rows = x[:n_support] if statistics == "support" and n_support else x
    mean, var = rows.mean(dims), rows.var(dims, unbiased=False)
    if statistics == "running":
        mean, var = running_mean, running_var
    shape = (1, -1, *[1] * (x.dim() - 2))
    y = (x - mean.view(shape)) / (var.view(shape) + eps).sqrt()
    y = y if gamma is None else y * gamma.view(shape)
    return y if beta is None else y + beta.view(shape)


def op_forward(op, a, v, n_support):
    name = op.name
    if name == "linear":
        return F.linear(*v)
    if name == "conv2d":
        t, b, lft, r = a["padding"]
        return F.conv2d(F.pad(v[0], (lft, r, t, b)), v[1], v[2], a["stride"])
    if name == "batchnorm":
        return batchnorm(*v, a["eps"], a["statistics"], n_support)
    if name == "layernorm":
        shape = v[0].shape[v[0].dim() - a["dims"] :]
        gamma = v[0].new_ones(shape) if v[1] is None else v[1]  # torch 2.13's double backward is wrong for a beta without a gamma
        return F.layer_norm(v[0], shape, gamma, v[2], a["eps"])
    if name == "groupnorm":
        gamma = v[0].new_ones(v[0].shape[1]) if v[1] is None else v[1]  # torch's own backward fails for a beta without a gamma
        return F.group_norm(v[0], a["groups"], gamma, v[2], a["eps"])
    if name == "leaky_relu":
        return F.leaky_relu(v[0], a["slope"])
    if name == "elu":
        return F.elu(v[0], a["alpha"])
    if name == "gelu":
        return F.gelu(v[0], approximate=a["approximate"])
    if name == "softplus":
        return F.softplus(v[0], a["beta"], a["threshold"])
    if name in ("relu", "tanh", "sigmoid", "exp"):
        return getattr(torch, name)(v[0])
    if name == "silu":
        return F.silu(v[0])
    if name == "maxpool2d":
        return F.max_pool2d(v[0], a["kernel"], a["stride"], a["padding"])
    if name == "avgpool2d":
        return F.avg_pool2d(v[0], a["kernel"], a["stride"], a["padding"], count_include_pad=a["count_include_pad"])
    if name == "global_avgpool2d":
        return v[0].mean((2, 3))
    if name == "pad2d":
        t, b, lft, r = a["padding"]
        return F.pad(v[0], (lft, r, t, b))
    if name == "add":
        return v[0] + v[1]
    if name == "mul":
        return v[0] * v[1]
    if name == "matmul":
        return v[0] @ v[1]
    if name == "transpose":
        return v[0].T
    if name == "slice":
        return v[0].narrow(a["dim"], a["start"], a["stop"] - a["start"])
    raise AssertionError(name)


def evaluate(program: Program, leaves: dict[str, torch.Tensor], x: torch.Tensor, n_support: int = 0) -> torch.Tensor:
    """The Program's output; ``n_support``: the leading rows that make the statistics in "support" mode (0: all)."""
    values = {leaf.value: leaves[leaf.name] for leaf in program.leaves} | {program.input: x}
    for op in program.ops:
        if op.name == "reshape":
            rows = program.values[op.output].rows
            v = values[op.inputs[0]]
            values[op.output] = v.reshape(-1, *op.attrs["shape"]) if rows else v.reshape(op.attrs["shape"])
        else:
            values[op.output] = op_forward(op, op.attrs, [None if i is None else values[i] for i in op.inputs], n_support)
    return values[program.output]


def loss_of(loss: Loss, logits, y, class_weight=None, ways: int = 0):
    if loss.name == "mse":
        reduction = loss.reduction if isinstance(loss.reduction, str) else "sum"
        out = F.mse_loss(logits, y, reduction=reduction)
    else:
        logits = logits[:, :ways] if ways else logits
        weight = class_weight[: logits.shape[1]] if loss.class_weight else None
        reduction = loss.reduction if isinstance(loss.reduction, str) else "sum"
        out = F.cross_entropy(logits, y, weight, reduction=reduction, label_smoothing=loss.label_smoothing)
    return out if isinstance(loss.reduction, str) else out / loss.reduction


def meta_loss(program: Program, a: Arrangement, leaves, rates, batch, step_weights=None, class_weight=None, task_weights=None, outer=None):
    """Per-task outer losses, differentiable with respect to ``leaves`` and ``rates``."""
    adapted = [leaf.name for leaf in program.leaves if leaf.role == "adapted"]
    losses = []
    for t in range(len(batch)):
        sx, sy, qx, qy = batch.task(t)
        dtype = next(iter(leaves.values())).dtype
        sx, qx = sx.to(dtype), qx.to(dtype)
        if a.loss.name == "mse":
            sy, qy = sy.to(dtype), qy.to(dtype)
        ways = 0 if batch.ways is None else int(batch.ways[t])
        joint = any(op.name == "batchnorm" and op.attrs["statistics"] == "support" for op in program.ops)

        def query(theta, sx=sx, qx=qx, qy=qy, joint=joint, ways=ways):
            full = {**leaves, **theta}
            logits = evaluate(program, full, torch.cat([sx, qx]), len(sx))[len(sx) :] if joint else evaluate(program, full, qx)
            return outer(logits, qy) if outer else loss_of(a.loss, logits, qy, class_weight, ways)

        theta = {name: leaves[name] for name in adapted}
        states, velocity = [theta], {}
        for k in range(a.steps):
            live = {n: v if v.requires_grad else v.clone().requires_grad_() for n, v in theta.items()}
            inner = loss_of(a.loss, evaluate(program, {**leaves, **live}, sx), sy, class_weight, ways)
            grads = torch.autograd.grad(inner, list(live.values()), create_graph=not a.first_order, allow_unused=True)
            found = {n: g.detach() if a.first_order else g for n, g in zip(live, grads, strict=True) if g is not None}
            new = dict(live)
            for n, d in moves(a.optimizer, live, found, velocity).items():
                rate = rates[a.rates[n].name]
                new[n] = live[n] - (rate[k] if a.rates[n].per_step else rate) * d
            theta = new
            states.append(theta)
        if a.query_from is None:
            losses.append(query(theta))
        else:
            losses.append(sum(step_weights[k] * query(states[k]) for k in range(a.query_from, a.steps + 1)))
    return torch.stack(losses)


def meta_gradient(program: Program, a: Arrangement, leaves, rates, batch, task_weights=None, **kw):
    """(losses [tasks], {name: gradient}) by torch.autograd; names of leaves that are not const, and of learned rates."""
    wanted = [leaf.name for leaf in program.leaves if leaf.role != "const"]
    learned = sorted({r.name for r in a.rates.values() if r.learned})
    leaves = {n: v.detach().clone().requires_grad_(n in wanted) for n, v in leaves.items()}
    rates = {n: v.detach().clone().requires_grad_(n in learned) for n, v in rates.items()}
    losses = meta_loss(program, a, leaves, rates, batch, class_weight=leaves.get(CLASS_WEIGHT, kw.pop("class_weight", None)), **kw)
    weights = torch.full_like(losses, 1 / len(losses)) if task_weights is None else task_weights.to(losses)
    inputs = {**{n: leaves[n] for n in wanted}, **{n: rates[n] for n in learned}}
    grads = torch.autograd.grad((losses * weights).sum(), list(inputs.values()), allow_unused=True)
    return losses.detach(), {n: torch.zeros_like(v) if g is None else g for (n, v), g in zip(inputs.items(), grads, strict=True)}


def relative_error(got: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over norm of the truth, all outer parameters together (DESIGN.md, section 5)."""
    diff = sum(((got[n].double() - truth[n].double()) ** 2).sum() for n in truth) ** 0.5
    return float(diff / sum((truth[n].double() ** 2).sum() for n in truth) ** 0.5)
