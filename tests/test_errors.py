"""Every wrong argument is answered before any work starts: the error names the argument, its value and the way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from maml_cases import conv_net, needs_cpu
from plain_loop import classify, mlp, one_thread, ragged, regress  # noqa: F401
from torch import nn

from fastmaml import MAML, SGD, BackendError, TaskBatch, TraceError

SX, SY, QX, QY = classify()
NAN, INF = float("nan"), float("inf")


def build(model: Any = None, **options: Any) -> MAML:
    return MAML(mlp() if model is None else model, **options)


def call(tasks: Any = None, options: dict | None = None, model: Any = None, **settings: Any) -> Any:
    return build(model, **(options or {}))((SX, SY, QX, QY) if tasks is None else tasks, **settings)


def adapt(*args: Any, options: dict | None = None, **settings: Any) -> Any:
    return build(**(options or {})).adapt(*args, **settings)


def adapted() -> Any:
    return build().adapt(SX, SY)


def mixed() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4).double())


def frozen(*names: str) -> nn.Module:
    model = mlp()
    for name, p in model.named_parameters():
        p.requires_grad_(not any(name.startswith(n) for n in names))
    return model


def named(name: str) -> nn.Module:
    model = mlp()
    model.register_parameter(name, nn.Parameter(torch.zeros(2)))
    return model


def edited() -> None:
    maml = build(inner_lr={"0.*": 0.1, "2.*": 0.1, "4.*": 0.1}, learn_inner_lr=True)
    maml((SX, SY, QX, QY))
    maml.model[0] = nn.Sequential(nn.Linear(3, 8))
    maml((SX, SY, QX, QY))


# name: (what is called, the type, pieces of the message in order)
MODEL = {
    "no module": (lambda: build("mlp"), TypeError, "model is str", "nn.Module"),
    "no parameters": (lambda: build(nn.ReLU()), ValueError, "model has no parameters"),
    "two dtypes": (lambda: build(mixed()), ValueError, "several kinds", "float32", "float64", "model.to("),
    "half": (lambda: build(mlp().half()), ValueError, "float16", "use float32"),
    "bfloat16": (lambda: build(mlp().bfloat16()), ValueError, "bfloat16", "use float32"),
    "complex": (lambda: build(nn.Linear(3, 4, dtype=torch.complex64)), ValueError, "complex64", "use float32"),
    "lazy": (lambda: build(nn.LazyLinear(4)), ValueError, "lazy parameters", "run it once"),
    "name of the rates": (lambda: build(named("inner_lr")), ValueError, "'inner_lr'", "rename it"),
    "all frozen": (lambda: build(frozen("0", "2", "4")), ValueError, "adapt='*'", "does not require grad"),
    "wrong input size": (lambda: call((SX[..., :2], SY, QX[..., :2], QY)), ValueError, "cannot run on samples of shape [2]"),
    "edited, learned rates": (edited, ValueError, "no learned rate 'inner_lr.0.0.weight'", "build a new one"),
}
OPTIONS = {
    "inner_steps negative": (lambda: build(inner_steps=-1), ValueError, "inner_steps=-1", "at least 0"),
    "inner_steps float": (lambda: build(inner_steps=1.0), TypeError, "inner_steps=1.0", "whole number"),
    "inner_steps bool": (lambda: build(inner_steps=True), TypeError, "inner_steps=True"),
    "inner_steps None": (lambda: build(inner_steps=None), TypeError, "inner_steps=None"),
    "loss name": (lambda: build(loss="l1"), ValueError, "loss='l1'", "'mse'", "outer_loss="),
    "loss function": (lambda: build(loss=nn.functional.mse_loss), ValueError, "loss=<function", "outer_loss="),
    "loss class": (lambda: build(loss=nn.L1Loss()), ValueError, "loss=L1Loss()", "nn.MSELoss"),
    "loss subclass": (lambda: build(loss=type("Mine", (nn.MSELoss,), {})()), ValueError, "loss=Mine()"),
    "loss ignore_index": (lambda: build(loss=nn.CrossEntropyLoss(ignore_index=0)), ValueError, "ignore_index=0", "leave those rows out"),
    "loss reduction": (lambda: build(loss=nn.MSELoss(reduction="none")), ValueError, "reduction='none'", "'mean'"),
    "loss weights": (lambda: call(options={"loss": nn.CrossEntropyLoss(torch.ones(3))}), ValueError, "CrossEntropyLoss(weight=...)", "[3]", "4 outputs"),
    "reduction name": (lambda: build(reduction="none"), ValueError, "reduction='none'", "divided by"),
    "reduction zero": (lambda: build(reduction=0), ValueError, "reduction=0.0", "positive"),
    "reduction nan": (lambda: build(reduction=NAN), ValueError, "reduction=nan"),
    "reduction bool": (lambda: build(reduction=True), ValueError, "reduction=True"),
    "first_order": (lambda: build(first_order=1), TypeError, "first_order=1", "True or False"),
    "learn_inner_lr": (lambda: build(learn_inner_lr="yes"), TypeError, "learn_inner_lr='yes'", "True or False"),
    "batchnorm": (lambda: build(batchnorm="train"), ValueError, "batchnorm='train'", "'batch', 'support', 'running', 'joint'"),
    "parameterisation": (lambda: build(parameterisation="lora"), ValueError, "parameterisation='lora'", "'full'"),
    "precision": (lambda: build(precision="tf32"), ValueError, "precision='tf32'", "'highest', 'high', 'medium'"),
    "memory": (lambda: build(memory="low"), ValueError, "memory='low'", "'constant', 'fast'"),
    "backend": (lambda: build(backend="gpu"), ValueError, "backend='gpu'", "'cpu'"),
    "on_nonfinite": (lambda: build(on_nonfinite="warn"), ValueError, "on_nonfinite='warn'", "'raise', 'skip'"),
    "option type": (lambda: build(memory=None), ValueError, "memory=None", "'constant'"),
    "unknown option": (lambda: build(lr=0.1), TypeError, "unexpected keyword argument 'lr'"),
    "adapt no match": (lambda: build(adapt="head.*"), ValueError, "adapt='head.*'", "0.weight"),
    "adapt one of two": (lambda: build(adapt=["4.*", "5.*"]), ValueError, "adapt='5.*' matches no trainable"),
    "adapt frozen": (lambda: build(frozen("0"), adapt="0.*"), ValueError, "adapt='0.*'", "'0.weight', which does not require grad"),
    "adapt type": (lambda: build(adapt=4), TypeError, "adapt=4", "pattern"),
    "adapt empty": (lambda: build(adapt=[]), TypeError, "adapt=[]", "pattern"),
    "step weights length": (lambda: build(inner_steps=3, step_loss_weights=[1, 1]), ValueError, "step_loss_weights has 2 entries, inner_steps is 3", "one per inner step"),
    "step weights without steps": (lambda: build(inner_steps=0, step_loss_weights=[1]), ValueError, "step_loss_weights has 1 entries, inner_steps is 0"),
    "step weights nan": (lambda: build(step_loss_weights=[NAN]), ValueError, "step_loss_weights=[nan]", "finite"),
    "step weights type": (lambda: build(step_loss_weights="linear"), TypeError, "step_loss_weights='linear'", "one number per inner step"),
    "step weights of tensors": (lambda: build(step_loss_weights=[None]), TypeError, "step_loss_weights=[None]"),
    "cuda": (lambda: call(options={"backend": "cuda"}), BackendError, "backend='cuda'", "the parameters are on cpu", "backend='auto'"),
}
RATES = {
    "type": (lambda: build(inner_lr="0.1"), TypeError, "inner_lr is '0.1'", "pass a number"),
    "bool": (lambda: build(inner_lr=True), TypeError, "inner_lr is True", "pass a number"),
    "None": (lambda: build(inner_lr=None), TypeError, "inner_lr is None", "pass a number"),
    "nan": (lambda: build(inner_lr=NAN), ValueError, "inner_lr is nan", "finite"),
    "infinite step": (lambda: build(inner_lr=[0.1, INF], inner_steps=2), ValueError, "inner_lr is [0.1, inf]", "finite"),
    "empty": (lambda: build(inner_lr=[]), ValueError, "inner_lr is [] (empty)", "pass a number"),
    "list of names": (lambda: build(inner_lr=["a"]), TypeError, "inner_lr is ['a']"),
    "matrix": (lambda: build(inner_lr=torch.ones(2, 2)), ValueError, "inner_lr is a tensor of shape [2, 2]", "pass a number"),
    "too few steps": (lambda: build(inner_lr=[0.1], inner_steps=2), ValueError, "inner_lr has 1 steps", "inner_steps is 2", "one rate per step"),
    "requires grad": (lambda: build(inner_lr=nn.Parameter(torch.tensor(0.1))), ValueError, "requires grad", "learn_inner_lr=True"),
    "unknown name": (lambda: build(inner_lr={"*": 0.1, "head.*": 0.2}), ValueError, "inner_lr has 'head.*'", "0.weight"),
    "missing name": (lambda: build(inner_lr={"0.*": 0.1}), ValueError, "no rate for the adapted parameter '2.weight'", "'*' entry"),
    "name type": (lambda: build(inner_lr={0: 0.1}), TypeError, "inner_lr has the key 0", "parameter names"),
    "element shape": (lambda: build(inner_lr={"*": 0.1, "0.weight": torch.ones(8, 4)}), ValueError, "shape [8, 4] for '0.weight' (shape [8, 3])"),
    "element nan": (lambda: build(inner_lr={"*": torch.tensor(NAN)}), ValueError, "inner_lr['*']", "finite"),
    "call: other form": (lambda: call(inner_lr=[0.1]), ValueError, "inner_lr of a call", "form of the constructor's"),
    "call: learned": (lambda: call(options={"learn_inner_lr": True}, inner_lr=0.1), ValueError, "inner_lr", "learn_inner_lr=True", "maml.rates.values"),
    "call: too few steps": (lambda: call(options={"inner_lr": [0.1]}, inner_steps=2), ValueError, "inner_lr has 1 steps", "inner_steps is 2"),
    "call: type": (lambda: call(inner_lr="fast"), TypeError, "inner_lr is 'fast'"),
}
CALLS = {
    "inner_steps": (lambda: call(inner_steps=-2), ValueError, "inner_steps=-2", "at least 0"),
    "inner_steps float": (lambda: build().meta_grad((SX, SY, QX, QY), inner_steps=2.5), TypeError, "inner_steps=2.5", "whole number"),
    "batchnorm": (lambda: call(batchnorm="eval"), ValueError, "batchnorm='eval'", "'running'"),
    "step weights of other steps": (lambda: call(options={"step_loss_weights": [1.0]}, inner_steps=3), ValueError, "step_loss_weights has 1 entries, inner_steps is 3"),
    "task_weights length": (lambda: call(task_weights=[1, 1]), ValueError, "task_weights has shape [2]", "[3]"),
    "task_weights type": (lambda: call(task_weights="uniform"), TypeError, "task_weights='uniform'", "3 numbers"),
    "task_weights nan": (lambda: call(task_weights=[1, NAN, 1]), ValueError, "task_weights", "not finite"),
    "task_weights scalar": (lambda: call(task_weights=2.0), ValueError, "task_weights has shape []", "[3]"),
    "outer_loss type": (lambda: call(outer_loss="mse"), TypeError, "outer_loss='mse'", "function of (logits, query_y)"),
    "outer_loss shape": (lambda: call(outer_loss=lambda z, y: z.sum((1, 2))), ValueError, "outer_loss returned a tensor of shape [3]", "scalar"),
    "outer_loss value": (lambda: call(outer_loss=lambda z, y: 1.0), ValueError, "outer_loss returned 1.0", "scalar tensor"),
    "outer_loss and task_weights": (lambda: call(outer_loss=lambda z, y: z.sum(), task_weights=[1, 1, 1]), ValueError, "task_weights and outer_loss", "inside outer_loss"),
    "outer_loss and step weights": (lambda: call(options={"step_loss_weights": [1.0]}, outer_loss=lambda z, y: z.sum()), ValueError, "step_loss_weights and outer_loss"),
    "unknown": (lambda: call(steps=3), TypeError, "unexpected keyword argument 'steps'"),
    "meta_grad unknown": (lambda: build().meta_grad((SX, SY, QX, QY), lr=3), TypeError, "unexpected keyword argument 'lr'"),
    "eval mode": (lambda: call((torch.zeros(3, 6, 1, 6, 6), SY, torch.zeros(3, 7, 1, 6, 6), QY), model=conv_net().eval()), ValueError, "eval mode", "batchnorm='batch'", "batchnorm='running'"),
}
TASKS = {
    "nothing": (lambda: call([]), ValueError, "the list of tasks is empty"),
    "a tensor": (lambda: call(SX), TypeError, "cannot read tasks from float32", "TaskBatch"),
    "three tensors": (lambda: call((SX, SY, QX)), TypeError, "cannot read tasks"),
    "a dict": (lambda: call({"train": (SX, SY)}), TypeError, "neither 'query' nor 'test'"),
    "a dict of tensors": (lambda: call({"train": SX, "test": QX}), TypeError, "tasks['train']", "pair (x, y)"),
    "a string": (lambda: call("tasks"), TypeError, "cannot read tasks"),
    "no task axis": (lambda: call((SX[0, 0], SY[0], QX[0, 0], QY[0])), ValueError, "support_x has shape [3]", "support_x[None]"),
    "numbers of tasks": (lambda: call((SX, SY, QX[:2], QY[:2])), ValueError, "query_x has 2 tasks but support_x has 3"),
    "rows": (lambda: call((SX, SY[:, :4], QX, QY)), ValueError, "support_y has 4 rows per task but support_x has 6"),
    "shapes of samples": (lambda: call((SX, SY, QX[..., :2], QY)), ValueError, "query_x has rows of shape [2] but support_x", "[3]"),
    "no rows": (lambda: call((SX[:, :0], SY[:, :0], QX, QY)), ValueError, "task 0 has 0 support rows"),
    "bool x": (lambda: call((SX > 0, SY, QX > 0, QY)), TypeError, "support_x is torch.bool", "torch.float32"),
    "half x": (lambda: call((SX.half(), SY, QX.half(), QY)), TypeError, "support_x is torch.float16", "torch.float32"),
    "integer x": (lambda: call(((SX * 9).long(), SY, (QX * 9).long(), QY)), TypeError, "support_x is torch.int64", "torch.float32"),
    "strings": (lambda: call((np.array([["a"]]), SY, QX, QY)), TypeError, "support_x is", "expected numbers"),
    "another device": (lambda: call(tuple(v.to("meta") for v in (SX, SY, QX, QY))), ValueError, "the tasks are on meta, the model on cpu", "tasks.to("),
    "two devices": (lambda: call((SX, SY, QX.to("meta"), QY)), ValueError, "one device", "query_x on meta"),
    "float labels": (lambda: call((SX, SY.float(), QX, QY)), TypeError, "support_y is torch.float32", "y.long()"),
    "bool labels": (lambda: call((SX, SY, QX, QY > 0)), TypeError, "query_y is torch.bool", "integers"),
    "one-hot labels": (lambda: call((SX, nn.functional.one_hot(SY, 4), QX, nn.functional.one_hot(QY, 4))), ValueError, "support_y has labels of shape [4]", "argmax(-1)"),
    "a label too high": (lambda: call((SX, SY, QX, QY + 1)), ValueError, "query_y has the label 4", "0..3"),
    "a label below zero": (lambda: call((SX, SY - 1, QX, QY)), ValueError, "support_y has the label -1", "0..3"),
    "ways": (lambda: call(TaskBatch.from_tensors(SX, SY, QX, QY, ways=5)), ValueError, "ways of a task is 5", "4 outputs"),
    "a label beyond the ways": (lambda: call(TaskBatch.from_tensors(SX, SY, QX, QY, ways=[4, 2, 4])), ValueError, "support_y of task 1 has the label", "2 ways"),
    "integer targets": (lambda: call(tuple(v.long() if i % 2 else v for i, v in enumerate(regress())), {"loss": "mse"}), TypeError, "support_y is torch.int64", "y.float()"),
    "shape of targets": (lambda: call((SX, SY.float(), QX, QY.float()), {"loss": "mse"}), ValueError, "support_y has rows of shape []", "output [4]"),
    "output for classes": (lambda: call((SX, SY, QX, QY), model=nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (2, 2)))), ValueError, "output has shape [2, 2]", "[classes]"),
}
ADAPT = {
    "no labels": (lambda: adapt(SX), TypeError, "adapt needs support_y", "support_x [tasks, n, ...]"),
    "batch and labels": (lambda: adapt(ragged(), SY), TypeError, "a TaskBatch and support_y"),
    "lists": (lambda: adapt([SX[0]], [SY[0], SY[1]]), ValueError, "support_x has 1 tasks, support_y 2"),
    "no task axis": (lambda: adapt(SX[0, 0], SY[0]), ValueError, "support_x has shape [3]"),
    "steps": (lambda: adapt(SX, SY, inner_steps="all"), TypeError, "inner_steps='all'"),
    "rates": (lambda: adapt(SX, SY, inner_lr={"x": 0.1}), ValueError, "inner_lr has 'x'"),
    "batchnorm": (lambda: adapt(SX, SY, batchnorm="query"), ValueError, "batchnorm='query'"),
    "labels": (lambda: adapt(SX, SY + 9), ValueError, "support_y has the label 1"),
    "x": (lambda: adapted()(3), TypeError, "x is int", "[tasks, n, ...]"),
    "x without tasks": (lambda: adapted()(QX[0, 0]), TypeError, "x is a tensor of shape [3]"),
    "x tasks": (lambda: adapted()(QX[:2]), ValueError, "x has 2 tasks, the adapted model 3"),
    "x rows": (lambda: adapted()(QX[..., :2]), ValueError, "x of task 0 has shape [7, 2]", "[n, 3]"),
    "x of strings": (lambda: adapted()(["a", "b", "c"]), ValueError, "x of task 0 has type str"),
    "x empty": (lambda: adapted()(QX[:, :0]), ValueError, "x of task 0 has shape [0, 3]"),
    "module": (lambda: adapted().module(3), IndexError, "task 3 of 3"),
    "pickle": (lambda: __import__("pickle").dumps(adapted()), TypeError, "cannot be pickled", "adapted.module(t)"),
}
ALL = {f"{group}: {name}": case for group, table in [("model", MODEL), ("option", OPTIONS), ("rate", RATES), ("call", CALLS), ("tasks", TASKS), ("adapt", ADAPT)] for name, case in table.items()}


@pytest.mark.parametrize("case", ALL)
def test_error(case: str) -> None:
    act, kind, *pieces = ALL[case]
    with pytest.raises(kind) as caught:
        act()
    message = str(caught.value)
    at = 0
    for piece in pieces:
        assert piece in message[at:], f"{piece!r} is missing, or out of order, in: {message}"
        at += message[at:].index(piece)


def test_the_table_is_long() -> None:
    assert len(ALL) >= 60


@pytest.mark.parametrize("wrong", [lambda m, t: m(t, inner_steps=-1), lambda m, t: m.meta_grad((SX, SY, QX, QY + 9)), lambda m, t: m.meta_grad(t, task_weights=[1])])
def test_nothing_is_left_half_done(wrong: Callable) -> None:
    maml, tasks = build(), (SX, SY, QX, QY)
    maml.meta_grad(tasks)
    before = [(p.clone(), p.grad.clone()) for p in maml.parameters()]
    with pytest.raises(ValueError):
        wrong(maml, tasks)
    assert all(torch.equal(p, a) and torch.equal(p.grad, g) for p, (a, g) in zip(maml.parameters(), before, strict=True))
    maml.zero_grad()
    maml.meta_grad(tasks)
    assert all(torch.equal(p.grad, g) for p, (_, g) in zip(maml.parameters(), before, strict=True))


def test_labels_of_a_batch_object_are_checked_for_each_model() -> None:
    """What a batch has been checked for is kept with it, and is not more than what was checked."""
    batch = TaskBatch.from_tensors(SX, SY, QX, QY)
    build().adapt(batch)
    with pytest.raises(ValueError, match="the model 3 outputs"):
        build(mlp((3, 3)))(batch)
    batch = TaskBatch.from_tensors(SX, SY, QX, QY + 9)
    build().adapt(batch)
    with pytest.raises(ValueError, match="query_y has the label"):
        build()(batch)
    labels = SY.clone()
    batch = TaskBatch.from_tensors(SX, labels, QX, QY)
    build()(batch)
    labels[0, 0] = 77
    with pytest.raises(ValueError, match="support_y has the label 77"):
        build()(batch)


def test_what_was_right_once_is_looked_at_again() -> None:
    """What a call runs on is kept for tasks of a form: other types, shapes, labels and options are no less checked behind it."""
    maml = build()
    for _ in range(2):
        maml((SX, SY, QX, QY))
        with pytest.raises(TypeError, match="support_y is torch.float32"):
            maml((SX, SY.float(), QX, QY.float()))
        with pytest.raises(ValueError, match="query_y has the label 4"):
            maml((SX, SY, QX, QY + 1))
        with pytest.raises(ValueError, match="support_y has labels of shape"):
            maml((SX, SY[..., None], QX, QY[..., None]))
        with pytest.raises(TypeError, match="support_x is torch.int64"):
            maml((SX.long(), SY, QX.long(), QY))
        with pytest.raises(TypeError, match="inner_steps=True"):
            maml((SX, SY, QX, QY), inner_steps=True)
    before = maml((SX, SY, QX, QY)).loss
    maml.inner_optimizer = SGD(weight_decay=0.5)
    assert maml((SX, SY, QX, QY)).loss != before
    maml.inner_optimizer = "adam"
    with pytest.raises(TypeError, match="inner_optimizer is str"):
        maml((SX, SY, QX, QY))


@needs_cpu
def test_a_backend_asked_for_never_falls_back() -> None:
    with pytest.raises(BackendError, match="backend='cpu' cannot run this model: the parameters are float64.*Able to: 'torch'"):
        build(mlp().double(), backend="cpu")((SX, SY, QX, QY))
    with pytest.raises(TraceError, match="layer '1' \\(Dropout\\).*backend='autograd'"):
        build(nn.Sequential(nn.Linear(3, 4), nn.Dropout()), backend="cpu")((SX, SY, QX, QY))
