"""LEO, Rusu et al. 2019, against its equations in float64; and that it learns where codes help."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from families import distance
from plain_loop import classify, one_thread  # noqa: F401

from fastmaml import methods

DIM, WAYS, CODE = 12, 3, 4


def made(dtype=torch.float64, **options):
    torch.manual_seed(0)
    leo = methods.LEO(DIM, WAYS, latent=CODE, latent_steps=2, weight_steps=3, latent_lr=0.5, weight_lr=0.1, kl_weight=0.1, encoder_weight=0.2, l2=0.01, orthogonality=0.3, **options)
    return leo.to(dtype)


def tasks_of(dtype=torch.float64):
    x, _, qx, qy = classify(2, 6, 7, (DIM,), WAYS)
    return x.to(dtype), torch.arange(6).remainder(WAYS).expand(2, 6), qx.to(dtype), qy


def truth(leo, tasks, draws):
    """(loss, query loss, gradients, adapted weights); draws: standard normal numbers for the codes and the decoder, or None in eval mode."""
    w = {n: p.detach().double().requires_grad_() for n, p in leo.named_parameters()}
    offset = 1 + torch.tensor((2 / (WAYS + DIM)) ** 0.5 - 1).double()  # a constant of the model, which was built in float32
    query, kl, penalty, ends = 0.0, 0.0, 0.0, []
    for t, (sx, sy, qx, qy) in enumerate(zip(*tasks, strict=True)):
        sx, qx = sx.double(), qx.double()
        h = sx @ w["encoder.weight"].T
        relation = torch.zeros(len(h), 2 * CODE, dtype=torch.float64)
        for i in range(len(h)):
            for j in range(len(h)):
                v = torch.cat([h[i], h[j]])
                for k in (0, 2, 4):
                    v = w[f"relation.{k}.weight"] @ (v if k == 0 else v.relu())
                relation[i] = relation[i] + v / len(h)
        parts = torch.stack([relation[sy == n].mean(0) for n in range(WAYS)])
        mu, sigma = parts[:, :CODE], (parts[:, CODE:].exp() - 1).clamp(min=1e-10)
        kl = kl + (-sigma.log() + (sigma**2 + mu**2) / 2 - 0.5).sum() / 2
        z0, noise = (mu, torch.zeros(WAYS, DIM, dtype=torch.float64)) if draws is None else (mu + sigma * draws[0][t], draws[1][t])

        def decode(z, noise=noise):
            out = z @ w["decoder"].T
            return out[:, :DIM] + (out[:, DIM:].exp() - 1 + offset) * noise

        z = z0
        for _ in range(2):
            z = z - w["latent_lr"] * torch.autograd.grad(F.cross_entropy(sx @ decode(z).T, sy), z, create_graph=True)[0]
        v = decode(z)
        for _ in range(3):
            v = v - w["weight_lr"] * torch.autograd.grad(F.cross_entropy(sx @ v.T, sy), v, create_graph=True)[0]
        query = query + F.cross_entropy(qx @ v.T, qy) / 2
        penalty = penalty + ((z.detach() - z0) ** 2).mean() / 2
        ends.append(v.detach())
    weights = [w["encoder.weight"], *(w[f"relation.{k}.weight"] for k in (0, 2, 4)), w["decoder"]]
    unit = w["decoder"] / w["decoder"].norm(dim=0)
    off = ((unit.T @ unit - torch.eye(CODE, dtype=torch.float64)) ** 2).mean()
    loss = query + leo.weights["kl"] * kl + 0.2 * penalty + 0.01 * sum((v**2).sum() for v in weights) / 2 + 0.3 * off
    return loss.detach(), query.detach(), dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True)), torch.stack(ends)


def grads(leo):
    found = {n: p.grad for n, p in leo.named_parameters()}
    for p in leo.parameters():
        p.grad = None
    return found


@pytest.mark.parametrize(("backend", "dtype", "bound"), [("cpu", torch.float32, 3e-6), ("torch", torch.float64, 1e-11)])
def test_gradient(backend: str, dtype, bound: float) -> None:
    leo, tasks = made(dtype, backend=backend).eval(), tasks_of(dtype)
    leo.weights["kl"] = 0.1 if dtype is torch.float64 else 0.0  # log(exp(s) - 1) is plain torch's, and loses more than the bound in float32
    out = leo(tasks)
    out.loss.backward()
    loss, query, expected, ends = truth(leo, tasks, None)
    assert distance(grads(leo), expected) <= bound
    assert float(out.loss.detach()) == pytest.approx(float(loss), rel=1e-5) and float(out.query.loss.detach()) == pytest.approx(float(query), rel=1e-5)
    assert out.query.executor == backend and 0 <= float(out.accuracy) <= 1
    torch.testing.assert_close(leo.adapt(*tasks[:2]), ends, rtol=1e-4, atol=1e-5, check_dtype=False)


def test_gradient_through_the_draws() -> None:
    leo, tasks = made(backend="torch"), tasks_of()
    torch.manual_seed(5)
    leo(tasks).loss.backward()
    torch.manual_seed(5)
    draws = [torch.randn(2, WAYS, n, dtype=torch.float64) for n in (CODE, DIM)]
    assert distance(grads(leo), truth(leo, tasks, draws)[2]) <= 1e-11


def test_two_calls_before_one_backward() -> None:
    leo, tasks = made(backend="torch").eval(), tasks_of()
    other = tuple(v.flip(0) + (0.1 if v.is_floating_point() else 0) for v in tasks)
    leo(tasks).loss.backward()
    leo(other).loss.backward()
    apart = grads(leo)
    (leo(tasks).loss + leo(other).loss).backward()
    assert distance(grads(leo), apart) <= 1e-12


def test_state_and_copies() -> None:
    leo, tasks = made().eval(), tasks_of()
    torch.manual_seed(9)
    other = methods.LEO(DIM, WAYS, latent=CODE, latent_steps=2, weight_steps=3, kl_weight=0.1, encoder_weight=0.2, l2=0.01, orthogonality=0.3).double().eval()
    assert not torch.equal(other(tasks).loss, leo(tasks).loss)
    other.load_state_dict(leo.state_dict())
    assert torch.equal(other(tasks).loss, leo(tasks).loss) and torch.equal(copy.deepcopy(leo)(tasks).loss, leo(tasks).loss)
    assert sorted(n for n, _ in leo.named_parameters()) == sorted([*(f"relation.{k}.weight" for k in (0, 2, 4)), "encoder.weight", "decoder", "latent_lr", "weight_lr"])


def test_explained() -> None:
    said = made().explain(tasks_of())
    assert said.index("parameterisation latent(size=4)") < said.index("weight steps") < said.index("parameterisation start")


def test_wrong() -> None:
    with pytest.raises(ValueError, match=r"LEO was built for embeddings \[12\]"):
        made()(classify(shape=(5,)))
    with pytest.raises(ValueError, match="a class has no support row"):
        made()((torch.randn(2, 6, DIM).double(), torch.zeros(2, 6, dtype=torch.int64), *tasks_of()[2:]))
    with pytest.raises(TypeError, match="LEO takes no 'inner_lr': of MAML's options it has first_order"):
        methods.LEO(inner_lr=0.1)
    with pytest.raises(ValueError, match="latent_steps=0"):
        methods.LEO(latent_steps=0)


@pytest.mark.slow
def test_learns_where_classes_lie_in_a_plane() -> None:
    """Embeddings whose classes differ in two of twelve directions: the codes find them."""
    leo, g = made(torch.float32), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(leo.parameters(), lr=1e-2)

    def draw(tasks: int):
        centres = torch.zeros(tasks, WAYS, DIM)
        centres[..., :2] = 2 * torch.randn(tasks, WAYS, 2, generator=g)
        y = torch.arange(WAYS).repeat(2).expand(tasks, -1)
        x = [torch.gather(centres, 1, y[..., None].expand(-1, -1, DIM)) + torch.randn(tasks, 2 * WAYS, DIM, generator=g) for _ in range(2)]
        return x[0], y, x[1], y

    new = draw(100)
    before = float(leo.eval()(new).accuracy)
    for _ in range(150):
        optimizer.zero_grad()
        leo.train()(draw(16)).loss.backward()
        optimizer.step()
    assert float(leo.eval()(new).accuracy) > before + 0.05
