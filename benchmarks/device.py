"""Our training step beside transformers.Trainer + peft (+ bitsandbytes), in turn, on the same batches:
make bench-device.

python -m benchmarks.device [WORK …]      SCALE=quick: MiniLM alone, once, few steps Every side runs in a
process of its own; medians of the repeats. Once as the machine is, once as a laptop with AVX2 alone.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rankfleet.profiles.card import ModelCard, read_card
from rankfleet.profiles.cost import step_flops

from .sides import work as works
from .table import report

KEYS = ("full_depth", "depth_25", "depth_25_cached", "prune_50")
PEERS = ("fp32", "bf16", "nf4-fp32", "nf4-bf16")
OURS = ("fp32", "bf16", "nf4-bf16")
LAPTOP = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
Measured = dict[tuple[str, str, str], dict[str, float]]
"""Medians by side, key and numerics."""
STEPS = {"minilm": 50, "llama-135m": 8, "qwen2-0.5b": 8, "tiny": 10}


def side(
    name: str, work: str, key: str, numerics: str, rest: tuple[int, Path, int], environment: dict[str, str]
) -> dict[str, Any]:
    """One run in a process of its own; `rest` is steps, folder and threads."""
    command = [sys.executable, "-m", "benchmarks.sides.side", name, work, key, numerics, *map(str, rest)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    if done.returncode:
        print(
            f"  {name} {key} {numerics}: {(done.stderr.strip().splitlines() or ['?'])[-1][:150]}", flush=True
        )
        return {}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    above = found["peak_mb"] - found["imports_mb"]
    shown = (
        f"{found['tokens_per_s']:9.0f} tokens/s  {above:6.0f} MB over imports, {found['pss_mb']:6.0f} in all"
    )
    print(f"  {name:5} {key:16} {numerics:9} {shown}  loss {found['loss']:.3f}", flush=True)
    return found


def runs(
    work: str, repeats: int, steps: int, home: Path, threads: int, environment: dict[str, str]
) -> Measured:
    """Medians by (side, key, numerics), all sides in turn."""
    plan = [("peer", "full_depth", n) for n in PEERS] + [("ours", k, n) for k in KEYS for n in OURS]
    if environment:
        plan = [
            (s, k, n) for s, k, n in plan if "bf16" not in n
        ]  # without such instructions it is 25 to 40 times slower
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {p: [] for p in plan}
    for _ in range(repeats):
        for p in plan:
            if one := side(p[0], work, p[1], p[2], (steps, home, threads), environment):
                found[p].append(one)
    return {p: {k: statistics.median(r[k] for r in rs) for k in rs[0]} for p, rs in found.items() if rs}


def flops(card: ModelCard, work: works.Work, key: str) -> float:
    """Of a step, with the output table at the supervised tokens (all of them where a peer makes all
    logits: `peer`)."""
    length = round(statistics.mean(work.tokens()) / work.batch)
    ends = ("q_proj", "v_proj") if work.causal else ("query", "value")
    deep = works.depth(card.layers, key)
    placement = {
        m.name: works.RANK for m in card.modules if m.layer >= card.layers - deep and m.name.endswith(ends)
    }
    body = step_flops(
        card, placement, 0.5 if key == "prune_50" else 0.0, work.batch, length, cached=key.endswith("cached")
    )
    if card.causal and key != "peer":
        body -= (1 - works.ANSWER) * 4.0 * card.hidden * card.vocab * work.batch * length
    return body


def rows(name: str, work: works.Work, found: Measured, machine: str) -> list[dict[str, Any]]:
    """Ratios by key."""
    card = read_card(Path(work.folder))
    peers = {n: found[p] for n in PEERS if (p := ("peer", "full_depth", n)) in found}
    nf4 = max(
        (p for n, p in peers.items() if n.startswith("nf4")), key=lambda p: p["tokens_per_s"], default=None
    )
    best = max(peers.values(), key=lambda p: p["tokens_per_s"])
    made = []
    for key in KEYS:
        ours = {n: found[p] for n in OURS if (p := ("ours", key, n)) in found}
        own = max(ours.values(), key=lambda o: o["tokens_per_s"])
        limit = flops(card, work, "peer") / flops(card, work, key)
        made.append({
            "work": name, "machine": machine, "key": key, "flop_ratio": round(limit, 2),
            "tokens_per_s_ratio": _ratio(ours["fp32"], peers["fp32"], "tokens_per_s"),
            "tokens_per_s_ratio_vs_nf4": _ratio(own, nf4, "tokens_per_s"),
            "tokens_per_s_ratio_vs_best": _ratio(own, best, "tokens_per_s"),
            "over_our_full_depth": _ratio(ours["fp32"], found["ours", "full_depth", "fp32"], "tokens_per_s"),
            "peak_rss_ratio": round(_above(own) / _above(peers["fp32"]), 2),
            "peak_rss_ratio_fp32": round(_above(ours["fp32"]) / _above(peers["fp32"]), 2),
            "peak_pss_mb": round(own["pss_mb"]), "loss": round(ours["fp32"]["loss"], 4),
            "peer_loss": round(peers["fp32"]["loss"], 4),
            "tokens_per_s": round(ours["fp32"]["tokens_per_s"]),
            "peer_tokens_per_s": round(peers["fp32"]["tokens_per_s"]),
        })  # fmt: skip
    return made


def _ratio(a: dict[str, float], b: dict[str, float] | None, what: str) -> float | None:
    return None if b is None else round(a[what] / b[what], 2)


def _above(run: dict[str, float]) -> float:
    return run["peak_mb"] - run["imports_mb"]


def gemm_fraction(work: str, key: str, numerics: str, steps: int, home: Path, threads: int) -> float:
    """Share of a run that its matrix products would take, each at its best alone."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.sides.gemm",
        work,
        key,
        numerics,
        str(steps),
        str(home),
        str(threads),
    ]
    found = json.loads(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    )
    return round(found["gemm_s"] / found["step_s"], 2)


def mixed_fleet(name: str, home: Path, threads: int, peer: float, machine: str) -> dict[str, Any]:
    """Ten rounds of changing depth, what is cached and made again included, over the peer's full depth."""
    command = [sys.executable, "-m", "benchmarks.sides.mixed", name, str(home), str(threads)]
    found = json.loads(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    )
    found = {"work": name, "machine": machine, "key": "depth_25_cached_mixed_fleet", **found}
    print(f"  mixed fleet: {found}", flush=True)
    return {**found, "tokens_per_s_ratio": round(found["tokens_per_s"] / peer, 2)}


def main() -> int:
    """Run."""
    quick = os.environ.get("SCALE") == "quick"
    parse = argparse.ArgumentParser(
        prog="python -m benchmarks.device", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parse.add_argument(
        "works", nargs="*", default=["minilm"] if quick else ["minilm", "llama-135m", "qwen2-0.5b"]
    )
    parse.add_argument("--repeats", type=int, default=1 if quick else 5)
    parse.add_argument("--home", type=Path, help="folder that keeps the random models")
    parse.add_argument("--native", action="store_true", help="not once more as a laptop with AVX2")
    args = parse.parse_args()
    if "minilm" in args.works and not (works.SHARED / "data/clinc150").exists():
        print("the texts for MiniLM are not here; a tiny random model stands in")
        args.works = ["tiny" if w == "minilm" else w for w in args.works]
    threads, made, mixed = os.cpu_count() or 1, [], []
    with tempfile.TemporaryDirectory() as folder:
        home = args.home or Path(folder)
        for name in args.works:
            steps = 12 if quick else STEPS[name]
            work = works.make(name, home, steps)
            for machine, environment in (("as it is", {}), ("AVX2", LAPTOP)):
                if (quick or args.native) and environment:
                    continue
                print(f"{name}, {machine}, {steps} steps of {work.batch}, {threads} threads", flush=True)
                found = runs(name, args.repeats, steps, home, threads, environment)
                made += rows(name, work, found, machine)
                if not environment:
                    for row in made[-len(KEYS) :]:
                        few = max(3, steps // 3)
                        row["gemm_fraction"] = gemm_fraction(name, row["key"], "fp32", few, home, threads)
                        row["gemm_fraction_bf16"] = gemm_fraction(
                            name, row["key"], "bf16", few, home, threads
                        )
                    if name == "minilm":
                        mixed.append(
                            mixed_fleet(
                                name,
                                home,
                                threads,
                                found["peer", "full_depth", "fp32"]["tokens_per_s"],
                                machine,
                            )
                        )
    versions = {
        p: importlib.metadata.version(p)
        for p in ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
    }
    report("device", made, mixed_fleet=mixed, threads=threads, repeats=args.repeats, versions=versions)
    return 0


if __name__ == "__main__":
    sys.exit(main())
