"""`make ask TEXT="…"`: the tuned model answers, through the adapter that plain peft loads."""

import argparse
import json
import logging
import os
import sys
import warnings
from pathlib import Path

from .run import find_model


def main() -> int:
    """Print the most likely areas with their shares."""
    parse = argparse.ArgumentParser(prog="python -m demo.ask", description=__doc__)
    parse.add_argument("text")
    parse.add_argument("--adapter", type=Path, default=Path("runs/demo/adapter"))
    parse.add_argument("--model", default="")
    parse.add_argument("--json", action="store_true")
    args = parse.parse_args()
    if not (args.adapter / "task.json").exists():
        print(f"error: {args.adapter} holds no tuned adapter\n  try: make demo", file=sys.stderr)
        return 1
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    import torch
    import transformers
    from peft import PeftModel
    from safetensors.torch import load_file

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    folder, task = find_model(args.model), json.loads((args.adapter / "task.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(folder), args.adapter).eval()
    head = load_file(args.adapter / "head.safetensors")
    batch = tokenizer([args.text], truncation=True, max_length=task["max_length"], return_tensors="pt")
    with torch.inference_mode():
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
        shares = torch.softmax(
            (hidden * mask).sum(1) / mask.sum(1) @ head["head.weight"].T + head["head.bias"], -1
        )[0]
    best = sorted(zip(task["labels"], shares.tolist(), strict=True), key=lambda p: -p[1])[:3]
    print(
        json.dumps(dict(best))
        if args.json
        else "\n".join(f"  {100 * share:5.1f}%  {label}" for label, share in best)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
