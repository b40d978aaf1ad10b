"""Text to token ids. `tokenizer.json` is read with the library `tokenizers` alone, which takes a tenth of
the memory and time of transformers; that one comes in for chat templates, for checkpoints without the
file, and for classes that change what it says."""

import json
from pathlib import Path
from typing import Any

from rankfleet.federated.errors import Refused

AS_WRITTEN = ("BertTokenizer", "BertTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes that use `tokenizer.json` as it stands; others, such as Llama's, build a tokenizer of their own
from it."""


class Tokens:
    """A tokenizer: ids of texts with and without special tokens, and back. Raises Refused where there is
    none."""

    def __init__(self, folder: Path, *, chat: bool = False) -> None:
        file = folder / "tokenizer.json"
        self.rich: Any = None
        if file.exists() and not chat and _class(folder) in AS_WRITTEN:
            from tokenizers import Tokenizer

            try:
                self.plain: Any = Tokenizer.from_file(str(file))
            except Exception as error:  # the library raises the base class
                raise Refused(f"{file} cannot be read: {error}", "copy the model again") from None
            self.plain.no_padding()
            self.plain.no_truncation()
            self.end = self._end(folder)
            return
        from transformers import AutoTokenizer

        try:
            self.rich = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise Refused(
                f"{folder} has no tokenizer that can be read: {str(error).splitlines()[0][:200]}"
            ) from None
        self.end = self.rich.eos_token_id

    def _end(self, folder: Path) -> int | None:
        """Id of the token that ends an answer, by the files beside."""
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            try:
                told = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token")
            except (OSError, ValueError, AttributeError):
                continue
            token = told.get("content") if isinstance(told, dict) else told
            if isinstance(token, str) and (found := self.plain.token_to_id(token)) is not None:
                return int(found)
        return None

    def ids(self, texts: list[str], most: int | None = None, special: bool = True) -> list[list[int]]:
        """Ids of every text, cut at `most`, special tokens included."""
        if not texts:
            return []
        if self.rich is not None:
            cut = {"truncation": True, "max_length": most} if most else {}
            found: list[list[int]] = self.rich(texts, add_special_tokens=special, **cut)["input_ids"]
            return found
        if most:
            self.plain.enable_truncation(most)
        try:
            return [list(e.ids) for e in self.plain.encode_batch(texts, add_special_tokens=special)]
        finally:
            self.plain.no_truncation()

    def text(self, ids: list[int]) -> str:
        """The text of ids, without special tokens."""
        return str((self.plain if self.rich is None else self.rich).decode(ids, skip_special_tokens=True))


def _class(folder: Path) -> str:
    """The tokenizer's class by its configuration; a file without one is used as it stands."""
    try:
        return str(
            json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("tokenizer_class")
            or AS_WRITTEN[-1]
        )
    except (OSError, ValueError, AttributeError):
        return AS_WRITTEN[-1]
