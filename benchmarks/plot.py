"""The table as a picture: for each part a bar for the median of each row, on a logarithmic scale, with a line to its 99th percentile."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from rows import Row

TITLES = {"start": "/bin/true, from the call to its end", "warm": "Python"}
OURS, OTHERS = "#2a6f97", "#b0b7bd"
THEIRS = ("no jail", "unshare", "bubblewrap", "sandlock", "firejail", "crun", "runsc")


def draw(rows: list[Row], about: dict[str, object], directory: Path) -> None:
    """Writes bench.png and bench.svg; nothing where no part with a picture was measured."""
    parts = {part: [row for row in rows if row.part == part] for part in TITLES}
    parts = {part: found for part, found in parts.items() if found}
    if not parts:
        return
    mpl.rcParams["svg.hashsalt"] = "nsjail_py"  # the same picture is the same file
    figure, axes = plt.subplots(
        len(parts),
        1,
        figsize=(9, 0.6 + 0.32 * sum(len(found) + 3 for found in parts.values())),
        squeeze=False,
        gridspec_kw={"height_ratios": [len(found) + 2 for found in parts.values()]},
    )
    for axis, (part, found) in zip(axes[:, 0], parts.items(), strict=True):
        _bars(axis, TITLES[part], sorted(found, key=lambda row: row.median))
    figure.suptitle(f"{about['date']}, Linux {about['kernel']}, {about['processors']}", fontsize=8)
    figure.tight_layout()
    figure.savefig(directory / "bench.png", dpi=130)
    figure.savefig(directory / "bench.svg", metadata={"Date": None})
    plt.close(figure)


def _bars(axis: plt.Axes, title: str, found: list[Row]) -> None:
    places = range(len(found))
    colours = [OTHERS if any(word in row.name for word in THEIRS) else OURS for row in found]
    late = [max(0.0, row.p99 - row.median) for row in found]
    axis.barh(
        places,
        [row.median for row in found],
        color=colours,
        xerr=[[0.0] * len(found), late],
        error_kw={"elinewidth": 0.8, "ecolor": "#555"},
    )
    for place, row in zip(places, found, strict=True):
        axis.text(
            row.median,
            place,
            f" {row.median:.2g} " if row.median < 10 else f" {row.median:.0f} ",
            va="center",
            ha="right",
            fontsize=7,
            color="white",
        )
    axis.set_yticks(places, [row.name for row in found], fontsize=8)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlim(left=min(row.median for row in found) / 3)
    axis.set_xlabel("milliseconds, median, and to the 99th percentile", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.set_title(title, fontsize=9, loc="left")
