"""The demo's result as JSON, as a table and as a picture."""

import json
from pathlib import Path
from typing import Any


def write(home: Path, report: dict[str, Any], rounds: list[dict[str, Any]]) -> None:
    """`report.json` and `demo.png`."""
    (home / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    plot(home / "demo.png", report, rounds)


def text(r: dict[str, Any]) -> str:
    """What the last screen shows."""
    lines = ["", f"  {'accuracy on held-out modules':44} {'':>7}"]
    for name, key in (
        ("before", "accuracy_before"),
        ("every device alone, mean", "accuracy_local_mean"),
        ("federated head, no adapter", "accuracy_head_only"),
        ("pooled data: TF-IDF + logistic regression", "tfidf_lr"),
        ("pooled data: linear probe, frozen encoder", "linear_probe"),
        ("federated, after", "accuracy_after"),
    ):
        lines.append(f"    {name:42} {100 * r[key]:6.1f}%")
    lines.append(f"    {'same prediction in plain peft':42} {100 * r['accuracy_peft_agreement']:6.2f}%")
    lines += [*_cost(r), "", "  arms (the last three rounds), and why the last one"]
    for name, d in r["devices"].items():
        lines.append(f"    {name:13} {', '.join(d['arms'][-3:])}")
        lines.append(f"    {'':13} {len(set(d['arms']))} different ones in {len(d['arms'])} rounds; {d['why']}")
    if r["killed"]:
        k = r["killed"]
        lines += ["", f"  killed: {k['broker']} and the agent of {k['agent']}, with {k['chunks_there']} of {k['chunks']} chunks delivered;"]
        lines.append(f"    {r['chunks_resumed']} were resumed, none was counted twice")
    lines += ["", f"  idle agent {r['agent_idle_rss_mb']} MB; whole demo {r['wall_s']:.0f} s"]
    return "\n".join(lines)


def _cost(r: dict[str, Any]) -> list[str]:
    """What went over the link, and what dense uploads would have cost."""
    sent = r["bytes_up_total"]
    lines = ["", f"  uploaded, everything included {sent / 1e3:10,.0f} kB in {r['uploads']} updates"]
    for name, key in ((f"rank {r['largest_rank']}, all layers", "bytes_up_dense_lora"), ("the same arms", "bytes_up_dense_same_arms")):
        lines.append(f"    dense fp16, {name:18} {r[key] / 1e3:10,.0f} kB: {r[key] / sent:.1f} times as much")
    return lines


def plot(path: Path, report: dict[str, Any], rounds: list[dict[str, Any]]) -> None:
    """Accuracy per round beside the baselines; each device's rank and depth over the rounds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    curve = [v if v is not None else float("nan") for v in report["round_accuracy_held_out"]]
    left.plot(range(len(curve)), curve, marker="o", label="on the devices' own held-out tenths")
    for name, key, style in (
        ("federated, test set", "accuracy_after", "-"),
        ("federated head only", "accuracy_head_only", "--"),
        ("devices alone, mean", "accuracy_local_mean", ":"),
        ("pooled linear probe", "linear_probe", "-."),
    ):
        left.axhline(
            report[key], linestyle=style, color="0.45" if key != "accuracy_after" else "C3", label=f"{name}: {100 * report[key]:.1f}%"
        )
    if report["killed"]:
        left.axvline(len(curve) // 2, color="C1", alpha=0.3, linewidth=6, label="broker and one agent killed")
    left.set(xlabel="version of the global adapter", ylabel="accuracy", title="One model, four devices", ylim=(0, None))
    left.legend(fontsize=8, loc="lower right")
    _arms(right, report)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _arms(axes: Any, report: dict[str, Any]) -> None:
    """One row per device, one cell per round: rank, depth and pruning; the colour is what the arm trains."""
    names = list(report["devices"])
    cells = [[r * d for r, d in zip(report["devices"][n]["rank"], report["devices"][n]["depth"], strict=True)] for n in names]
    width = max(len(c) for c in cells)
    axes.imshow([c + [0] * (width - len(c)) for c in cells], cmap="Blues", aspect="auto", vmin=0, vmax=1.6 * max(map(max, cells)))
    for row, name in enumerate(names):
        d = report["devices"][name]
        for column, (rank, depth, prune) in enumerate(zip(d["rank"], d["depth"], d["prune"], strict=True)):
            pruned = f"\n-{100 * prune:.0f}%" if prune else ""
            axes.text(column, row, f"r{rank}\nd{depth}{pruned}", ha="center", va="center", fontsize=7)
    axes.set_xticks(range(width), range(1, width + 1), fontsize=8)
    axes.set_yticks(range(len(names)), [f"{n}\n{report['devices'][n]['bits']} bits" for n in names], fontsize=8)
    axes.set(xlabel="round", title="What each device was given: rank, depth, pruning")
