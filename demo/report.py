"""The demo's result as JSON, as a table and as a picture."""

import json
from pathlib import Path
from typing import Any

COMPARED = (
    ("before", "accuracy_before"),
    ("every device alone, mean", "accuracy_local_mean"),
    ("federated head, no adapter", "accuracy_head_only"),
    ("pooled data: TF-IDF + logistic regression", "tfidf_lr"),
    ("pooled data: linear probe, frozen encoder", "linear_probe"),
    ("federated, after", "accuracy_after"),
)
"""What the result is compared with, on modules that no device has seen: name, key of the report."""
OURS, OTHER, FAULT = "#0969da", "#afb8c1", "#bc4c00"
STYLE = {
    "svg.hashsalt": "rankfleet",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def write(home: Path, report: dict[str, Any], rounds: list[dict[str, Any]]) -> None:
    """`report.json`, `demo.png` and `demo.svg`."""
    (home / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    plot(home, report)


def text(r: dict[str, Any]) -> str:
    """What the last screen shows."""
    lines = ["", f"  {'accuracy on held-out modules':44} {'':>7}"]
    for name, key in COMPARED:
        lines.append(f"    {name:42} {100 * r[key]:6.1f}%")
    lines.append(f"    {'same prediction in plain peft':42} {100 * r['accuracy_peft_agreement']:6.2f}%")
    lines += [*_cost(r), "", "  arms (the last three rounds), and why the last one"]
    for name, d in r["devices"].items():
        lines.append(f"    {name:13} {', '.join(d['arms'][-3:])}")
        different = f"{len(set(d['arms']))} different ones in {len(d['arms'])} rounds"
        lines.append(f"    {'':13} {different}; {d['why']}")
    if r["killed"]:
        k = r["killed"]
        there = f"{k['chunks_there']} of {k['chunks']} chunks delivered"
        lines += ["", f"  killed: {k['broker']} and the agent of {k['agent']}, with {there};"]
        lines.append(f"    {r['chunks_resumed']} were resumed, none was counted twice")
    lines += ["", f"  idle agent {r['agent_idle_rss_mb']} MB; whole demo {r['wall_s']:.0f} s"]
    return "\n".join(lines)


def _cost(r: dict[str, Any]) -> list[str]:
    """What went over the link, and what dense uploads would have cost."""
    sent = r["bytes_up_total"]
    lines = ["", f"  uploaded, everything included {sent / 1e3:10,.0f} kB in {r['uploads']} updates"]
    for name, key in (
        (f"rank {r['largest_rank']}, all layers", "bytes_up_dense_lora"),
        ("the same arms", "bytes_up_dense_same_arms"),
    ):
        lines.append(f"    dense fp16, {name:18} {r[key] / 1e3:10,.0f} kB: {r[key] / sent:.1f} times as much")
    return lines


def plot(home: Path, report: dict[str, Any]) -> None:
    """`demo.svg` and `demo.png`: comparison, accuracy by version, arms. Equal reports, equal files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rooms = [["compared", "curve"], ["arms", "arms"]]
    with matplotlib.rc_context(STYLE):
        figure, axes = pyplot.subplot_mosaic(rooms, figsize=(9.6, 6.2), layout="constrained")
        _compared(axes["compared"], report)
        _curve(axes["curve"], report)
        _arms(axes["arms"], report)
        figure.savefig(home / "demo.svg", metadata={"Date": None})
        figure.savefig(home / "demo.png", dpi=110)
        pyplot.close(figure)
    # matplotlib leaves blanks at the ends of lines.
    lines = (home / "demo.svg").read_text(encoding="utf-8").splitlines()
    (home / "demo.svg").write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")


def _compared(axes: Any, report: dict[str, Any]) -> None:
    """One bar for each way to use the same data."""
    names, values = [n.replace(": ", ":\n") for n, _ in COMPARED], [100 * report[key] for _, key in COMPARED]
    bars = axes.barh(names, values, color=[*[OTHER] * (len(names) - 1), OURS])
    axes.bar_label(bars, fmt="%.1f%%", padding=3)
    axes.invert_yaxis()
    axes.set(title="Right on modules that no device has seen", xlim=(0, 1.2 * max(values)), xticks=[])


def _curve(axes: Any, report: dict[str, Any]) -> None:
    """What the devices measure on the tenth of their own data that they keep aside."""
    curve = [100 * v if v is not None else float("nan") for v in report["round_accuracy_held_out"]]
    axes.plot(range(len(curve)), curve, marker="o", markersize=4, color=OURS)
    if report["killed"]:
        axes.axvline(len(curve) // 2, color=FAULT, alpha=0.25, linewidth=8)
        axes.text(len(curve) // 2 + 0.6, 2, "kill -9: the broker\nand one agent", color=FAULT)
    axes.set(xlabel="version of the adapter", ylim=(0, None))
    axes.set_title("Right on the devices' own held-out tenths, %")


def _arms(axes: Any, report: dict[str, Any]) -> None:
    """One row per device, one cell per round: rank, depth and pruning; the colour is what the arm trains."""
    devices = report["devices"]
    cells = [[r * d for r, d in zip(own["rank"], own["depth"], strict=True)] for own in devices.values()]
    width = max(len(c) for c in cells)
    top = 1.6 * max(map(max, cells))
    colours = [c + [0] * (width - len(c)) for c in cells]
    axes.pcolormesh(colours, cmap="Blues", vmin=0, vmax=top, edgecolor="white", linewidth=2)
    for row, device in enumerate(devices.values()):
        arms = zip(device["rank"], device["depth"], device["prune"], strict=True)
        for column, (rank, depth, prune) in enumerate(arms):
            pruned = f"\n-{100 * prune:.0f}%" if prune else ""
            axes.text(column + 0.5, row + 0.5, f"r{rank} d{depth}{pruned}", ha="center", va="center")
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xticks([c + 0.5 for c in range(width)], range(1, width + 1))
    names = [f"{n}\n{d['bits']} bits" for n, d in devices.items()]
    axes.set_yticks([r + 0.5 for r in range(len(devices))], names)
    axes.set_title("What each device was given: rank r, depth d, share of heads and channels cut")
    axes.set_xlabel("round")
