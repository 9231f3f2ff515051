"""For all tests: the benchmarks can be imported, though they are not installed."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))  # last, so that the package is the one under test
