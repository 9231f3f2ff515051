"""The pictures of a report: speed-up by workload, measured against floor, time against what grows, memory against inner steps."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.peers import META_GRAD, PLAIN, is_mine
from fastmaml.files import whole_file

OURS_COLOUR, PLAIN_COLOUR = "#1f6feb", "#9a9a9a"
PALETTE = ("#9a9a9a", "#c7c7c7", "#d98b3f", "#8c6bb1", "#5aa469", "#b35c5c", "#4f8fa8", "#c9a227", "#7f7f3f", "#a05195", "#2f4b7c", "#d45087")
_OF = {
    "speed": [("speed-up by workload", "speed.png"), ("measured against floor", "floor.png")],
    "sweeps": [("time against what grows", "sweeps.png")],
    "threads": [("time against threads", "threads.png")],
    "memory": [("memory against inner steps", "memory.png")],
}


def of(part: str, machine: dict) -> list[tuple[str, str]]:
    """(what it shows, file) of the pictures of a part of the results. A machine whose peak is not known has no floor."""
    return [(what, file) for what, file in _OF.get(part, []) if file != "floor.png" or machine["peak_gflops"]]


def draw(result: dict, folder: Path) -> None:
    """All pictures for which there are rows, as PNG, each whole or not at all."""
    makers = {"speed.png": ("speed", _speed), "floor.png": ("speed", _floor), "sweeps.png": ("sweeps", _sweeps), "threads.png": ("threads", _threads), "memory.png": ("memory", _memory)}
    for file, (part, make) in makers.items():
        if result.get(part) and file in dict(map(reversed, of(part, result["machine"]))):
            buffer = io.BytesIO()
            make(result[part]).savefig(buffer, format="png", dpi=110, bbox_inches="tight")
            with whole_file(folder / file) as out:
                out.write(buffer.getvalue())


def _workloads(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(r["workload"] for r in rows))


def _speed(rows: list[dict]) -> Figure:
    """Bars: time of each peer over that of meta_grad; whiskers p20 .. p80 of the ratio round by round."""
    names, peers = _workloads(rows), list(dict.fromkeys(r["peer"] for r in rows if not is_mine(r["peer"]) and "ratio" in r))
    groups = {name: [r for r in rows if r["workload"] == name and r["peer"] in peers and "ratio" in r] for name in names}
    figure = Figure(figsize=(9, 0.6 + 0.24 * sum(len(g) + 1 for g in groups.values())))
    axes, y, ticks = figure.subplots(), 0.0, []
    colours = dict(zip(peers, PALETTE * 2, strict=False))
    for name, group in groups.items():
        first = y
        for r in sorted(group, key=lambda r: peers.index(r["peer"])):
            axes.barh(y, r["ratio"], 0.85, color=colours[r["peer"]], label=r["peer"])
            axes.plot([r["ratio_p20"], r["ratio_p80"]], [y, y], color="black", linewidth=1)
            axes.text(max(r["ratio"], r["ratio_p80"]) * 1.05, y, f"{r['ratio']:.3g}x", va="center", fontsize=8)
            y += 1
        ticks.append(((first + y - 1) / 2, name))
        y += 1
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks])
    axes.axvline(1, color=OURS_COLOUR)
    axes.set(xscale="log", xlabel="time of one meta-iteration over that of fastmaml (meta_grad), same rounds")
    axes.set_xlim(left=0.8, right=2.5 * max((r["ratio"] for g in groups.values() for r in g), default=2))
    axes.set_ylim(y - 0.5, -1)
    _plain(axes.xaxis, "{x:g}x")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys(), fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    _clean(axes)
    return figure


def _floor(rows: list[dict]) -> Figure:
    """Bars of meta_grad's time beside the arithmetic at the machine's measured peak."""
    mine = [r for r in rows if r["peer"] == META_GRAD and "median_ms" in r and "gflop" in r]
    figure = Figure(figsize=(9, 0.8 + 0.5 * len(mine)))
    axes = figure.subplots()
    for y, r in enumerate(mine):
        floor = r["gflop"] / r["peak_gflops"] * 1e3
        axes.barh(y - 0.2, r["median_ms"], 0.36, color=OURS_COLOUR, label="measured (meta_grad)")
        axes.barh(y + 0.2, floor, 0.36, color="#b9d3ff", label="its arithmetic at the measured peak")
        axes.text(r["median_ms"] * 1.05, y - 0.2, f"{r['median_ms']:.4g} ms = {r['median_ms'] / floor:.2g} floors", va="center", fontsize=8)
    axes.set_yticks(range(len(mine)), [r["workload"] for r in mine])
    axes.set(xscale="log", xlabel="ms")
    axes.set_xlim(right=8 * max((r["median_ms"] for r in mine), default=1))
    axes.invert_yaxis()
    _plain(axes.xaxis)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys(), fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    _clean(axes)
    return figure


def _sweeps(rows: list[dict]) -> Figure:
    found = list(dict.fromkeys(r["axis"] for r in rows))
    figure = Figure(figsize=(4.2 * len(found), 3.4), layout="constrained")
    for axes, axis in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        for peer, colour in ((META_GRAD, OURS_COLOUR), (PLAIN, PLAIN_COLOUR)):
            mine = [r for r in rows if r["axis"] == axis and r["peer"] == peer]
            axes.plot([r["at"] for r in mine], [r["median_ms"] for r in mine], "o", color=colour, label=peer)
            axes.plot([r["at"] for r in mine], [r.get("line_ms", r["median_ms"]) for r in mine], "-", color=colour, linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel=axis.replace("_", " "), ylabel="ms")
        at = sorted({r["at"] for r in rows if r["axis"] == axis})
        axes.set_xticks(at, at)
        _plain(axes.yaxis)
        axes.xaxis.set_minor_formatter("")
        axes.legend(fontsize=8)
        _clean(axes)
    return figure


def _threads(rows: list[dict]) -> Figure:
    def panel(axes: Axes, mine: list[dict]) -> None:
        for tasks in sorted({r["tasks"] for r in mine}):
            line = [r for r in mine if r["tasks"] == tasks]
            axes.plot([r["threads"] for r in line], [r["speedup"] for r in line], "o-", label=f"{tasks} task{'' if tasks == 1 else 's'}")
        most = max(r["threads"] for r in mine)
        axes.plot([1, most], [1, most], ":", color="black", linewidth=1)
        axes.set(xlabel="threads", ylabel="speed-up over one thread", xticks=sorted({r["threads"] for r in mine}))

    return _panels(rows, panel)


def _memory(rows: list[dict]) -> Figure:
    def panel(axes: Axes, mine: list[dict]) -> None:
        for peer, colour in ((META_GRAD, OURS_COLOUR), (PLAIN, PLAIN_COLOUR)):
            line = [r for r in mine if r["peer"] == peer and "above_mb" in r]
            axes.plot([r["inner_steps"] for r in line], [r["above_mb"] for r in line], "o-", color=colour, label=peer)
        axes.set(xlabel="inner steps", ylabel="peak MB above import and data", yscale="log", xticks=sorted({r["inner_steps"] for r in mine}))
        _plain(axes.yaxis)

    return _panels(rows, panel)


def _panels(rows: list[dict], panel: Callable[[Axes, list[dict]], None]) -> Figure:
    """One for each workload."""
    names = _workloads(rows)
    figure = Figure(figsize=(4.4 * len(names), 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        panel(axes, [r for r in rows if r["workload"] == name])
        axes.set_title(name, fontsize=9)
        axes.legend(fontsize=8)
        _clean(axes)
    return figure


def _plain(axis, text: str = "{x:g}") -> None:
    """Numbers of a logarithmic axis as they are read."""
    axis.set_major_formatter(text)
    axis.set_minor_formatter("")


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, which="major")
    axes.set_axisbelow(True)
