"""Task sources. Each has `sample(tasks=None, generator=None) -> TaskBatch` and is an endless iterable of TaskBatch.

Sources are seeded, draw on the CPU, and give the same numbers for any thread count. Their own stream is
`source.generator`, a torch.Generator: save and restore its state to resume a run.
"""

from fastmaml.tasks.glyphs import Glyphs
from fastmaml.tasks.omniglot import Omniglot
from fastmaml.tasks.sinusoid import Sinusoid

__all__ = ["Glyphs", "Omniglot", "Sinusoid"]
