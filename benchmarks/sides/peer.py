"""The peer's side of `make bench-device`: transformers.Trainer with peft, and bitsandbytes for NF4, as a
user would set it up.

Dynamic padding, the same batches in the same order, no dropout, nothing logged but the loss.
"""

import time
from typing import Any

import torch
from torch import nn

from .work import RANK, SCALE, SEED, Work, depth


class Pooled(nn.Module):
    """An encoder, the mean over real tokens, a linear head."""

    def __init__(self, body: Any, labels: int) -> None:
        super().__init__()
        self.body, self.config = body, body.config
        self.head = nn.Linear(body.config.hidden_size, labels)
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any) -> dict[str, Any]:
        """Loss of a batch."""
        hidden = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1)
        scores = self.head((hidden * mask).sum(1) / mask.sum(1))
        return {"loss": nn.functional.cross_entropy(scores, labels)}


def model(work: Work, key: str, numerics: str) -> Any:
    """The base with adapters on q and v of the top layers."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

    config = AutoConfig.from_pretrained(work.folder)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    quantised = numerics.startswith("nf4")
    compute = torch.bfloat16 if numerics == "nf4-bf16" else torch.float32
    few = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    kind = AutoModelForCausalLM if work.causal else AutoModel
    base = kind.from_pretrained(
        work.folder, config=config, dtype=torch.float32, **({"quantization_config": few} if quantised else {})
    )
    if quantised:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    layers = config.num_hidden_layers
    torch.manual_seed(SEED)
    lora = LoraConfig(
        r=RANK, lora_alpha=int(SCALE * RANK), lora_dropout=0.0,
        target_modules=["q_proj", "v_proj"] if work.causal else ["query", "value"],
        layers_to_transform=list(range(layers - depth(layers, key), layers)),
        task_type="CAUSAL_LM" if work.causal else None,
    )  # fmt: skip
    tuned = get_peft_model(base, lora)
    return tuned if work.causal else Pooled(tuned, work.labels)


class Collator:
    """Right-padded to the longest of the batch."""

    def __init__(self, causal: bool) -> None:
        self.causal = causal

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of tensors."""
        longest = max(len(e["ids"]) for e in examples)
        ids = torch.tensor([e["ids"] + [0] * (longest - len(e["ids"])) for e in examples])
        mask = torch.tensor([[1] * len(e["ids"]) + [0] * (longest - len(e["ids"])) for e in examples])
        if not self.causal:
            return {
                "input_ids": ids,
                "attention_mask": mask,
                "labels": torch.tensor([e["label"] for e in examples]),
            }
        learnt = torch.tensor([e["learnt"] + [False] * (longest - len(e["ids"])) for e in examples])
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(learnt, ids, -100)}


def train(work: Work, key: str, numerics: str, loaded: Any) -> tuple[list[float], list[float]]:
    """Seconds and loss of every step. `loaded` is called when everything is ready to train."""
    import tempfile

    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return SequentialSampler(work.examples)

    seconds: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **more: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **more: Any) -> None:
            seconds.append(time.perf_counter() - self.start)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder, per_device_train_batch_size=work.batch, max_steps=work.steps, learning_rate=work.lr,
            weight_decay=0.0,
            lr_scheduler_type="constant_with_warmup", warmup_steps=max(1, work.steps // 10), logging_steps=1,
            save_strategy="no",
            report_to=[], use_cpu=True, bf16=numerics == "bf16", remove_unused_columns=False,
            dataloader_num_workers=0, seed=SEED,
            disable_tqdm=True, optim="adamw_torch_fused",
        )  # fmt: skip
        tuned, collator = model(work, key, numerics), Collator(work.causal)
        trainer = InOrder(
            model=tuned,
            args=options,
            train_dataset=work.examples,
            data_collator=collator,
            callbacks=[Clock()],
        )
        loaded()
        begin = time.perf_counter()
        trainer.train()
        whole = time.perf_counter() - begin
    # What happens between steps (loading the next batch, logging) is part of training.
    share = whole / sum(seconds) if seconds else 1.0
    return [s * share for s in seconds], losses
