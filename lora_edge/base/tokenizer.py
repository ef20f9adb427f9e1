"""The tokenizer that transformers makes of a model's folder, and what it says of it.

Knows transformers; knows nothing of bundles or of how the runtime reads its files.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_edge.base.quiet import quiet
from lora_edge.errors import LoraEdgeError

_HINT = "Copy the folder again; `AutoTokenizer.from_pretrained` must load it."


@dataclass(frozen=True)
class Reference:
    """A tokenizer of transformers, asked as a person would ask it.

    Attributes:
        tokenizer: the tokenizer.
        where: its folder, for messages.
    """

    tokenizer: Any
    where: str

    @property
    def kind(self) -> str:
        """Its class."""
        return type(self.tokenizer).__name__

    @property
    def modern(self) -> bool:
        """It is of transformers 5, whose templates see plain data, and no key that is None."""
        import transformers

        return int(transformers.__version__.partition(".")[0]) >= 5

    @property
    def portable(self) -> bool:
        """A ``tokenizer.json`` says all of it; else it is written in Python."""
        return getattr(self.tokenizer, "backend_tokenizer", None) is not None

    @property
    def special_tokens(self) -> dict[str, str]:
        """Name -> text, as templates see them."""
        found = self.tokenizer.special_tokens_map
        return {name: text for name, text in found.items() if isinstance(text, str)}

    @property
    def templates(self) -> dict[str, str]:
        """Name -> chat template."""
        given = self.tokenizer.chat_template
        return {"default": given} if isinstance(given, str) else dict(given or {})

    @property
    def vocabulary(self) -> dict[str, int]:
        """Token -> id, the added ones included."""
        return dict(self.tokenizer.get_vocab())

    @property
    def added(self) -> tuple[str, ...]:
        """The added tokens, in the order of their ids."""
        return tuple(str(x) for _, x in sorted(self.tokenizer.added_tokens_decoder.items()))

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids."""
        made = self.tokenizer(text, add_special_tokens=special_tokens, verbose=False)
        return list(made["input_ids"])

    def encode_pair(self, text: str, pair: str, max_length: int) -> tuple[list[int], list[int]]:
        """Ids and types of two texts, cut to a length."""
        made = self.tokenizer(
            text,
            pair,
            truncation=True,
            max_length=max_length,
            return_token_type_ids=True,
            verbose=False,
        )
        return list(made["input_ids"]), list(made["token_type_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Text, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def render(self, messages: Sequence[Mapping[str, Any]], **context: Any) -> str | None:
        """A conversation by the chat template; ``None`` where it refuses."""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [*messages], tokenize=False, add_generation_prompt=True, **context
                )
            )
        except Exception:  # noqa: BLE001 - a template raises what it likes
            return None

    def meaning(self) -> str:
        """What decides ids and text, as one string that equal tokenizers share.

        Truncation and padding are the training's affair, and left out; so is the token that pads.
        """
        backend = copy.deepcopy(self.tokenizer.backend_tokenizer)
        backend.no_truncation()
        backend.no_padding()
        special = {name: x for name, x in self.special_tokens.items() if name != "pad_token"}
        options = {
            name: getattr(self.tokenizer, name, None)
            for name in ("clean_up_tokenization_spaces", "split_special_tokens", "truncation_side")
        }
        return json.dumps([backend.to_str(), special, options], sort_keys=True)

    def save(self, folder: Path, error: type[LoraEdgeError]) -> None:
        """Write ``tokenizer.json``, its config and the templates; ``error`` where that fails."""
        try:
            with quiet():
                self.tokenizer.save_pretrained(folder)
        except Exception as failure:
            reason = " ".join(str(failure).split())[:300]
            raise error(
                f"the tokenizer of {self.where} cannot be saved: {reason}", _HINT
            ) from failure


def read_tokenizer(directory: Path, error: type[LoraEdgeError], config: Any = None) -> Reference:
    """The tokenizer of a folder.

    Args:
        directory: the folder.
        error: what is raised where there is none that transformers can load.
        config: the model's, where the folder has none of its own.

    Raises:
        LoraEdgeError: of type ``error``.
    """
    from transformers import AutoTokenizer

    options = {} if config is None else {"config": config}
    try:
        with quiet():
            made = AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False, **options
            )
    except BaseException as failure:  # tokenizers' own panics are no Exception
        if not isinstance(failure, Exception) and type(failure).__name__ != "PanicException":
            raise
        reason = " ".join(str(failure).split())[:300] or type(failure).__name__
        raise error(f"transformers reads no tokenizer in {directory}: {reason}", _HINT) from failure
    return Reference(made, str(directory))
