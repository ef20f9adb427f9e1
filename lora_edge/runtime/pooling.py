"""Hidden states of tokens -> one embedding for each text, as sentence-transformers' files say.

Knows those files and numpy; knows nothing of sessions or texts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lora_edge.errors import BundleError, UnsupportedModelError

Mode = Literal["mean", "cls", "max", "lasttoken"]
POOLING_FILES = ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json")
"""What a model folder may hold about its embeddings."""

_MODES: Mapping[str, Mode] = {
    "mean": "mean",
    "pooling_mode_mean_tokens": "mean",
    "cls": "cls",
    "pooling_mode_cls_token": "cls",
    "max": "max",
    "pooling_mode_max_tokens": "max",
    "lasttoken": "lasttoken",
    "pooling_mode_lasttoken": "lasttoken",
}
_HINT = "Take the hidden states of the tokens, and pool them yourself."


@dataclass(frozen=True)
class Pooling:
    """How the hidden states of a text become its embedding.

    Attributes:
        mode: ``mean`` over the tokens, the first one (``cls``), the largest value of each feature
            (``max``), or the last token.
        normalize: scale the embedding to length 1.
        max_length: texts are cut to this many tokens; ``None``: never.
    """

    mode: Mode = "mean"
    normalize: bool = False
    max_length: int | None = None

    def __call__(
        self, hidden: NDArray[np.float32], attention_mask: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """``[batch, seq, hidden]`` and ``[batch, seq]`` -> ``[batch, hidden] float32``.

        Rows are padded on the right.
        """
        kept = attention_mask[:, :, None].astype(np.float32)
        if self.mode == "cls":
            pooled = hidden[:, 0]
        elif self.mode == "lasttoken":
            pooled = hidden[np.arange(len(hidden)), attention_mask.sum(1) - 1]
        elif self.mode == "max":
            pooled = np.where(kept > 0, hidden, -np.inf).max(1)
        else:
            pooled = (hidden * kept).sum(1) / kept.sum(1)
        if self.normalize:
            pooled = pooled / np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)
        found: NDArray[np.float32] = pooled.astype(np.float32)
        return found


def load_pooling(directory: Path) -> Pooling:
    """The pooling of a model folder; the mean where it says nothing.

    Reads ``modules.json``, ``1_Pooling/config.json`` (or the folder that modules.json names) and
    ``sentence_bert_config.json``.

    Raises:
        UnsupportedModelError: a module or a way of pooling that is not known.
        BundleError: a file cannot be read.
    """
    folder, normalize = "1_Pooling", False
    for module in _read(directory / "modules.json", list) or ():
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind == "Pooling":
            folder = str(module.get("path", folder))
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise UnsupportedModelError(
                f"{directory / 'modules.json'}: the module {kind!r} is not known", _HINT
            )
    cut = (_read(directory / "sentence_bert_config.json", dict) or {}).get("max_seq_length")
    path = directory / folder / "config.json"
    config = _read(path, dict)
    return Pooling("mean" if config is None else _mode(config, path), normalize, cut)


def _mode(config: Mapping[str, Any], path: Path) -> Mode:
    named = [config["pooling_mode"]] if isinstance(config.get("pooling_mode"), str) else []
    named += [key for key, value in config.items() if value is True and key.startswith("pooling_")]
    if len(named) != 1 or named[0] not in _MODES:
        raise UnsupportedModelError(
            f"{path}: pooling by {', '.join(named) or 'nothing'} is not known, expected one of "
            f"{', '.join(_MODES)}",
            _HINT,
        )
    if config.get("include_prompt", True) is not True:
        raise UnsupportedModelError(f"{path}: include_prompt is false, which is not known", _HINT)
    return _MODES[named[0]]


def _read(path: Path, kind: type) -> Any:
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"{path} is not JSON: {error}", "Copy it again.") from error
    if not isinstance(data, kind):
        raise BundleError(f"{path} is not a JSON {kind.__name__}", "Copy it again.")
    return data
