"""What `make demo` shows: the sinusoid, the letters, the same meta-iteration by hand. Three minutes, no download.

python examples/demo.py [--seed S] [--out FOLDER] [--quick]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import common
import glyphs
import plain_torch
import sinusoid


def main(seed: int, out: Path, quick: bool) -> None:
    start = time.perf_counter()
    share = 50 if quick else 1
    files = [sinusoid.main(sinusoid.ITERATIONS // share, seed, out)]
    print()
    maml, pictures = glyphs.main(glyphs.ITERATIONS // share, seed, out)
    print()
    plain_torch.main(maml, glyphs.INNER_LR, seed)
    print(f"\n{time.perf_counter() - start:.0f} seconds. Look at")
    for file in files + pictures:
        print("  ", common.shown(file))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=common.at_least(0), default=0, help="default %(default)s")
    parser.add_argument("--out", type=Path, default=common.OUT, help="folder for the pictures (default build/demo)")
    parser.add_argument("--quick", action="store_true", help="a fiftieth of the training: does everything run?")
    arguments = parser.parse_args()
    common.check_folder(arguments.out, parser)
    main(arguments.seed, arguments.out, arguments.quick)
