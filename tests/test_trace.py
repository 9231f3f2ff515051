"""trace: every layer, functional form and shape query against the module itself in float64; refusals by name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers_program import Fn, agrees, op_names
from torch import Tensor, nn

from fastmaml.trace import TraceError, trace


def beta_only() -> nn.Module:
    norm = nn.BatchNorm2d(3, eps=1e-3)
    norm.register_parameter("weight", None)
    return norm


def gamma_only() -> nn.Module:
    norm = nn.BatchNorm2d(3)
    norm.register_parameter("bias", None)
    return norm


LAYERS = {
    "linear": (nn.Linear(7, 3), (7,)),
    "linear without bias": (nn.Linear(7, 1, bias=False), (7,)),
    "linear on sequences": (nn.Linear(7, 3), (5, 7)),
    "conv": (nn.Conv2d(3, 4, 3), (3, 9, 7)),
    "conv 1x1": (nn.Conv2d(3, 4, 1, bias=False), (3, 1, 1)),
    "conv stride padding": (nn.Conv2d(3, 4, (5, 2), stride=(2, 3), padding=(2, 1)), (3, 9, 7)),
    "conv same odd": (nn.Conv2d(3, 4, (3, 5), padding="same"), (3, 9, 7)),
    "conv same even": (nn.Conv2d(3, 4, (4, 2), padding="same"), (3, 9, 7)),
    "conv valid": (nn.Conv2d(3, 4, 3, padding="valid", stride=2), (3, 9, 7)),
    "zeropad": (nn.ZeroPad2d((1, 2, 0, 3)), (3, 5, 4)),
    "batchnorm": (nn.BatchNorm2d(3, eps=1e-3), (3, 5, 4)),
    "batchnorm 1d": (nn.BatchNorm1d(3), (3,)),
    "batchnorm sequences": (nn.BatchNorm1d(3), (3, 7)),
    "batchnorm momentum none": (nn.BatchNorm2d(3, momentum=None), (3, 5, 4)),
    "batchnorm plain": (nn.BatchNorm2d(3, affine=False, track_running_stats=False), (3, 5, 4)),
    "batchnorm eval untracked": (nn.BatchNorm2d(3, track_running_stats=False).eval(), (3, 5, 4)),
    "batchnorm beta": (beta_only(), (3, 5, 4)),
    "batchnorm gamma": (gamma_only(), (3, 5, 4)),
    "layernorm": (nn.LayerNorm(7), (5, 7)),
    "layernorm image": (nn.LayerNorm((3, 5, 4), eps=1e-3), (3, 5, 4)),
    "layernorm plain": (nn.LayerNorm(7, elementwise_affine=False), (7,)),
    "layernorm gamma": (nn.LayerNorm(7, bias=False), (7,)),
    "groupnorm": (nn.GroupNorm(2, 6), (6, 5, 4)),
    "groupnorm plain": (nn.GroupNorm(3, 6, affine=False), (6,)),
    "relu": (nn.ReLU(), (7,)),
    "leaky relu": (nn.LeakyReLU(0.2), (7,)),
    "tanh": (nn.Tanh(), (7,)),
    "sigmoid": (nn.Sigmoid(), (7,)),
    "elu": (nn.ELU(0.7), (7,)),
    "gelu": (nn.GELU(), (7,)),
    "gelu tanh": (nn.GELU("tanh"), (7,)),
    "silu": (nn.SiLU(), (7,)),
    "softplus": (nn.Softplus(2.0, 5.0), (7,)),
    "maxpool": (nn.MaxPool2d(2), (3, 9, 7)),
    "maxpool stride padding": (nn.MaxPool2d((3, 2), stride=(1, 2), padding=(1, 0)), (3, 9, 7)),
    "avgpool": (nn.AvgPool2d(3, stride=2, padding=1), (3, 9, 7)),
    "avgpool no pad count": (nn.AvgPool2d(3, 2, 1, count_include_pad=False), (3, 9, 7)),
    "adaptive 1": (nn.AdaptiveAvgPool2d(1), (3, 9, 7)),
    "adaptive tiles": (nn.AdaptiveAvgPool2d((3, None)), (3, 9, 7)),
    "flatten": (nn.Flatten(), (3, 2, 5)),
    "unflatten": (nn.Unflatten(1, (3, -1)), (12,)),
    "identity": (nn.Sequential(nn.Identity(), nn.Dropout(0.0), nn.Dropout2d(0.3).eval()), (7,)),
    "nested": (nn.Sequential(nn.Sequential(nn.Linear(7, 5), nn.Tanh()), nn.ModuleList([nn.Linear(5, 2)])[0]), (7,)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str) -> None:
    agrees(*LAYERS[name])


def functional_conv_net(m: nn.Module, x: Tensor) -> Tensor:
    x = F.relu(F.conv2d(x, m.w, m.b, stride=2, padding=1), inplace=True)
    x = F.batch_norm(x, None, None, m.gamma, m.beta, training=True, eps=1e-3)
    x = F.max_pool2d(F.leaky_relu_(x, 0.1), 2)
    return F.linear(x.view(x.size(0), -1), m.head)


FUNCTIONS = {
    "conv net": (Fn(functional_conv_net, w=(4, 3, 3, 3), b=(4,), gamma=(4,), beta=(4,), head=(2, 16)), (3, 9, 7)),
    "torch.conv2d": (Fn(lambda m, x: torch.conv2d(x, m.w, None, 1, (0, 1)), w=(4, 3, 2, 3)), (3, 9, 7)),
    "pad conv": (Fn(lambda m, x: F.conv2d(F.pad(x, (0, 1, 0, 1)), m.w, stride=2), w=(4, 3, 3, 3)), (3, 8, 6)),
    "pad width": (Fn(lambda m, x: F.pad(x, [2, 0], "constant", 0)), (3, 4, 5)),
    "layer norm": (Fn(lambda m, x: F.layer_norm(x, x.shape[1:], m.g, m.b), g=(3, 4), b=(3, 4)), (3, 4)),
    "group norm": (Fn(lambda m, x: F.group_norm(x, 2, bias=m.b), b=(4,)), (4, 3, 3)),
    "activations": (
        Fn(lambda m, x: F.softplus(F.silu(F.gelu(F.elu(torch.relu(x).tanh().sigmoid())), inplace=True))),
        (7,),
    ),
    "exp": (Fn(lambda m, x: x.exp()), (7,)),
    "methods": (Fn(lambda m, x: x.relu().tanh_().sigmoid().contiguous().clone().double().to(x.dtype), w=(1,)), (7,)),
    "pools": (
        Fn(lambda m, x: F.adaptive_avg_pool2d(F.avg_pool2d(F.max_pool2d(x, 2, 1), x.shape[2] - 2), 1)),
        (3, 5, 5),
    ),
    "mean 2 3": (Fn(lambda m, x: x.mean([2, 3])), (3, 5, 4)),
    "mean negative": (Fn(lambda m, x: torch.mean(x, dim=(-2, -1), keepdim=True)), (3, 5, 4)),
    "mean twice": (Fn(lambda m, x: x.mean(3).mean(2)), (3, 5, 4)),
    "mean twice other": (Fn(lambda m, x: x.mean(2).mean(axis=-1)), (3, 5, 4)),
    "mean of H": (Fn(lambda m, x: x.mean(2)), (3, 5, 4)),
    "mean of W": (Fn(lambda m, x: x.mean(-1, keepdim=True)), (3, 5, 4)),
    "mean sequences": (Fn(lambda m, x: x.mean(-1)), (3, 5)),
    "mean all but samples": (Fn(lambda m, x: x.mean((1, 2, 3), keepdim=True)), (3, 5, 4)),
    "mean after strided pool": (Fn(lambda m, x: F.avg_pool2d(x, 1, 2).flatten(1).mean(1, True)), (3, 1, 4)),
    "mean after a mean and a view": (Fn(lambda m, x: x.mean(3).view(-1, 8, 3).mean(2)), (4, 6, 5)),
    "residual": (Fn(lambda m, x: m.c(x).relu_() + x, c=nn.Conv2d(3, 3, 3, padding=1)), (3, 5, 4)),
    "residual in place": (Fn(lambda m, x: m.c(x).add_(x), c=nn.Conv2d(3, 3, 3, padding=1)), (3, 5, 4)),
    "sum": (Fn(lambda m, x: sum([m.a(x), m.b(x), x]), a=nn.Linear(5, 5), b=nn.Linear(5, 5)), (5,)),
    "flat input to image": (Fn(lambda m, x: x.view(-1, 1, 4, 5)), (20,)),
    "image input to image": (Fn(lambda m, x: x.reshape((-1, 1, 4, 5)).flatten(start_dim=1)), (4, 5)),
    "len int shape": (Fn(lambda m, x: x.view(len(x), int(x.shape[1] * x.size(2)), 1).view(x.size(0), -1)), (4, 5)),
    "view with size tuple": (Fn(lambda m, x: x.view((x.size(0), -1))), (4, 5)),
    "view as": (Fn(lambda m, x: x.flatten(1).view_as(x)), (4, 5)),
    "squeeze": (Fn(lambda m, x: x.unsqueeze(-1).squeeze(1)[:, None].squeeze((1, 3))), (1, 4)),
    "pooled pixel": (Fn(lambda m, x: F.adaptive_avg_pool2d(x, (1, 1))[:, :, 0, 0]), (3, 4, 5)),
    "index ellipsis": (Fn(lambda m, x: x[..., None][:, 0:4]), (4,)),
    "permute nothing": (Fn(lambda m, x: x.permute(0, 2, 3, 1).transpose(1, 2).flatten(1)), (4, 1, 1)),
    "shape control flow": (Fn(lambda m, x: x.flatten(1) if x.dim() > 2 and x.shape[2] > 1 else x), (4, 5)),
    "training flag": (Fn(lambda m, x: x.relu() if m.training else x.detach()), (4,)),
    "isinstance": (Fn(lambda m, x: x.relu() if isinstance(x, Tensor) and x.dtype.is_floating_point else None), (4,)),
    "dropout eval": (Fn(lambda m, x: F.dropout(F.dropout(x, 0.5, training=False), 0.0)), (4,)),
    "matmul": (Fn(lambda m, x: x @ m.w, w=(5, 3)), (5,)),
    "matmul bias": (Fn(lambda m, x: torch.relu(torch.matmul(x, m.w.t()) + m.b), w=(3, 5), b=(3,)), (5,)),
    "addmm": (Fn(lambda m, x: torch.addmm(m.b, x, m.w), w=(5, 3), b=(3,)), (5,)),
    "conv bias": (Fn(lambda m, x: F.conv2d(x, m.w) + m.b.view(1, -1, 1, 1), w=(4, 3, 2, 2), b=(4,)), (3, 5, 4)),
    "weights": (Fn(lambda m, x: F.linear(x, m.w * m.s + m.d, m.b[1:4]), w=(3, 5), s=(1, 5), d=(3, 1), b=(6,)), (5,)),
    "low rank": (Fn(lambda m, x: F.linear(x, m.w + m.a @ m.b), w=(3, 5), a=(3, 2), b=(2, 5)), (5,)),
    "rows of a bank": (Fn(lambda m, x: F.linear(x, m.w[1].view(3, 5)) + m.w[0, :3].T, w=(2, 15)), (5,)),
    "gates": (Fn(lambda m, x: F.linear(x, m.w * torch.sigmoid(m.g), m.b.exp()), w=(3, 5), g=(3, 5), b=(3,)), (5,)),
    "mask buffer": (Fn(lambda m, x: F.linear(x, m.w * m.mask), w=(3, 5), mask=torch.ones(3, 5).triu()), (5,)),
    "matrices": (Fn(lambda m, x: F.linear(x, m.w.transpose(0, 1).mT.permute(1, 0)), w=(5, 3)), (5,)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functional_form(name: str) -> None:
    agrees(*FUNCTIONS[name])


def test_a_second_mean_over_one_axis_becomes_the_global_mean() -> None:
    for order in ((3, 2), (2, 2)):
        assert op_names(agrees(Fn(lambda m, x, o=order: x.mean(o[0]).mean(o[1])), (3, 5, 4))) == ["global_avgpool2d"]


def test_padding_before_a_convolution_is_its_own() -> None:
    program = agrees(nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 4, 3, stride=2, padding=1)), (3, 8, 6))
    assert op_names(program) == ["conv2d"] and program.ops[0].attrs["padding"] == (1, 2, 1, 2)


def test_shape_ops_leave_no_op_behind() -> None:
    program = agrees(
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Unflatten(1, (3, 1)), nn.Flatten()), (3, 5, 4)
    )
    assert op_names(program) == ["global_avgpool2d"]


# ------------------------------------------------------------------ how reference code is written


class VariableList(nn.Module):
    """The way of dragen1860: a list of parameters walked by a configuration, statistics as frozen parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.config = [("conv", 2, 1), ("relu", True), ("bn",), ("flatten",), ("linear",)]
        shapes = [(4, 1, 3, 3), (4,), (4,), (4,), (3, 64), (3,)]
        self.vars = nn.ParameterList([nn.Parameter(torch.randn(s)) for s in shapes])
        frozen = [nn.Parameter(torch.zeros(4), requires_grad=False), nn.Parameter(torch.ones(4), requires_grad=False)]
        self.vars_bn = nn.ParameterList(frozen)

    def forward(self, x: Tensor, vars: list | None = None, bn_training: bool = True) -> Tensor:
        vars, i = self.vars if vars is None else vars, 0
        for kind, *given in self.config:
            if kind == "conv":
                x = F.conv2d(x, vars[i], vars[i + 1], stride=given[0], padding=given[1])
            elif kind == "relu":
                x = F.relu(x, inplace=given[0])
                continue
            elif kind == "bn":
                x = F.batch_norm(x, *self.vars_bn, weight=vars[i], bias=vars[i + 1], training=bn_training)
            elif kind == "flatten":
                x = x.view(x.size(0), -1)
                continue
            else:
                x = F.linear(x, vars[i], vars[i + 1])
            i += 2
        assert i == len(vars)
        return x

    def parameters(self, recurse: bool = True) -> nn.ParameterList:
        return self.vars


def test_parameter_list_network() -> None:
    program = agrees(VariableList(), (1, 8, 8))
    assert [leaf.name for leaf in program.leaves] == [f"vars.{i}" for i in range(6)]


class ExtraArguments(nn.Module):
    """The way of HowToTrainYourMAML: required arguments that are only passed on, layers called by their forward."""

    def __init__(self, per_step: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"norm": nn.BatchNorm1d(5), "linear": nn.Linear(5, 2)})
        self.gammas, self.per_step = nn.Parameter(torch.ones(3, 5)), per_step

    def forward(self, x: Tensor, num_step: int, params: dict | None = None, training: bool = False) -> Tensor:
        parts = {name.split(".")[0]: None for name, _ in self.layers.named_parameters()}
        assert list(parts) == ["norm", "linear"]
        gamma = self.gammas[num_step] if self.per_step else self.gammas[0]
        x = F.batch_norm(x, None, None, gamma, None, training=True)
        return self.layers["linear"].forward(F.leaky_relu(x))


def test_a_required_argument_may_be_passed_on_but_not_used() -> None:
    assert op_names(trace(ExtraArguments(False), (5,))) == ["slice", "reshape", "batchnorm", "leaky_relu", "linear"]
    with pytest.raises(TraceError, match="its argument 'num_step', which has no default"):
        trace(ExtraArguments(True), (5,))


class OwnLinear(nn.Linear):
    """The way of torchmeta: subclasses whose forward takes a dictionary of parameters."""

    def forward(self, input: Tensor, params: dict | None = None) -> Tensor:
        params = dict(self.named_parameters()) if params is None else params
        return F.linear(input, params["weight"], params.get("bias", None))


class OwnConv(nn.Conv2d):
    def forward(self, input: Tensor, params: dict | None = None) -> Tensor:
        params = dict(self.named_parameters()) if params is None else params
        return self._conv_forward(input, params["weight"], params.get("bias"))


def test_subclasses_with_a_forward_of_their_own() -> None:
    program = agrees(nn.Sequential(OwnConv(1, 2, 3), nn.Flatten(), OwnLinear(18, 3)), (1, 5, 5))
    assert [leaf.name for leaf in program.leaves] == ["0.weight", "0.bias", "2.weight", "2.bias"]


# ------------------------------------------------------------------ leaves


def test_leaves_names_and_roles() -> None:
    model = nn.Sequential(OrderedNet := nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    OrderedNet.weight.requires_grad_(False)
    leaves = {leaf.name: leaf.role for leaf in agrees(model, (4,)).leaves}
    assert leaves == {name: "outer" if p.requires_grad else "const" for name, p in model.named_parameters()}


def test_tied_parameters_are_one_leaf() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    program = agrees(model, (4,))
    assert [leaf.name for leaf in program.leaves] == ["0.weight", "0.bias", "2.bias"]
    assert program.ops[0].inputs[1] == program.ops[2].inputs[1]


def test_unused_parameters_are_no_leaves() -> None:
    assert [leaf.name for leaf in trace(Fn(lambda m, x: m.a(x), a=nn.Linear(3, 2), b=(5,)), (3,)).leaves] == [
        "a.weight",
        "a.bias",
    ]


def caches(m: nn.Module, x: Tensor) -> Tensor:
    m.calls, m.cache, m.seen = m.calls + 1, x.relu(), x.tanh()
    return m.cache


def test_the_model_is_not_changed() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trace(model, (4,))
    caching = Fn(caches, calls=0, seen=torch.zeros(4))
    trace(caching, (4,))
    assert caching.calls == 0 and not hasattr(caching, "cache") and type(caching.seen) is Tensor
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# ------------------------------------------------------------------ batch normalisation


def warmed_up() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)).double()
    model(torch.randn(9, 2, 4, 4, dtype=torch.float64))
    return model


def test_batchnorm_statistics() -> None:
    model = warmed_up()
    assert {op.attrs["statistics"] for op in trace(model, (2, 4, 4)).ops if op.name == "batchnorm"} == {"batch"}
    for eval_too in (False, True):
        for mode in ("batch", "support", "running"):
            program = trace(model.eval() if eval_too else model.train(), (2, 4, 4), batchnorm=mode)
            assert {op.attrs["statistics"] for op in program.ops if op.name == "batchnorm"} == {mode}
    program = agrees(model.eval(), (2, 4, 4), batchnorm="running")
    assert {"1.running_mean", "3.running_var"} <= {leaf.name for leaf in program.leaves if leaf.role == "const"}


def test_batchnorm_in_eval_mode_is_the_users_decision() -> None:
    model = warmed_up()
    model[3].eval()
    with pytest.raises(
        ValueError, match=r"layer '3' \(BatchNorm2d\).*batchnorm='batch'.*batchnorm='running'"
    ) as caught:
        trace(model, (2, 4, 4))
    assert not isinstance(caught.value, TraceError)


def test_running_statistics_that_are_not_there() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(ValueError, match=r"layer '1' \(BatchNorm1d\).*no running statistics") as caught:
        trace(model, (3,), batchnorm="running")
    assert not isinstance(caught.value, TraceError)
    with pytest.raises(ValueError, match="batchnorm='trnasductive'"):
        trace(model, (3,), batchnorm="trnasductive")


def test_functional_batchnorm_without_training_takes_running_statistics() -> None:
    buffers = {"mean": torch.randn(3), "var": torch.rand(3) + 0.5}
    agrees(Fn(lambda m, x: F.batch_norm(x, m.mean, m.var), **buffers), (3, 4))
