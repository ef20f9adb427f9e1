"""A PEFT directory -> :class:`Adapter`, or a refusal by name.

Everything is driven by the tensors' keys and shapes; the config says the scale and the kind. What
this module does not understand, in the config or in the tensors, it refuses: an adapter that loads
and is silently wrong is worse than one that does not load. Needs no PyTorch and no peft.

Sources: ``peft/tuners/lora/config.py`` for the fields, ``peft/utils/other.py:get_pattern_key`` for
the pattern matching, ``peft/tuners/lora/layer.py`` for scaling and layouts,
``peft/utils/save_and_load.py`` for what is saved.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_edge.adapter.directory import (
    CONFIG_FILE,
    read_config,
    read_tensors,
    read_training,
    tensor_file,
    tensor_keys,
)
from lora_edge.adapter.loading import check_keys
from lora_edge.adapter.parts import LowRank, StackedFactors, TokenRows
from lora_edge.adapter.refusals import Mode, Refusal, config_refusals
from lora_edge.adapter.targets import Targets
from lora_edge.adapter.tensors import (
    check_biases,
    low_rank_modules,
    saved_parameters,
    stacked_factors,
    token_rows,
)
from lora_edge.base.layer import Layer
from lora_edge.errors import AdapterError, UnsupportedAdapterError
from lora_edge.files.portable import unportable
from lora_edge.maths.lora import FloatArray
from lora_edge.names import NONE_ADAPTER
from lora_edge.types import path as checked_path
from lora_edge.types import text

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


# PEFT saves these of a model for classification though no config field names them.
@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter of type LoRA, read and understood completely.

    Attributes:
        name: what the user calls it.
        directory: the PEFT directory.
        config: ``adapter_config.json``.
        keys: of its tensors, as the file has them.
        modules: module path -> low-rank pair, sorted by path.
        saved: parameter path -> the values that replace the base's (``modules_to_save``, trained
            biases).
        tokens: module path -> trained rows.
        stacked: module path -> factors of its stacked parameters.
        base_copies: parameter path -> a copy of the base's values that PEFT saved along; an adapter
            in which they differ from the base's is refused when it meets the base.
        invocation: token ids that activate an aLoRA; empty for any other adapter.
        labels: names of the task head's outputs, when the trainer recorded them.
        base_model: ``base_model_name_or_path`` of the config.
        base_fingerprint: fingerprint of the base it was trained on, when the trainer recorded it.
        digest: sha256 over config and tensors.
        warnings: things that are right but worth a look.
    """

    name: str
    directory: Path
    config: Mapping[str, Any]
    keys: tuple[str, ...]
    modules: Mapping[str, LowRank]
    saved: Mapping[str, FloatArray]
    tokens: Mapping[str, TokenRows]
    stacked: Mapping[str, StackedFactors]
    base_copies: Mapping[str, FloatArray]
    invocation: tuple[int, ...]
    labels: tuple[str, ...]
    base_model: str | None
    base_fingerprint: str | None
    digest: str
    warnings: tuple[str, ...]

    @property
    def kind(self) -> str:
        """What it is, for people: ``LoRA``, ``rsLoRA``, ``DoRA + 2 saved parameters`` …."""
        name = "LoRA"
        if self.config.get("use_rslora"):
            name = "rsLoRA"
        if any(module.magnitude is not None for module in self.modules.values()):
            name = "DoRA" if name == "LoRA" else "DoRA (rsLoRA)"
        if self.invocation:
            name = "aLoRA"
        extras = []
        if any(module.bias is not None for module in self.modules.values()):
            extras.append("bias of B")
        if self.saved:
            extras.append(f"{len(self.saved)} saved parameters")
        if self.tokens:
            extras.append(f"{sum(len(x.indices) for x in self.tokens.values())} token rows")
        return " + ".join([name, *extras])

    @property
    def heads(self) -> frozenset[str]:
        """Module paths of its task head, which PEFT saves though no config field names it."""
        heads = Targets({"task_type": self.config.get("task_type")})
        modules = {path.rpartition(".")[0] for path in self.saved}
        return frozenset(module for module in modules if heads.saves(module))

    def ranks(self) -> dict[str, int]:
        """Rank per module path."""
        return {path: module.rank for path, module in self.modules.items()}

    def head_labels(self, layer: str) -> int | None:
        """Number of labels of the task head that it brings; ``None`` without one.

        Args:
            layer: module path of the layer that makes the labels.
        """
        weight = self.saved.get(f"{layer}.weight")
        return None if weight is None or weight.ndim != 2 else len(weight)

    def settled(self, modules: Mapping[str, Layer]) -> Adapter:
        """The adapter with its pairs on whole weights of linear layers among its modules.

        PEFT changes a layer in the same way whether ``target_modules`` or ``target_parameters``
        names it.

        Args:
            modules: module path -> layer of the base.
        """
        found = {
            path: pair
            for path, factors in self.stacked.items()
            if path in modules and modules[path].kind in ("linear", "head")
            if (pair := factors.as_linear(transposed=modules[path].transposed)) is not None
        }
        rest = {path: factors for path, factors in self.stacked.items() if path not in found}
        both = dict(sorted({**self.modules, **found}.items()))
        return dataclasses.replace(self, modules=both, stacked=rest)

    def tied_along(self, module: str) -> bool:
        """Whether an output layer was saved because it is tied to the embedding, which was."""
        targets = Targets(self.config)
        return targets.may_tie(module) and not targets.saves(module)

    def check_effect(self) -> None:
        """Check that the adapter changes the base at all.

        Raises:
            AdapterError: it does not, so that nothing of it can be proved.
        """
        if self.saved or self.tokens or self.stacked:
            return
        if any(module.changes for module in self.modules.values()):
            return
        scaled = all(module.scaling == 0 for module in self.modules.values())
        raise AdapterError(
            f"adapter {self.name} has no effect: "
            + ("lora_alpha is 0" if scaled else "all its factors B (or A) are zero"),
            "Is it trained? Without an effect nothing of it can be proved.",
        )

    def check_mode(self, mode: Mode) -> None:
        """Check that a mode can take the adapter.

        Raises:
            UnsupportedAdapterError: it cannot; the field and the way out are named.
        """
        for refusal in config_refusals(self.config):
            if mode in refusal.modes:
                raise UnsupportedAdapterError(
                    f"adapter {self.name} is refused in {mode} mode: {refusal.message}",
                    refusal.hint,
                )


def check_name(name: str) -> str:
    """Return ``name`` if it can name an adapter in a bundle.

    Raises:
        AdapterError: it is reserved, or has characters that a folder name should not have.
    """
    if name.casefold() in {NONE_ADAPTER, "base"}:  # what the state without adapters is called
        raise AdapterError(
            f"the adapter name {name!r} is reserved for the base", "Choose another name."
        )
    if _NAME.fullmatch(name) is None:
        raise AdapterError(
            f"{name!r} cannot name an adapter",
            "Use 1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or digit.",
        )
    reason = unportable(name)
    if reason:
        raise AdapterError(
            f"{name!r} cannot name an adapter: it {reason}",
            "Choose another name, so that the bundle can be copied everywhere.",
        )
    return name


def load_adapter(path: str | os.PathLike[str], name: str | None = None) -> Adapter:
    """Read a PEFT directory.

    Args:
        path: folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        name: what to call it; the folder's name when omitted.

    Raises:
        AdapterError: the folder or a file is missing or damaged; a key or pattern matches nothing;
            shapes or ranks contradict each other; NaN or Inf.
        UnsupportedAdapterError: the adapter carries something that no mode would export exactly.
    """
    directory = Path(checked_path("path", path))
    if name is not None:
        text("name", name)
    config = read_config(directory)
    for refusal in config_refusals(config):
        if len(refusal.modes) > 1:
            raise UnsupportedAdapterError(
                f"{directory} is refused in both modes: {refusal.message}", refusal.hint
            )
    file = tensor_file(directory)
    keys = tensor_keys(file)
    check_keys(config, keys, str(directory))
    tensors = read_tensors(file)
    stacked = stacked_factors(directory, config, tensors)
    modules, warnings = low_rank_modules(directory, config, tensors, stacked)
    check_biases(directory, file, modules)
    saved, copies = saved_parameters(config, tensors, modules)
    digest = hashlib.sha256()
    for part in (directory / CONFIG_FILE, file):
        digest.update(part.read_bytes())
    training = read_training(directory)
    fingerprint = training.get("base_fingerprint")
    tokens = token_rows(directory, config, tensors)
    if not (modules or saved or tokens or stacked):
        raise AdapterError(f"{directory} changes nothing", "Save the adapter again with PEFT.")
    return Adapter(
        name=check_name(name if name is not None else directory.resolve().name),
        directory=directory,
        config=config,
        keys=keys,
        modules=modules,
        saved=saved,
        tokens=tokens,
        stacked=stacked,
        base_copies=copies,
        invocation=tuple(int(token) for token in config.get("alora_invocation_tokens") or ()),
        labels=tuple(str(label) for label in training.get("labels") or ()),
        base_model=config.get("base_model_name_or_path"),
        base_fingerprint=str(fingerprint) if fingerprint else None,
        digest=digest.hexdigest(),
        warnings=warnings,
    )


def examine(
    path: str | os.PathLike[str], name: str, *, trained: bool = True
) -> tuple[Adapter | None, list[Refusal]]:
    """Read a PEFT directory as far as it goes, and list everything that is refused.

    Args:
        path: as for :func:`load_adapter`.
        name: what to call the adapter.
        trained: one that has no effect is refused; training asks before it has begun.

    Returns:
        The adapter, ``None`` where both modes refuse it; and every reason for which a mode would
        refuse it without looking at a base.

    Raises:
        AdapterError: the folder has no readable config.
    """
    directory = Path(path)
    found = list(config_refusals(read_config(directory)))
    if any(len(refusal.modes) > 1 for refusal in found):
        return None, found
    adapter: Adapter | None = None
    try:
        adapter = load_adapter(directory, name)
        if trained:
            adapter.check_effect()
    except AdapterError as error:
        found.append(Refusal(str(error), error.hint))
    return adapter, found
