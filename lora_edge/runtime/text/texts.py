"""Which tokenizer, chat template and end tokens a row has: the bundle's, or its adapter's own.

An adapter's own lie in ``adapters/NAME/text/``, as far as they say something else than the base's.
Knows a bundle's files; knows nothing of sessions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from lora_edge.bundle.bundle import Bundle
from lora_edge.errors import BundleError, DataError
from lora_edge.files.tokenizer import TEMPLATE_FILE, TEMPLATE_FOLDER, TOKENIZER_FILES
from lora_edge.runtime.adapters.binding import State
from lora_edge.runtime.text.defaults import DEFAULTS_FILES, GenerationDefaults, read_defaults
from lora_edge.runtime.text.tokenizer import Tokenizer


def text_folder(name: str) -> str:
    """Where an adapter's own text files lie in a bundle."""
    return f"adapters/{name}/text"


class Texts:
    """The text side of a bundle.

    Args:
        bundle: the bundle; its files are checked against their hashes when they are first read.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._tokenizers: dict[str, Tokenizer] = {}

    @cached_property
    def defaults(self) -> GenerationDefaults:
        """How the model wants to be asked.

        Raises:
            BundleError: its files are damaged.
        """
        self._verify(DEFAULTS_FILES)
        return read_defaults(self._bundle.directory)

    def tokenizer(self, state: State = (), *, chat: bool = True) -> Tokenizer:
        """The tokenizer of a row.

        Args:
            state: the row's adapters and their weights.
            chat: its chat template matters too.

        Raises:
            DataError: the row blends adapters that read text in different ways.
            BundleError: there is no tokenizer, or its files are damaged.
        """
        names = [name for name, _ in state] or [""]
        ways = {name: self._way(name, chat) for name in names}
        if len(set(ways.values())) > 1:
            raise DataError(
                f"the blended adapters {', '.join(sorted(ways))} do not share one tokenizer"
                + (" and chat template" if chat else ""),
                "Encode the text with the tokenizer of one of them (tokenizer_of), and give the "
                "ids to generate_ids() or logits().",
            )
        name = names[0]
        if name not in self._tokenizers:
            self._tokenizers[name] = self._load(name)
        return self._tokenizers[name]

    def eos_ids(self, state: State = ()) -> frozenset[int]:
        """The tokens that end a row: the model's, and the end token that an adapter brought.

        Raises:
            BundleError: the files are damaged.
        """
        own = [name for name, _ in state if self._has(name, "tokenizer")]
        if self._bundle.manifest.mode == "merged":
            own = [x for x in self._bundle.manifest.adapters if self._has(x, "tokenizer")]
        ends = set(self.defaults.eos_ids)
        for name in own:
            tokenizer = self.tokenizer(((name, 1.0),))
            end = tokenizer.token_id(tokenizer.special_tokens.get("eos_token", ""))
            ends |= set() if end is None else {end}
        return frozenset(ends)

    def _has(self, name: str, aspect: str) -> bool:
        entry = self._bundle.manifest.adapters.get(name)
        return entry is not None and aspect in entry.text

    def _way(self, name: str, chat: bool) -> tuple[tuple[str, str], ...]:
        """The hashes of an adapter's own files, by which blends are compared."""
        folder = f"{text_folder(name)}/"
        return tuple(
            sorted(
                (path.removeprefix(folder), entry.sha256)
                for path, entry in self._bundle.manifest.files.items()
                if path.startswith(folder) and (chat or not path.endswith(".jinja"))
            )
        )

    def _load(self, name: str) -> Tokenizer:
        self._verify([*TOKENIZER_FILES, *self._templates("")])
        over: Path | None = None
        entry = self._bundle.manifest.adapters.get(name)
        if entry is not None and entry.text and self._bundle.manifest.mode == "switchable":
            folder = f"{text_folder(name)}/"
            own = [f"{folder}{x}" for x in TOKENIZER_FILES]
            self._verify([*own, *self._templates(folder)])
            over = self._bundle.path(text_folder(name))
        return Tokenizer(self._bundle.directory, over)

    def _templates(self, folder: str) -> list[str]:
        """The chat templates of a folder that are listed or there."""
        below = f"{folder}{TEMPLATE_FOLDER}/"
        there = (self._bundle.directory / below).glob("*.jinja")
        names = {x for x in self._bundle.manifest.files if x.startswith(below)}
        return [f"{folder}{TEMPLATE_FILE}", *sorted(names | {f"{below}{x.name}" for x in there})]

    def _verify(self, names: Sequence[str]) -> None:
        for name in names:
            if name in self._bundle.manifest.files:
                self._bundle.verify(name)
            elif (self._bundle.directory / name).exists():
                raise BundleError(
                    f"{self._bundle.directory}: {name} is not in the manifest",
                    "Put it into the base's folder and export again, or remove it.",
                )
