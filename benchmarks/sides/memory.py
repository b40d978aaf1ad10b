"""One setting of `make bench-memory` in a process of its own: prints the peak of resident memory over that
after imports, MB."""

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rankfleet.edge_agent.worker.__main__ import environment


class Peak:
    """Highest resident memory since it was made: by the kernel where its mark can be reset, else sampled."""

    def __init__(self) -> None:
        self.sampled = 0.0
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self.exact = True
        except OSError:
            self.exact = False
            threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        import psutil

        process = psutil.Process()
        while True:
            self.sampled = max(self.sampled, process.memory_info().rss / 1e6)
            time.sleep(0.002)

    @property
    def high(self) -> float:
        """MB."""
        if not self.exact:
            return self.sampled
        (line,) = (
            line
            for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines()
            if line.startswith("VmHWM")
        )
        return int(line.split()[1]) * 1024 / 1e6


def words(vocab: int, batch: int, length: int) -> Any:
    """Token ids as frequent as words are: the n-th with a probability of about 1/n."""
    import torch

    return (vocab ** torch.rand(batch, length)).long().clamp_max(vocab - 1)


def main() -> None:
    """Run."""
    environment()
    s: dict[str, Any] = json.loads(sys.argv[1])
    import psutil
    import torch

    import rankfleet.edge_agent.worker.trainer  # noqa: F401
    from rankfleet.coordinator.planning import importance as channels
    from rankfleet.edge_agent.model import Base
    from rankfleet.edge_agent.model.ops.layout import Layout
    from rankfleet.edge_agent.model.stored.prepared import Shelf
    from rankfleet.edge_agent.worker.optimizer import AdamW, Flat
    from rankfleet.profiles.card import read_card

    torch.set_num_threads(2)
    folder = Path(s["folder"])
    card = read_card(folder)
    masks = channels.masks(card, channels.importance(folder, card), s["prune"]) if s["prune"] else {}
    shelf = Shelf(Path(s["shelf"]), 1e6)
    torch.nn.functional.linear(torch.ones(8, 8), torch.ones(8, 8))
    before, peak = psutil.Process().memory_info().rss / 1e6, Peak()
    base = Base(folder, [], s["bits"], masks, card.causal, shelf=shelf, digest=card.digest)
    for name, rank in s["placement"].items():
        site = base.sites[name]
        site.place(torch.randn(rank, site.base.in_), torch.zeros(site.base.out, rank), 1.0, True)
    assert base.core is not None
    base.core.checkpointing = s["checkpointing"]
    params = list(base.parameters().values())
    named = base.parameters()
    flat = Flat(named, named)
    optimiser = AdamW(flat.values)
    ids = words(card.vocab, s["batch"], s["length"])
    with torch.no_grad():
        mask = torch.ones(16, 64, dtype=torch.long)
        for _ in range(10):  # what a round's other batches touch of the embeddings
            base.core.embed(words(card.vocab, 16, 64), Layout(mask))
    for _ in range(2):
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        loss = base.answers(batch)[0].mean() if card.causal else base.hidden(batch)[0].square().mean()
        flat.take(dict(zip(named, torch.autograd.grad(loss, params), strict=True)))
        optimiser.step(flat.values, flat.gradient, 1e-3)
    time.sleep(0.01)
    print(json.dumps({"peak_mb": peak.high - before}))


if __name__ == "__main__":
    main()
