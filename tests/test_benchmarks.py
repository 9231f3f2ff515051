"""The benchmarks: every way of computing a workload gives one meta-gradient, and a wrong one gets no speed. The commands: test_benchmark_commands.py."""

from __future__ import annotations

import copy
import os
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastmaml
from benchmarks import pictures, protocol, run, sweeps
from benchmarks.child import gradient, single_tasks
from benchmarks.cuda_graph import graphed
from benchmarks.libraries import LIBRARIES
from benchmarks.peers import LOWER, META_GRAD, OURS, PEERS, PLAIN, Peer, is_mine, maml_of, plain_loop
from benchmarks.worker import Failed, Worker
from benchmarks.workloads import DEFAULT, WORKLOADS, Workload, find

ROOT = Path(__file__).parent.parent
SINUSOID = WORKLOADS["sinusoid, cbfinn"]
MACHINE = {"cpu", "flags", "device", "precision", "tier", "threads", "peak_gflops", "versions", "commit"}


# ------------------------------------------------------------------------------------------------- workloads, peers
COUNTS = {  # all parameters, and those that the inner loop changes: section 2 of the reference systems' notes
    "sinusoid, cbfinn": (1761, 1761),
    "sinusoid, learn2learn": (1153, 1153),
    "Omniglot FC, learn2learn": (247_621, 247_621),
    "Omniglot strided, cbfinn": (112_005, 111_749),
    "Omniglot strided 20-way, cbfinn": (112_980, 112_724),
    "Omniglot strided, learn2learn": (112_261, 112_261),
    "Omniglot valid, dragen1860": (91_781, 91_781),
    "Omniglot conv3, higher": (75_205, 75_205),
    "Omniglot conv4-64, HTYMAML": (112_261, 111_749),
    "mini-ImageNet conv4-32, cbfinn": (32_773, 32_645),
    "mini-ImageNet valid, dragen1860": (32_901, 32_901),
    "mini-ImageNet conv4-48, HTYMAML": (70_085, 69_701),
    "mini-ImageNet conv4-64, pytorch-maml": (121_093, 120_581),
    "mini-ImageNet conv4-64, learn2learn": (121_093, 121_093),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_are_the_references(name: str) -> None:
    w = WORKLOADS[name]
    model = w.model()
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    assert (sum(sizes.values()), sum(sizes[n] for n in w.adapted(model))) == COUNTS[name]


def test_names_carry_changes() -> None:
    w = SINUSOID.varied(tasks=3, inner_lr=0.5, first_order=True, filters=0)
    assert find(w.name) == w and find(SINUSOID.name) is SINUSOID
    for wrong in ("no such", "sinusoid, cbfinn [taskz=3]"):
        with pytest.raises(KeyError):
            find(wrong)
    assert set(DEFAULT) <= set(WORKLOADS)


@pytest.mark.parametrize("w", [w.varied(tasks=1, queries=1) for w in WORKLOADS.values()], ids=lambda w: w.name)
def test_workloads_run_natively(w: Workload) -> None:
    x = w.sample(0)[0]
    assert x.shape[:2] == (1, w.shots * (w.ways if w.image else 1))
    assert maml_of(w)._executor(fastmaml.TaskBatch.of(w.sample(0)), None, None, "train").name == "cpu"


@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize(
    "w",
    [
        WORKLOADS["Omniglot strided, cbfinn"].varied(tasks=2, inner_steps=2, filters=3, inner_lr=0.05),
        WORKLOADS["Omniglot conv4-64, pytorch-maml"].varied(tasks=2, queries=2, inner_steps=2, filters=3),
        WORKLOADS["Omniglot conv3, higher"].varied(tasks=2, shots=1, queries=2, inner_steps=2, filters=3),
        SINUSOID.varied(inner_steps=2),
    ],
    ids=["strided, sum", "pooled", "running statistics", "sinusoid"],
)
def test_one_meta_gradient(w: Workload, first_order: bool) -> None:
    """Of those that are in the benchmark; torch.compile of one of them would take minutes, and JAX computes in float32."""
    w = w.varied(first_order=first_order)
    torch.manual_seed(0)
    model, tasks = w.model().double(), tuple(v.double() if v.is_floating_point() else v for v in w.sample(0))
    found = {}
    for name, peer in {**OURS, **PEERS, **LIBRARIES}.items():
        if "compile" in name or "JAX" in name or peer.absent(w):
            continue
        mine = copy.deepcopy(model)
        peer.make(mine, w)(tasks)
        found[name] = gradient(mine)
    truth = found[PLAIN]
    assert len(found) >= 5
    for name, g in found.items():
        assert (g - truth).norm() <= 1e-9 * truth.norm(), name


def test_jax_agrees() -> None:
    w = WORKLOADS["Omniglot conv4-64, pytorch-maml"].varied(tasks=2, queries=1, filters=3)
    for name in (n for n in LIBRARIES if "JAX" in n):
        if why := LIBRARIES[name].absent(w):
            pytest.skip(why)
        torch.manual_seed(0)
        model = w.model()
        mine = copy.deepcopy(model)
        LIBRARIES[name].make(mine, w)(w.sample(0))
        plain_loop(model, w)(w.sample(0))
        assert (gradient(mine) - gradient(model)).norm() <= 1e-4 * gradient(model).norm()


def test_single_tasks_are_as_many_as_asked_for() -> None:
    tasks = list(single_tasks(SINUSOID.varied(tasks=2), 5))
    assert len(tasks) == 5 and all(len(v) == 1 for task in tasks for v in task)
    assert len({float(task[1].sum()) for task in tasks}) == 5


# ------------------------------------------------------------------------------------------------- on a GPU
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [PLAIN, "torch.func vmap"])
def test_a_captured_peer_gives_the_same_gradient(name: str) -> None:
    w = SINUSOID.varied(tasks=3)
    torch.manual_seed(0)
    model = w.model().cuda()
    step, captured = PEERS[name].make(model, w), graphed(PEERS[name]).make(model, w)
    for seed in (1, 2):  # captured with the first; replayed with others, and with other weights
        tasks = tuple(v.cuda() for v in w.sample(seed))
        model.zero_grad()
        loss = step(tasks)
        want = gradient(model)
        model.zero_grad()
        torch.testing.assert_close(captured(tasks), loss)
        captured(tasks)  # adds
        torch.testing.assert_close(gradient(model), 2 * want)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.1)


def test_what_a_captured_peer_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: a graph that was just captured has in its gradients what the capture left there."""
    for name in ("Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, lambda: SimpleNamespace(wait_stream=lambda other: None, replay=lambda: None))
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    w = SINUSOID.varied(tasks=3)
    for peer in (PEERS[PLAIN], OURS[META_GRAD]):
        torch.manual_seed(0)
        model = w.model()
        tasks = w.sample(1)
        loss = peer.make(model, w)(tasks)
        want = gradient(model)
        model.zero_grad()
        captured = graphed(peer).make(model, w)
        own = next(model.parameters()).grad = torch.zeros_like(next(model.parameters()))
        assert torch.equal(captured(tasks), loss) and torch.equal(gradient(model), want)
        captured(tasks)  # adds
        assert next(model.parameters()).grad is own
        torch.testing.assert_close(gradient(model), 2 * want)


def test_a_device_that_is_not_there_is_an_error() -> None:
    assert run._unusable("cpu") is None and run._unusable("meta") == "expected cpu or cuda"
    assert run._unusable("cuda:99").startswith("torch sees ") and "tpu" in run._unusable("tpu")


def test_results_of_a_gpu_have_a_folder_and_no_floor() -> None:
    here = {"cpu": "Intel(R) Xeon(R) CPU @ 2.60GHz", "threads": 2, "device": "cpu", "peak_gflops": 300}
    there = here | {"device": "NVIDIA H100 80GB HBM3, CUDA 13.0", "peak_gflops": None}
    assert protocol.folder_of(here).name.endswith("-intel-xeon-2t") and protocol.folder_of(there).name.endswith("-nvidia-h100-80gb-hbm3")
    assert [file for _, file in pictures.of("speed", there)] == ["speed.png"] and len(pictures.of("speed", here)) == 2


# ------------------------------------------------------------------------------------------------- workers
BROKEN = '''
import time, torch
from benchmarks.peers import PEERS, Peer
plain = PEERS["plain loop"].make
def wrong(model, w):
    step = plain(model, w)
    def scaled(tasks):
        loss = step(tasks)
        with torch.no_grad():
            for p in model.parameters(): p.grad *= 1.001
        return loss
    return scaled
def make(what):
    def maker(model, w): return lambda tasks: what()
    return maker
broken = Peer("broken", wrong)
sleeper = Peer("sleeper", make(lambda: time.sleep(60)))
hoarder = Peer("hoarder", make(lambda: [torch.ones(2**26) for _ in range(200)] and time.sleep(60)))
quitter = Peer("quitter", make(lambda: __import__("os")._exit(3)))
victim = Peer("victim", make(lambda: __import__("os").kill(__import__("os").getpid(), 9)))
raiser = Peer("raiser", make(lambda: 1 / 0))
'''


@pytest.fixture
def mine(tmp_path: Path, monkeypatch):
    """Peers of one's own, by name."""
    (tmp_path / "own_peers.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return lambda name: Peer(f"own_peers:{name}", lambda model, w: None)


@pytest.mark.slow
def test_a_wrong_gradient_gets_no_speed(mine) -> None:
    settings = protocol.Settings(threads=1, budget=0, agreement=5)
    medium = LOWER[f"{META_GRAD}, medium"]
    rows = {r["peer"]: r for r in protocol.measure(SINUSOID.varied(tasks=3), [medium, PEERS[PLAIN], mine("broken")], settings)}
    row = rows["own_peers:broken"]
    assert 5e-4 < row["error"] < 2e-3 and row["reason"].startswith("no speed, for its error 1.0e-03 is over 3 times the plain loop's")
    assert not {"median_ms", "ratio", "iteration_ms"} & set(row)
    assert (rows[medium.name]["precision"], rows[medium.name]["allowed"]) == medium.lower and not any("precision" in r for name, r in rows.items() if name != medium.name)
    for name in (*OURS, medium.name, PLAIN):
        assert rows[name]["median_ms"] > 0 and rows[name]["error"] < 1e-6 and "reason" not in rows[name]
    assert rows[META_GRAD]["ratio"] == 1 and rows[META_GRAD]["gflop"] > 0 and rows[META_GRAD]["decisions"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("sleeper", "not finished in 1 s"),
        ("hoarder", "took over 1.5 GB"),
        ("quitter", "its process ended with status 3"),
        ("victim", "its process ended with status -9 (killed: as a rule all processes together took more memory than there is)"),
        ("raiser", "ZeroDivisionError: division by zero"),
        ("absent", "AttributeError: module 'own_peers' has no attribute 'absent'"),
    ],
)
def test_what_fails_says_why(name: str, why: str, mine) -> None:
    with Worker(1, seconds=240, megabytes=1500) as worker, pytest.raises(Failed) as failed:
        worker.ask("make", "", SINUSOID.name, mine(name).name)
        worker.seconds = 1 if name == "sleeper" else 240
        worker.ask("first", "")
    assert str(failed.value).startswith(why)


def test_turns() -> None:
    wants = protocol._wants
    assert wants([], 0) and not wants([[1.0]], 0)  # one turn at least
    assert wants([[0.01] * 299], 1) and not wants([[0.01] * 300], 1)  # small workloads: 300 calls
    assert wants([[1.0] * 9], 10) and not wants([[1.0] * 10], 10)
    assert protocol.quantiles([2.0]) == (2.0, 2.0, 2.0)
    assert protocol.quantiles([1.0, 2.0]) == pytest.approx((1.2, 1.5, 1.8))  # inside of what was measured
    low, middle, high = protocol.quantiles([1.0, 2.0, 3.0, 4.0, 5.0])
    assert low < middle == 3.0 < high


class Answers:
    """A worker that fails at its second turn."""

    def __init__(self, fails: bool) -> None:
        self.turns, self.fails, self.closed = 0, fails, False

    def ask(self, what: str, *arguments: object) -> list[float]:
        self.turns += 1
        if self.fails and self.turns == 2:
            raise Failed("took over 1 GB")
        return [0.1]

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("turns", [0, 1], ids=["first turn", "second turn"])
def test_a_peer_may_fail_in_its_turn(turns: int) -> None:
    workers = {META_GRAD: Answers(False), "other": Answers(True)}
    workers["other"].turns = 1 - turns
    rows = {name: {"workload": "w"} for name in workers}
    protocol._take_turns(workers, rows, protocol.Settings(budget=0.35), lambda text: None)
    assert rows["other"] == {"workload": "w", "reason": "took over 1 GB"} and list(workers) == [META_GRAD]
    assert rows[META_GRAD]["ratio"] == 1 and rows[META_GRAD]["repetitions"] == 4


def test_nobody_is_measured_without_a_judge() -> None:
    workers, rows = {"other": Answers(False)}, {"other": {"error": 1e-7}, PLAIN: {"reason": "took over 10 GB"}}
    other = workers["other"]
    protocol._judge(rows, workers)
    assert not workers and other.closed and rows["other"]["reason"] == "no speed, for the plain loop gave no error to judge it by"


def test_lower_precisions_have_bounds_of_their_own() -> None:
    """They are measured on a GPU alone; the rows that are compared with peers are in float32."""
    high, medium = LOWER
    rows = {high: {"error": 4e-3, "allowed": 5e-3}, medium: {"error": 4e-2, "allowed": 3e-2}, META_GRAD: {"error": 4e-3}, PLAIN: {"error": 1e-6}}
    workers = {name: Answers(False) for name in rows}
    protocol._judge(rows, workers)
    assert list(workers) == [high, PLAIN]
    assert rows[medium]["reason"] == "no speed, for its error 4.0e-02 is over what its precision allows, 0.03"
    assert rows[META_GRAD]["reason"] == "no speed, for its error 4.0e-03 is over 3 times the plain loop's 1.0e-06"
    assert maml_of(SINUSOID).precision == "highest"
    args = Namespace(device="cuda", peers=None, quick=False, complete=True, own=[])
    on_gpu, on_cpu = ({p.name for p in run.peers_of(args, SINUSOID)} for args.device in ("cuda", "cpu"))
    assert on_gpu - on_cpu == {*LOWER, *(f"{name} in a CUDA graph" for name in (META_GRAD, *LOWER, *on_cpu))}
    assert all(is_mine(name) for name in (*OURS, *LOWER, f"{high} in a CUDA graph")) and not any(map(is_mine, on_cpu))
    assert graphed(LOWER[high]).lower == LOWER[high].lower


def test_straight_line() -> None:
    a, b = sweeps.straight_line([1, 2, 5, 50], [3 + 2 * x for x in (1, 2, 5, 50)])
    assert abs(a - 3) < 1e-9 and abs(b - 2) < 1e-9
    _, slope = sweeps.straight_line([1, 2, 100], [1.0, 2.0, 300.0])  # the long time is one of three, not all that counts
    assert slope < 2.5
