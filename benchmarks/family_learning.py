"""Do the methods learn what they were made for? Error or accuracy on new tasks, after the same number of meta-iterations.

    python -m benchmarks.family_learning sinusoid [--iterations N] [--seed S]     # MAML, CAVIA, T-nets, MT-nets, low rank, a basis, Reptile
    python -m benchmarks.family_learning rates                                    # T-nets and MT-nets at three inner rates, as their authors
    python -m benchmarks.family_learning modes                                    # sinusoids, lines and parabolas: one initialisation, several, modulated
    python -m benchmarks.family_learning omniglot --data FOLDER                   # MAML, first order, iMAML, Meta-SGD, MAML++, ANIL, BOIL, FiLM, ProtoMAML
    python -m benchmarks.family_learning pretrained --data FOLDER                 # a pretrained body: its head alone, MTL
    python -m benchmarks.family_learning embeddings --data FOLDER                 # of that body: a linear classifier, LEO

The problems are those of ``benchmarks.family_problems``. Adam at 1e-3, the meta-gradient clipped to norm 10; 600 new tasks, the same for all, so that the
difference to the first method is one of pairs. Intervals are of 95 %, over tasks: they say nothing of other seeds of training.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.family_problems import PROBLEMS, Problem, problem
from fastmaml import methods
from fastmaml.training.evaluate import AT_ONCE, mean_and_interval

NEW = 600  # tasks
EPOCHS = 100  # of MAML++'s schedule, in a run of any length


def train(on: Problem, name: str, maml: nn.Module, iterations: int, seed: int) -> float:
    """Milliseconds per meta-iteration."""
    if not list(maml.parameters()):
        return 0.0  # a head from zero over fixed features: nothing is outer-learned
    source, optimizer = on.source("train", seed), torch.optim.Adam(maml.parameters(), lr=1e-3)
    schedule = methods.MAMLPlusPlusSchedule(maml) if name.startswith("MAMLPlusPlus") else None
    start = time.perf_counter()
    for i in range(iterations):
        if schedule:
            schedule.begin(EPOCHS * i // iterations)
        optimizer.zero_grad()
        maml(source.sample(on.tasks)).loss.backward()
        nn.utils.clip_grad_norm_([p for p in maml.parameters() if p.grad is not None], 10.0)
        optimizer.step()
    return 1e3 * (time.perf_counter() - start) / iterations


def on_new_tasks(on: Problem, maml: nn.Module, seed: int) -> Tensor:
    """[NEW]: the error or the accuracy of each."""
    source = on.source("test", seed)
    if isinstance(maml, methods.LEO):
        maml.eval()  # the means of its distributions
    with torch.no_grad():
        outs = [maml(source.sample(AT_ONCE)) for _ in range(NEW // AT_ONCE)]
    outs = [getattr(out, "query", out) for out in outs]  # LEO has its query set's MetaOutput there
    return torch.cat([out.task_losses if on.measure == "error" else out.task_accuracy for out in outs]).double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", choices=PROBLEMS)
    parser.add_argument("--data", type=Path, help="the folder with Omniglot's zips")
    parser.add_argument("--iterations", type=int, default=3000, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        on = problem(arguments.problem, arguments.data)
    except ValueError as error:
        parser.error(str(error))
    first = next(iter(on.methods))
    percent, digits = (100, 1) if on.measure == "accuracy" else (1, 3)
    print(f"{arguments.problem}, seed {arguments.seed}, {arguments.iterations} meta-iterations\n")
    print(f"| method | {on.measure} on {NEW} new tasks | difference to {first} | ms per meta-iteration |\n|---|---|---|---|")
    warnings.filterwarnings("ignore", message=".*not finite were left out")
    found: dict[str, Tensor] = {}
    for name, make in on.methods.items():
        torch.manual_seed(arguments.seed)
        maml = make()
        took = train(on, name, maml, arguments.iterations, arguments.seed)
        found[name] = percent * on_new_tasks(on, maml, arguments.seed)
        values = [found[name]] if name == first else [found[name], found[name] - found[first]]
        said = [f"{mean:+.{digits}f} ± {half:.{digits}f}" for mean, half in map(mean_and_interval, values)]
        print(f"| {name} | {said[0][1:]} | {said[1] if name != first else ''} | {took:.1f} |", flush=True)


if __name__ == "__main__":
    main()
