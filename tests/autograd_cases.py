"""Modules that cannot be traced, and how a run of them is judged."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from plain_loop import classify, distance, grads, plain_loop
from torch import nn

from fastmaml import MAML

DOUBLE = torch.float64


class Block(nn.Module):
    """Of a ResNet-12 as few-shot learners write it: the mask depends on chance and on the training flag, its use on data."""

    def __init__(self, c_in: int, c_out: int, drop: float) -> None:
        super().__init__()
        sizes = ((c_in, c_out), (c_out, c_out), (c_out, c_out))
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1, bias=False) for i, o in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(c_out) for _ in sizes)
        self.down = nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out))
        self.drop = drop

    def forward(self, x):
        y = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(y))
            y = F.leaky_relu(y + self.down(x) if i == 2 else y, 0.1)
        y = F.max_pool2d(y, 2)
        if self.training and self.drop:
            seeds = torch.bernoulli(torch.full_like(y, self.drop))
            mask = 1 - F.max_pool2d(seeds, 3, 1, 1)
            if mask.sum() > 0:
                y = y * mask * (mask.numel() / mask.sum())
        return y


class ResNet12(nn.Module):
    def __init__(self, widths=(3, 4, 5, 6)) -> None:
        super().__init__()
        channels = (2, *widths)
        self.blocks = nn.Sequential(*(Block(channels[i], channels[i + 1], 0.1 * (i >= 2)) for i in range(4)))
        self.head = nn.Linear(widths[-1], 4)

    def forward(self, x):
        return self.head(self.blocks(x).mean((2, 3)))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.attention = nn.Linear(3, 8), nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.tokens(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.encoder(x).mean(1))


class LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 6, num_layers=2, dropout=0.2, batch_first=True), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Dropped(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 4))


NETS = {"ResNet-12": (ResNet12, (2, 16, 16)), "transformer": (Transformer, (5, 3)), "LSTM": (LSTM, (5, 3)), "dropout": (Dropped, (3,))}
nets = pytest.mark.parametrize("net", NETS)


def made(net: str, dtype: torch.dtype = DOUBLE, **options) -> tuple[MAML, tuple]:
    kind, shape = NETS[net]
    torch.manual_seed(0)
    return MAML(kind().to(dtype), **{"inner_lr": 0.1, "inner_steps": 3, **options}), classify(2, 5, 6, shape)


def agrees(maml: MAML, tasks, call=None, bound: float = 1e-10, parts=None, **truth) -> None:
    """Same gradient, and the generator left where the plain loop leaves it."""
    maml.plan(tasks)
    torch.manual_seed(3)
    out = (call or (lambda: maml(tasks)))()
    if out.loss.requires_grad:
        out.loss.backward()
    state = torch.get_rng_state()
    torch.manual_seed(3)
    expected = plain_loop(maml.model, tasks, **{"lr": 0.1, "steps": 3, "dtype": next(maml.parameters()).dtype, **truth})
    assert maml.executor == "autograd" and torch.equal(state, torch.get_rng_state())
    found = grads(maml)
    assert distance(found, {n: expected.gradients[n] for n in found}) <= bound
    assert out.loss.item() == pytest.approx(float(expected.loss), rel=1e-6)
