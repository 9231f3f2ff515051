"""What ``test_kernels.py`` cannot have itself: an option, and its table at the end."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest

RECORDS = pytest.StashKey[list[dict[str, Any]]]()
COLUMNS = (("us", 10, ".2f"), ("gflops", 8, ".1f"), ("share_of_peak", 6, ".0%"), ("gbs", 7, ".1f"), ("torch_us", 11, ".2f"), ("ratio", 7, ".2f"))
HEAD = ("us", "GFLOP/s", "peak", "GB/s", "torch us", "ratio")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--workload", metavar="TEXT", help="kernels of the workloads whose name contains TEXT ('': of all), not of the default ones")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORDS] = []
    config.option.benchmark_quiet = True  # its own table has a line of 200 characters for each record; --benchmark-verbose shows it


@pytest.fixture(scope="session")
def records(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return request.config.stash[RECORDS]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Of each workload the slowest kernel first."""
    natives = [r for r in config.stash[RECORDS] if r["who"] == "native"]
    order = list(dict.fromkeys(r["workload"] for r in natives))
    natives.sort(key=lambda r: (order.index(r["workload"]), -r["us"]))
    for workload, rows in groupby(natives, lambda r: r["workload"]):
        terminalreporter.section(workload)
        terminalreporter.line(f"{'kernel':34}" + "".join(f"{head:>{width}}" for head, (_, width, _) in zip(HEAD, COLUMNS, strict=True)) + "  shapes")
        for row in rows:
            shown = (f"{row[name]:{width}{form}}" if row.get(name) else "-".rjust(width) for name, width, form in COLUMNS)
            terminalreporter.line(f"{row['kernel']:34}" + "".join(shown) + f"  {row['shape']}")
