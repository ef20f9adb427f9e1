"""Which modules a LoRA's config makes PEFT adapt, replace or tie: ``LoraConfig`` against paths.

Knows configs and module paths; reads no files, knows no tensors. Each function does what PEFT 0.21
does: ``check_target_module_exists`` (tuners/tuners_utils.py), ``get_pattern_key`` and
``_set_trainable`` (utils/other.py), ``_check_tied_modules`` (tuners/lora/model.py).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_edge.errors import AdapterError
from lora_edge.files.patterns import check_time_of_re, matched

TASK_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score")}
"""What PEFT saves of a model for classification though no config field names it."""

_ALL_LINEAR = "all-linear"
_NO_MODULES = "dummy-target-modules"
_EMBEDDINGS = ("embed_tokens", "lm_head")  # peft/utils/constants.py: EMBEDDING_LAYER_NAMES
_OUTPUT = "lm_head"
_WHAT = "the adapter's config has the pattern"
_CORRECT = "Correct it in adapter_config.json."


@dataclass(frozen=True)
class Decision:
    """Whether PEFT puts a low-rank pair on a module.

    Attributes:
        hit: it does.
        reason: which field of the config decided so, and how.
    """

    hit: bool
    reason: str


class Targets:
    """What a LoRA's config asks of a base.

    Args:
        config: ``adapter_config.json`` of a LoRA.
        linear: module paths of the base's linear layers, which ``all-linear`` stands for; ``None``
            where the base is not at hand.
        tied: module paths of the base's embedding and of the output layer that shares its weight,
            or ().
        output: module path of the base's output layer, which ``all-linear`` leaves out.

    Attributes:
        decided: it is known what is targeted: the base is at hand, or is not needed for it.
        saved_names: what ``modules_to_save`` is for PEFT, task heads included.
        tied_copies: output layers that are saved along with the embedding, because
            ``ensure_weight_tying`` says so.
        tied_targets: output layers whose pair is the embedding's, for the same reason.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        linear: Collection[str] | None = None,
        tied: tuple[str, ...] = (),
        output: str = "",
    ) -> None:
        self._config = config
        names = [str(name) for name in config.get("modules_to_save") or ()]
        names += TASK_HEADS.get(str(config.get("task_type")), ())
        targets: Any = config.get("target_modules")
        if isinstance(targets, str) and targets.lower() == _ALL_LINEAR:
            self.decided = linear is not None
            heads = {output}
            if not output and config.get("task_type") == "SEQ_CLS":
                heads = {next((x for x in ("score", "classifier") if x in (linear or ())), "")}
            targets = sorted(set(linear or ()) - heads)
        else:
            self.decided = targets is not None or bool(config.get("target_parameters"))
        if targets == _NO_MODULES:
            targets = []
        self.tied_copies: tuple[str, ...] = ()
        self.tied_targets: tuple[str, ...] = ()
        if config.get("ensure_weight_tying") and tied:
            embedding, out = tied
            if any(name.rpartition(".")[2] in _EMBEDDINGS for name in names):
                if embedding not in names:
                    names.append(embedding)
                _remove_first(names, out)
                self.tied_copies = (out,)
            elif isinstance(targets, str):
                if any(fullmatch(targets, name) for name in _EMBEDDINGS):
                    targets = rf"(?:{targets}|^{re.escape(embedding)}$)"
                    self.tied_targets = (out,)
            elif any(name.rpartition(".")[2] in _EMBEDDINGS for name in targets or ()):
                targets = [*targets, embedding]
                _remove_first(targets, out)
                self.tied_targets = (out,)
        self.saved_names = tuple(names)
        self._targets: str | tuple[str, ...] | None = (
            targets if targets is None or isinstance(targets, str) else tuple(map(str, targets))
        )

    def decide(self, path: str) -> Decision:
        """Whether PEFT puts a low-rank pair on the module of this path."""
        if path in self.tied_targets:
            return Decision(True, "ensure_weight_tying ties it to the embedding")
        excluded = self._config.get("exclude_modules")
        if excluded and _named(excluded, path):
            return Decision(False, f"exclude_modules is {excluded!r}")
        for name in self.saved_names:
            if match(rf"(^|.*\.){name}($|\..*)", path):
                reason = f"modules_to_save, or the task, saves it whole: {name!r}"
                return Decision(False, reason)
        if self._targets is None:
            return Decision(False, "target_modules is not set")
        if isinstance(self._targets, str):
            hit = fullmatch(self._targets, path)
            return Decision(hit, _not_named(self._config))
        if path in self._targets:
            return Decision(True, "target_modules names it")
        if not any(path.endswith(f".{name}") for name in self._targets):
            return Decision(False, _not_named(self._config))
        return self._in_layers(path)

    def saves(self, path: str) -> bool:
        """Whether PEFT replaces the module of this path, or one above it, by a saved copy."""
        names = (*self.saved_names, *self.tied_copies)
        parts = path.split(".")
        above = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        # PEFT compares with str.endswith, so "norm" hits "layernorm" too.
        return any(module.endswith(name) for module in above for name in names)

    def may_tie(self, path: str) -> bool:
        """Whether the module would be saved along with the embedding, were it tied to it."""
        named = any(name.rpartition(".")[2] in _EMBEDDINGS for name in self.saved_names)
        tie = bool(self._config.get("ensure_weight_tying"))
        return tie and named and path.rpartition(".")[2] == _OUTPUT

    def could_tie(self, path: str) -> bool:
        """Whether the module would have the embedding's pair, were it tied to it."""
        tie = bool(self._config.get("ensure_weight_tying"))
        return tie and path.rpartition(".")[2] == _OUTPUT

    def token_modules(self, paths: Iterable[str], embedding: str | None) -> dict[str, Any]:
        """Module path -> indices, of the modules with trained token rows (not what is tied).

        Args:
            paths: module paths of the base.
            embedding: module path of its input embedding, if that is known.
        """
        wanted = self._config.get("trainable_token_indices")
        if not wanted:
            return {}
        if not isinstance(wanted, Mapping):
            wanted = {embedding or "embed_tokens": wanted}
        return {
            path: indices
            for path in paths
            for name, indices in wanted.items()
            if path.endswith(name)
        }

    def _in_layers(self, path: str) -> Decision:
        wanted = self._config.get("layers_to_transform")
        if wanted is None or wanted == []:
            return Decision(True, "target_modules names it")
        patterns = self._config.get("layers_pattern")
        if not patterns:
            found = match(r".*?\.[^.]*\.(?P<idx>\d+)\.", path)
        else:
            given = [patterns] if isinstance(patterns, str) else patterns
            tried = (match(rf"(?:^|.*?\.){x}\.(?P<idx>\d+)\.", path) for x in given)
            found = next((x for x in tried if x), None)
        layers = [wanted] if isinstance(wanted, int) else wanted
        hit = found is not None and int(found["idx"]) in layers
        return Decision(hit, f"layers_to_transform is {wanted!r}")


def pattern_key(patterns: Iterable[str], path: str) -> str | None:
    """The first key of ``rank_pattern`` or ``alpha_pattern`` that decides for a module."""
    return next((key for key in patterns if match(rf"(.*\.)?({key})$", path)), None)


def check_patterns(config: Mapping[str, Any], paths: Sequence[str]) -> None:
    """Check that PEFT itself, which matches with Python's ``re``, is done with a config in time.

    Args:
        config: ``adapter_config.json``, or fields of it.
        paths: module paths of the model that PEFT is about to adapt.

    Raises:
        AdapterError: a pattern takes too long.
    """
    found = [rf"(.*\.)?({key})$" for field in _PATTERNS for key in config.get(field) or ()]
    found += [x for field in _NAMES if isinstance(x := config.get(field), str)]
    found += [rf"(^|.*\.){name}($|\..*)" for name in config.get("modules_to_save") or ()]
    layers = config.get("layers_pattern") or ()
    given = [layers] if isinstance(layers, str) else layers
    found += [rf"(?:^|.*?\.){x}\.(?P<idx>\d+)\." for x in given]
    check_time_of_re(found, paths, _WHAT, AdapterError, _CORRECT)


_PATTERNS = ("rank_pattern", "alpha_pattern")
_NAMES = ("target_modules", "exclude_modules")


def fullmatch(pattern: str, text: str) -> bool:
    """``re.fullmatch`` with a config's pattern.

    Raises:
        AdapterError: it is no regular expression, or takes too long.
    """
    return matched(pattern, text, "fullmatch", _WHAT, AdapterError, _CORRECT) is not None


def match(pattern: str, text: str) -> Any:
    """``re.match`` with a config's pattern.

    Raises:
        AdapterError: it is no regular expression, or takes too long.
    """
    return matched(pattern, text, "match", _WHAT, AdapterError, _CORRECT)


def _named(names: str | Sequence[str], path: str) -> bool:
    if isinstance(names, str):
        return fullmatch(names, path)
    return path in names or any(path.endswith(f".{name}") for name in names)


def _not_named(config: Mapping[str, Any]) -> str:
    targets = config.get("target_modules")
    shown = repr(targets) if isinstance(targets, str) else str(list(targets or ()))
    return f"target_modules is {shown if len(shown) < 100 else shown[:96] + ' ...'}"


def _remove_first(names: list[str], path: str) -> None:
    """Take out the first name that means a tied module, as PEFT does."""
    for name in names:
        if match(rf"(^|.*\.){name}($|\..*)", path):
            names.remove(name)
            return
