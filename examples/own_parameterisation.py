"""A meta-parameterisation of your own, under forty lines: the inner loop changes the singular values of every weight, and nothing else.

    W = U diag(s) V^t      s adapted, its initial value and the biases outer-learned; U and V stay as the model was built (as in SVDiff, Han et al. 2023)
"""

import torch

import fastmaml
from fastmaml.parameterisation import Kind, Parameterisation


class SingularValues(Parameterisation):
    name = "singular_values"

    def declare(self, network):
        """The leaves it brings, called singular_values.<name>. Once, when MAML is built."""
        self.names = list(network.weights())
        for name in self.names:
            u, s, v = torch.linalg.svd(network.parameters[name].detach().flatten(1), full_matrices=False)
            self.constant(f"U.{name}", u)
            self.adapted(f"s.{name}", s)
            self.constant(f"V.{name}", v)

    def roles(self, network):
        """What becomes of the model's own parameters: "adapted", "outer" (outer-learned only) or "const"."""
        return {name: Kind("const" if name in self.names else "outer") for name in network.parameters}

    def rewrite(self, r):
        """The network reads an expression where it read its weight. Gradients and Hessian-vector products follow by themselves."""
        for name in self.names:
            scaled = r.mul(r.own(f"U.{name}"), r.own(f"s.{name}"))  # [out, k] * [k]
            r.substitute(name, r.reshape(r.matmul(scaled, r.own(f"V.{name}")), *r.shape(r.leaf(name))))


def main(iterations: int = 300) -> tuple[float, float]:
    torch.manual_seed(0)
    model = fastmaml.nn.MLP(1, 40, 40, 1, activation=torch.nn.Tanh)
    maml = fastmaml.MAML(model, inner_lr=0.02, inner_steps=3, loss="mse", parameterisation=SingularValues())
    optimizer = torch.optim.Adam(maml.parameters(), lr=3e-3)
    source, new = fastmaml.tasks.Sinusoid(seed=0), fastmaml.tasks.Sinusoid(seed=1).sample(100)
    with torch.no_grad():
        before = float(maml(new).loss)
    for _ in range(iterations):
        optimizer.zero_grad()
        maml(source.sample()).loss.backward()
        optimizer.step()
    with torch.no_grad():
        after = float(maml(new).loss)
    print(f"mean squared error on new sinusoids after 3 steps on singular values: {before:.2f} untrained, {after:.2f} after {iterations} meta-iterations")
    return before, after


if __name__ == "__main__":
    main()
