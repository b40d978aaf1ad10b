"""Instruction tuning of a causal language model: next-token loss on answer tokens alone.

Rows have `instruction`, `output` and maybe `input`; or, with `template: chat`, `messages` (role and
content), rendered by the tokenizer's own chat template, where every assistant turn is an answer. Logits
are made for answer tokens only.
"""

import re
from pathlib import Path
from typing import Any

import torch

from rankfleet.federated.errors import Refused
from rankfleet.federated.wire.messages import Task

from ..model.base import IGNORED
from .tokens import Tokens

TEMPLATE = "Instruction: {instruction}\nInput: {input}\nAnswer: "
PLAIN = "Instruction: {instruction}\nAnswer: "
_FIELD = re.compile(r"\{(instruction|input)\}")
SAMPLE_TOKENS = 48
Learnt = tuple[list[int], list[bool]]
"""Ids, and which of them are to be learnt."""
Scores = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Engine:
    """Prompts and answers as tokens, batches, losses; and samples for the report."""

    def __init__(self, task: Task, folder: str) -> None:
        self.length, self.template = task.max_length, task.template
        self.chat = task.template == "chat"
        self.tokens = Tokens(Path(folder), chat=self.chat)
        if self.chat and not getattr(self.tokens.rich, "chat_template", None):
            raise Refused(
                "`template: chat` needs a tokenizer with a chat template",
                "leave `template` out, or write one with {instruction}",
            )
        self.fields = ["messages"] if self.chat else ["instruction", "output", "input"]
        self.optional = {"input"}
        self.skipped = 0

    def encode(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Ids and answer masks, cut at the job's length; rows without an answer are left out and counted."""
        found = []
        for row in rows:
            ids, learnt = self._turns(row["messages"]) if self.chat else self._pair(row)
            if any(learnt[1:]):
                found.append({"ids": ids, "learnt": learnt})
            else:
                self.skipped += 1
        return found

    def prompt(self, row: dict[str, Any]) -> str:
        """What stands before the answer."""
        given = str(row.get("input") or "").strip()
        template = self.template or (TEMPLATE if given else PLAIN)
        fields = {"instruction": str(row["instruction"]).strip(), "input": given}
        # In one pass: braces in a row's own text are text.
        return _FIELD.sub(lambda found: fields[found[1]], template)

    def _prompt_ids(self, row: dict[str, Any]) -> list[int]:
        (ids,) = self.tokens.ids([self.prompt(row)])
        return ids[:-1] if self.tokens.end is not None and ids[-1:] == [self.tokens.end] else ids

    def _pair(self, row: dict[str, Any]) -> Learnt:
        """A prompt loses its beginning, down to half of the length; an answer its end."""
        (answer,) = self.tokens.ids([str(row["output"]).strip()], special=False)
        if answer and self.tokens.end is not None:
            answer.append(self.tokens.end)
        prompt = self._prompt_ids(row)[-max(self.length // 2, self.length - len(answer)) :]
        ids = [*prompt, *answer][: self.length]
        return ids, [i >= len(prompt) for i in range(len(ids))]

    def _turns(self, messages: Any) -> tuple[list[int], list[bool]]:
        """A conversation by the tokenizer's template; the tokens that each assistant turn adds are learnt."""
        if not isinstance(messages, list) or not all(
            isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages
        ):
            raise Refused("`messages` of a row is not a list of {role, content}")
        said = [{"role": str(m["role"]), "content": str(m["content"])} for m in messages]
        ids: list[int] = []
        learnt: list[bool] = []
        for n, message in enumerate(said):
            if message["role"] != "assistant":
                continue
            try:
                before = self._render(said[:n], True)
                after = self._render(said[: n + 1], False)
            except Exception as error:
                raise Refused(f"the tokenizer's chat template does not take a row: {error}") from None
            learnt = [
                *learnt,
                *[False] * (len(before) - len(ids)),
                *[True] * (len(after) - max(len(before), len(ids))),
            ][: len(after)]
            ids = after
        return ids[: self.length], learnt[: self.length]

    def _render(self, messages: list[dict[str, str]], answer_follows: bool) -> list[int]:
        text = self.tokens.rich.apply_chat_template(
            messages, add_generation_prompt=answer_follows, tokenize=False
        )
        (ids,) = self.tokens.ids([text], special=False)
        return ids

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Right-padded; `labels` are the ids where they are learnt, `IGNORED` elsewhere."""
        longest = max(len(e["ids"]) for e in examples)
        ids = torch.zeros(len(examples), longest, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for row, e in enumerate(examples):
            tokens = torch.tensor(e["ids"])
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
            labels[row, : len(tokens)] = torch.where(torch.tensor(e["learnt"]), tokens, IGNORED)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def features(self, base: Any, batch: dict[str, Any]) -> torch.Tensor:
        """There are none. Raises Refused."""
        raise Refused(
            "a language model's scores are of tokens: it has no features of a whole text",
            "use `hidden` or `choices`",
        )

    def forward(self, base: Any, head: dict[str, Any], batch: dict[str, Any]) -> Scores:
        """Loss of every answer token, whether it would be guessed, and its example; logits are never held
        all at once."""
        found: Scores = base.answers(batch)
        return found

    def losses(self, scores: Scores, batch: dict[str, Any]) -> torch.Tensor:
        """Mean cross-entropy over each example's answer tokens, (batch,)."""
        return _means(scores[0], scores[2], len(batch["labels"]))

    def correct(self, scores: Scores, batch: dict[str, Any]) -> torch.Tensor:
        """Share of each example's answer tokens that would be guessed, (batch,)."""
        return _means(scores[1].float(), scores[2], len(batch["labels"]))

    @torch.inference_mode()
    def samples(self, base: Any, prompts: list[str]) -> list[str]:
        """What the model answers to the job's own prompts, greedily."""
        found = []
        for prompt in prompts:
            asked = [{"role": "user", "content": prompt}]
            text = self._render(asked, True) if self.chat else self._prompt_ids({"instruction": prompt})
            ids = base.generate(text[-self.length :], SAMPLE_TOKENS, self.tokens.end)
            found.append(self.tokens.text(ids).strip())
        return found


def _means(values: torch.Tensor, owners: torch.Tensor, count: int) -> torch.Tensor:
    """Mean of each example's values, (count,); 0 where it has none."""
    sums = values.new_zeros(count).index_add(0, owners.to(values.device), values)
    return sums / torch.bincount(owners, minlength=count).clamp_min(1).to(values.device)
