"""What every meta-parameterisation does: state, copies, entries, arrangements, models that cannot be traced, errors."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import families
import pytest
import torch
from families import small_conv
from helpers_families import IMAGES, OPTIONS, encoder, grads, moved
from plain_loop import classify, mlp, one_thread, ragged, regress  # noqa: F401
from torch import nn

import fastmaml
from fastmaml import MAML, methods
from fastmaml.parameterisation import (
    Basis,
    Context,
    Gated,
    Head,
    Layerwise,
    LowRank,
    Mixture,
    Modulation,
    Parameterisation,
    ScaleShift,
    SetEncoder,
    TNet,
)

EVERY = {
    "layerwise": lambda: methods.ANIL(mlp(), **OPTIONS),
    "scale_shift": lambda: methods.MTL(mlp(), adapt="both", **OPTIONS),
    "channel": lambda: methods.ChannelScaleShift(mlp(), **OPTIONS),
    "cavia": lambda: methods.CAVIA(mlp(), **OPTIONS),
    "t_net": lambda: methods.TNets(mlp(), **OPTIONS),
    "mt_net": lambda: methods.MTNets(mlp(), **OPTIONS),
    "low_rank": lambda: methods.LowRankMAML(mlp(), **OPTIONS),
    "basis": lambda: methods.SubspaceMAML(mlp(), **OPTIONS),
    "zero_head": lambda: methods.ZeroHead(mlp(), **OPTIONS),
    "proto_head": lambda: methods.ProtoMAML(mlp(), **OPTIONS),
    "mmaml": lambda: methods.MMAML(mlp(), encoder(), **OPTIONS),
    "hsml": lambda: methods.HSML(mlp(), encoder(), **OPTIONS),
}


def seeded(maml: MAML) -> dict:
    return {"task_seeds": [1, 2, 3]} if maml.parameterisation.has_prologue else {}


@pytest.mark.parametrize("name", EVERY)
def test_state_goes_into_its_like_alone(name: str) -> None:
    maml, tasks = EVERY[name](), classify()
    optimizer = torch.optim.SGD(maml.parameter_groups(), lr=0.1)
    maml(tasks, **seeded(maml)).loss.backward()
    optimizer.step()
    state, other = maml.state_dict(), EVERY[name]()
    other.load_state_dict(pickle.loads(pickle.dumps(state)))
    assert torch.equal(other(tasks, **seeded(maml)).loss, maml(tasks, **seeded(maml)).loss)
    for wrong in (MAML(mlp()), methods.ANIL(mlp(), head=["4.weight"])):
        with pytest.raises(RuntimeError, match="saved with parameterisation .*, this object has"):
            wrong.load_state_dict(state)
    with pytest.raises(RuntimeError, match="saved with parameterisation full, this object has"):
        maml.load_state_dict(MAML(mlp()).state_dict())
    wrapped, again = nn.ModuleDict({"maml": maml}), nn.ModuleDict({"maml": EVERY[name]()})
    again.load_state_dict(wrapped.state_dict())
    assert torch.equal(again["maml"](tasks, **seeded(maml)).loss, maml(tasks, **seeded(maml)).loss)


@pytest.mark.parametrize("name", EVERY)
def test_copies_and_dtypes(name: str) -> None:
    maml, tasks = EVERY[name](), classify()
    for other in (copy.deepcopy(maml), pickle.loads(pickle.dumps(maml))):
        assert torch.equal(other(tasks, **seeded(maml)).loss, maml(tasks, **seeded(maml)).loss)
    double = copy.deepcopy(maml).double()
    assert all(p.dtype is torch.float64 for p in double.parameters())
    assert float(double(tasks, **seeded(maml)).loss.detach()) == pytest.approx(float(maml(tasks, **seeded(maml)).loss.detach()), rel=1e-5)
    assert double.executor == "torch"


@pytest.mark.parametrize("name", EVERY)
def test_entries_and_steps(name: str) -> None:
    """Any number of steps, ragged tasks, evaluation without gradients, more steps than are kept."""
    maml, batch = EVERY[name](), ragged()
    for steps in (0, 1, 12):
        out = maml(batch, inner_steps=steps, **seeded(maml))
        out.loss.backward()
        with torch.no_grad():
            assert float(maml(batch, inner_steps=steps, **seeded(maml)).loss) == pytest.approx(float(out.loss.detach()), rel=1e-6)
        assert len(maml.adapt(batch, inner_steps=steps, **seeded(maml))) == 3
    assert f"parameterisation {maml.parameterisation.signature}" in maml.explain(batch)


@pytest.mark.parametrize("name", EVERY)
def test_same_gradient_on_every_arrangement(name: str) -> None:
    """Learned rates, one step (its activations are kept), memory="fast", first order: cpu in float32 against torch in float64."""
    for more in ({"inner_steps": 1}, {"memory": "fast"}, {"learn_inner_lr": True}, {"first_order": True}):
        maml, tasks = EVERY[name](), classify()
        torch.manual_seed(0)
        made = MAML(mlp(), parameterisation=again(maml.parameterisation), **{**OPTIONS, **more})
        moved(made)
        double = copy.deepcopy(made).double()
        for m in (made, double):
            m.meta_grad(tasks, **seeded(m))
        assert (made.executor, double.executor) == ("cpu", "torch")
        assert families.distance(grads(made), {n: None if g is None else g for n, g in grads(double).items()}) <= 3e-6, more


@pytest.mark.parametrize("name", [n for n in EVERY if n not in ("channel", "mmaml", "proto_head")])
def test_a_model_that_cannot_be_traced(name: str) -> None:
    """backend="autograd": the same expressions around one opaque module."""
    maml, tasks = EVERY[name](), classify()
    torch.manual_seed(0)
    for more in ({}, {"inner_steps": 1}, {"learn_inner_lr": True}):
        traced = MAML(mlp().double(), parameterisation=again(maml.parameterisation), **{**OPTIONS, "backend": "torch", **more})
        moved(traced)
        opaque = copy.deepcopy(traced)
        opaque.backend = "autograd"
        for m in (traced, opaque):
            m(tasks, **seeded(m)).loss.backward()
        assert opaque.executor == "autograd"
        assert families.distance(grads(opaque), {n: g for n, g in grads(traced).items()}) <= 1e-11, more
        torch.testing.assert_close(opaque.adapt(*tasks[:2], **seeded(opaque))(tasks[2]), traced.adapt(*tasks[:2], **seeded(traced))(tasks[2]))


@pytest.mark.parametrize("name", ["channel", "mmaml", "proto_head"])
def test_what_needs_a_trace(name: str) -> None:
    maml = EVERY[name]()
    maml.backend = "autograd"
    with pytest.raises(ValueError, match="cannot be traced"):
        maml(classify())


def again(p: Parameterisation) -> Parameterisation:
    given = dict(p.settings())
    kinds = {"layerwise": Layerwise, "scale_shift": ScaleShift, "cavia": Context, "t_net": TNet, "mt_net": TNet, "low_rank": LowRank, "basis": Basis}
    kinds |= {"mmaml": lambda size, layers: Modulation(encoder(), size, layers), "hsml": lambda size, clusters: Gated(encoder(), size, clusters)}
    kinds |= {"zero_head": partial(Head, "zero"), "proto_head": partial(Head, "prototypes")}
    return kinds[p.name](**given)


def test_outer_rates_by_group() -> None:
    maml = methods.MTL(mlp(), learn_inner_lr=True)
    groups = maml.parameter_groups({"scale_shift": 1e-4, "model": 1e-3})
    assert [(g["name"], g.get("lr"), len(g["params"])) for g in groups] == [("model", 1e-3, 2), ("scale_shift", 1e-4, 4), ("inner_lr", None, 1)]
    assert sorted(map(id, maml.parameters())) == sorted(id(p) for g in groups for p in g["params"])
    torch.optim.Adam(groups, lr=0.01)
    with pytest.raises(ValueError, match="no group 'head'; the groups are model, scale_shift, inner_lr"):
        maml.parameter_groups({"head": 1.0})


def test_pretrained_weights() -> None:
    body = {n: torch.randn_like(v) for n, v in mlp().state_dict().items() if not n.startswith("4")}
    maml = methods.MTL(mlp(), pretrained=body)
    assert torch.equal(maml.model[0].weight, body["0.weight"])
    with pytest.raises(ValueError, match="pretrained has 'fc.weight', which the model has not"):
        methods.MTL(mlp(), pretrained={"fc.weight": torch.ones(2)})


WRONG = {
    "name": (lambda: MAML(mlp(), parameterisation="lora"), "parameterisation='lora': choose one of 'full', 'anil', 'boil'"),
    "class": (lambda: MAML(mlp(), parameterisation=Layerwise), "choose one of"),
    "twice": (lambda: [MAML(mlp(), parameterisation=p) for p in [Layerwise()] * 2], "already belongs to a MAML object"),
    "adapt too": (lambda: MAML(mlp(), adapt="4.*", parameterisation="anil"), "say what is adapted in one of them"),
    "adapt with own": (lambda: methods.CAVIA(mlp(), adapt="4.*"), "the parameterisation says what is adapted"),
    "pattern": (lambda: methods.ANIL(mlp(), head="fc.*"), r"adapt='fc\.\*' matches none of 0.weight"),
    "both": (lambda: MAML(mlp(), parameterisation=Layerwise("4.*", frozen="*")), "both adapted and frozen"),
    "no head": (lambda: methods.ANIL(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten())), "no Linear layer that could be its head"),
    "scale_shift": (lambda: ScaleShift("fc"), "adapt='fc': choose one of 'head'"),
    "nothing to scale": (lambda: methods.MTL(nn.Linear(3, 4)), "no Linear or Conv2d layer below its head"),
    "context": (lambda: methods.CAVIA(small_conv()), "a first layer that is a Linear"),
    "mask": (lambda: TNet("units"), "mask='units': choose None"),
    "temperature": (lambda: TNet("unit", temperature=0), "expected a number above 0"),
    "temperature in words": (lambda: TNet("unit", temperature="hot"), "temperature='hot': expected a number above 0"),
    "clusters": (lambda: methods.HSML(mlp(), encoder(), clusters=4), "clusters=4: expected two whole numbers"),
    "one level": (lambda: methods.HSML(mlp(), encoder(), clusters=(4,)), r"clusters=\(4,\): expected two whole numbers"),
    "encoder of others": (lambda: methods.MMAML(mlp(), SetEncoder(5, 4))(classify()), "rows have 3 numbers and 4 targets: this SetEncoder was built with inputs=5, targets=4"),
    "encoder's classes": (lambda: methods.MMAML(mlp(), SetEncoder(3, 2))(classify()), "a label is 3: this SetEncoder was built for targets=2 classes"),
    "encoder's size": (lambda: methods.MMAML(mlp(), nn.Linear(3, 4)), "size=None: expected the number of features"),
    "body of a head": (lambda: methods.BOIL(nn.Linear(3, 4)), "the model has nothing but its head, 'weight'"),
    "a mixture by itself": (lambda: MAML(mlp(), parameterisation=Mixture(2)), r"is fastmaml.methods.Mixture\(model, components=...\)"),
    "reptile of T": (lambda: methods.Reptile(mlp(), parameterisation=TNet()), r"parameterisation t_net\(layers=None\) leaves out 't_net.T.0.weight': it needs meta_gradient='unrolled'"),
    "reptile of a head": (lambda: methods.Reptile(mlp(), parameterisation="anil"), r"layerwise\(adapt='head'\) leaves out '0.weight': adapt it, or freeze it"),
    "implicit gates": (lambda: methods.iMAML(mlp(), parameterisation=Gated(encoder())), "parameterisation hsml.* leaves out '0.weight'"),
    "implicit factors": (lambda: methods.iMAML(mlp(), parameterisation=LowRank()), "low_rank.* leaves out '0.weight': adapt it, or freeze it"),
    "rates of T": (lambda: methods.TNets(mlp(), inner_lr={"t_net.T.*": 0.1, "*": 0.3}), r"'t_net.T.\*', which matches no adapted parameter; they are 0.weight"),
    "prototypes of numbers": (lambda: methods.ProtoMAML(mlp(), loss="mse")(regress()), "prototypes need class labels"),
    "layers": (lambda: methods.MTL(mlp(), layers="conv*"), r"layers='conv\*' matches none of 0.weight, 2.weight, 4.weight"),
    "norms for each step": (lambda: methods.MAMLPlusPlus(small_conv(), parameterisation="boil")(classify(**IMAGES)), "has a value per inner step and cannot be adapted"),
    "rank": (lambda: LowRank(0), "rank=0: expected a whole number"),
    "basis": (lambda: methods.SubspaceMAML(mlp(), basis="pca"), "basis='pca': choose 'random'"),
    "basis shape": (lambda: methods.SubspaceMAML(mlp(), basis={"0.weight": torch.ones(3, 8)}), r"basis\['0.weight'\] has shape \[3, 8\]: expected \[24, 8\]"),
    "rates per step": (lambda: methods.MTNets(mlp(), inner_lr=[0.1])(classify()), "whose masks serve all steps of a task: give one rate, or one per layer or element"),
    "given here": (lambda: fastmaml.functional.adapt(mlp(), dict(mlp().named_parameters()), *classify()[:2], parameterisation=LowRank()), "use fastmaml.MAML"),
    "film": (lambda: methods.ChannelScaleShift(twice(), layers="0.weight")(classify(shape=(4,))), "2 layers read it as their weight"),
}


def test_names_of_the_models_own() -> None:
    """A layer called rate is not a rate; an object whose MAML could not be built may be used again."""
    net = nn.Sequential()
    net.add_module("rate", nn.Linear(3, 8))
    net.add_module("head", nn.Linear(8, 4))
    maml, tasks = methods.ANIL(net, **OPTIONS), classify()
    assert maml.adapt(*tasks[:2])(tasks[2]).shape == (3, 7, 4)
    given = LowRank()
    with pytest.raises(TypeError, match="inner_lr is 'fast'"):
        MAML(mlp(), parameterisation=given, inner_lr="fast")
    assert MAML(mlp(), parameterisation=given)(tasks).loss.isfinite()


def twice() -> nn.Module:
    class Twice(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](self[0](x)))

    return Twice(nn.Linear(4, 4), nn.Linear(4, 4))


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call()


VERIFIED = {
    **EVERY,
    "film": lambda: methods.CAVIA(small_conv(), layers="*", step_loss_weights=[0.5, 0.5], **OPTIONS | {"inner_steps": 2}),
    "scales of a conv net": lambda: methods.MTL(small_conv(), adapt="both", **OPTIONS),
    "prototypes": lambda: methods.ProtoMAML(small_conv(), **OPTIONS),
    "learned rates": lambda: methods.MTNets(mlp(), learn_inner_lr=True, **OPTIONS),
    "momentum": lambda: methods.LowRankMAML(mlp(), inner_optimizer=fastmaml.SGD(momentum=0.9, weight_decay=0.1), **OPTIONS),
}


@pytest.mark.parametrize("name", VERIFIED)
def test_verify(name: str) -> None:
    maml = VERIFIED[name]()
    conv = isinstance(maml.model[0], nn.Conv2d)
    result = maml.verify(classify(**IMAGES) if conv else classify(tasks=4), repeats=1)
    assert result.ok and result.plan_error < 1e-10 and result.loss_error < 1e-5


def test_verify_sees_a_wrong_gradient_of_a_rewritten_network(monkeypatch: pytest.MonkeyPatch) -> None:
    right = MAML._gradients
    monkeypatch.setattr(MAML, "_gradients", lambda *args: [(p, g if g is None else 1.01 * g) for p, g in right(*args)])
    assert not methods.TNets(mlp(), **OPTIONS).verify(classify(tasks=4), repeats=1).ok


def test_verify_says_what_it_does_not_know() -> None:
    for make, message in (
        (lambda: methods.Mixture(mlp()), "knows no mixture"),
        (lambda: methods.TNets(mlp(), batchnorm="support"), "knows no batchnorm='support' of a rewritten network"),
        (lambda: methods.TNets(mlp(), backend="autograd"), "for models that can be traced"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            make().verify(classify())


def test_module_without_a_place_for_the_shift() -> None:
    net = small_conv()
    net[1] = nn.BatchNorm2d(4, affine=False, track_running_stats=False)
    maml, tasks = methods.CAVIA(net, layers="0.weight", **OPTIONS), classify(**IMAGES)
    with pytest.raises(NotImplementedError, match="no affine that could take"):
        maml.adapt(*tasks[:2]).module(0)
