"""PyTorch's side of what lies around the graph: transformers' tokenizers, processors and weights.

Beside the other references, the only file of this package that imports torch or transformers.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lora_edge.base.quiet import quiet
from lora_edge.errors import BaseModelError
from lora_edge.tasks.task import Task

if TYPE_CHECKING:
    from lora_edge.base.mapped import Mapped

Array = NDArray[Any]


class Parameters:
    """The weights of a base as transformers loads them."""

    def __init__(self, model: Any, task: Task, mapped: Mapped | None = None) -> None:
        """Note what the model has.

        Args:
            model: transformers' model, of any dtype. What is attached to it later is not seen.
            task: what it was loaded for.
            mapped: what of it is mapped from the checkpoint.
        """
        import torch

        self._model = model
        self.label_layer = task.label_layer(model)
        self.max_length = _positions(model)
        self._torch = torch
        self._tensors = {
            **dict(self._model.named_buffers(remove_duplicate=False)),
            **dict(self._model.named_parameters(remove_duplicate=False)),
        }
        self._parameters = set(dict(self._model.named_parameters(remove_duplicate=False)))
        self._mapped = mapped
        self._last: Any = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all parameters."""
        return tuple(sorted(self._parameters))

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding that the model's config tells of."""
        return int(self._model.config.get_text_config().vocab_size)

    @property
    def pad_token_id(self) -> int:
        """What fills up short rows; 0 where the config does not say."""
        return int(self._model.config.get_text_config().pad_token_id or 0)

    def __contains__(self, name: str) -> bool:
        """Whether there is such a parameter or buffer."""
        return name in self._tensors

    def value(self, name: str) -> Array | None:
        """A parameter or buffer, float32 where it is a float; ``None``: there is none."""
        tensor = self._tensors.get(name)
        if tensor is None:
            return None
        if self._last is not None and self._mapped is not None:
            self._mapped.give_back(self._last)
        self._last = tensor
        tensor = tensor.detach()
        found: Array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        return found

    def computed(self, positions: int) -> Iterator[tuple[str, Array]]:
        """What the model computes once: its rotary tables, whole and halved, and its buffers.

        Args:
            positions: the tables' number of rows.

        Yields:
            What it is, and its values.
        """
        for name in sorted(set(self._tensors) - self._parameters):
            value = self.value(name)
            if value is not None and value.size > 1 and value.dtype.kind == "f":
                yield name, value
        config = self._model.config.get_text_config()
        kinds = sorted(set(getattr(config, "layer_types", None) or ()))
        for path, module in self._model.named_modules():
            if not type(module).__name__.endswith("RotaryEmbedding"):
                continue
            takes = inspect.signature(module.forward).parameters
            if list(takes)[:2] != ["x", "position_ids"]:
                continue
            for kind in kinds if "layer_type" in takes else [None]:
                yield from self._tables(path, module, kind, positions)

    def _tables(
        self, path: str, module: Any, kind: str | None, positions: int
    ) -> Iterator[tuple[str, Array]]:
        everywhere = self._torch.arange(positions)[None]
        more = {} if kind is None else {"layer_type": kind}
        with self._torch.no_grad():
            angles = module(self._torch.zeros(1), everywhere, **more)
        for what, table in zip(("cos", "sin"), angles, strict=True):
            whole = table[0].float().numpy()
            name = f"{path} ({what}{'' if kind is None else f', {kind}'})"
            half = whole.shape[1] // 2
            for part in (whole, whole[:, :half], whole[:, ::2]):
                yield name, part


def _positions(model: Any) -> int | None:
    """The longest sequence; a RoBERTa's table begins behind the padding's position.

    ``None`` where the config does not say.
    """
    for path, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if path.endswith("position_embeddings") and padding is not None:
            return int(module.num_embeddings) - int(padding) - 1
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def reference_tokenizer(directory: Path) -> Any:
    """transformers' tokenizer of a folder.

    Raises:
        BaseModelError: transformers cannot load it.
    """
    import transformers

    return _loaded(transformers.AutoTokenizer.from_pretrained, directory)


def reference_pixels(directory: Path) -> Callable[[Any], NDArray[np.float32]]:
    """transformers' image processor of a folder, its Pillow backend: picture -> ``[3, h, w]``.

    Raises:
        BaseModelError: transformers cannot load it.
    """
    import transformers

    def load(folder: Path) -> Any:
        return transformers.AutoImageProcessor.from_pretrained(folder, use_fast=False)

    processor = _loaded(load, directory)

    def pixels(picture: Any) -> NDArray[np.float32]:
        found: NDArray[np.float32] = np.asarray(processor(picture)["pixel_values"])[0]
        return found

    return pixels


def reference_generation(directory: Path) -> tuple[list[int], dict[str, Any]]:
    """What ends a text, and how tokens are chosen, by transformers' reading of a folder's files.

    Returns:
        Token ids, sorted; and ``temperature`` (0: greedy) and the other settings of ``generate``.
    """
    import transformers

    with quiet():
        if (directory / "generation_config.json").is_file():
            config = transformers.GenerationConfig.from_pretrained(directory)
        else:
            model = transformers.AutoConfig.from_pretrained(directory)
            config = transformers.GenerationConfig.from_model_config(model)
    found = config.eos_token_id
    ends = found if isinstance(found, list) else [] if found is None else [found]

    def value(name: str, default: float) -> float:
        given = getattr(config, name, None)
        return default if given is None else given

    sampled = {
        "temperature": float(value("temperature", 1.0)),
        "top_k": int(value("top_k", 50)),
        "top_p": float(value("top_p", 1.0)),
        "min_p": float(value("min_p", 0.0)),
    }
    return sorted(int(index) for index in ends), {
        **(sampled if config.do_sample else {"temperature": 0.0}),
        "repetition_penalty": float(value("repetition_penalty", 1.0)),
        "max_new_tokens": config.max_new_tokens,
    }


def reference_labels(directory: Path) -> list[str]:
    """The names of a base's labels, in the order of its head's outputs; empty: it names none."""
    import transformers

    with quiet():
        config = transformers.AutoConfig.from_pretrained(directory)
    names: Mapping[int, str] = config.id2label or {}
    return [str(names[index]) for index in sorted(names)]


def rendered(tokenizer: Any, messages: Any) -> str | None:
    """A chat as transformers renders it; ``None``: the template refuses it."""
    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=True,
            )
        )
    except Exception:  # noqa: BLE001 - whatever a template raises is its refusal
        return None


def lowered(tokenizer: Any) -> Any:
    """A tokenizer that lowers letters first, as sentence-transformers does it."""
    from tokenizers import normalizers

    found = copy.deepcopy(tokenizer)
    inner = found.backend_tokenizer
    own = [] if inner.normalizer is None else [inner.normalizer]
    inner.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
    return found


def pooled(
    hidden: NDArray[np.floating], modes: list[str], *, normalize: bool, skipped: int
) -> NDArray[np.floating]:
    """One text's embedding, in torch: hidden states ``[len, hidden]`` -> ``[modes * hidden]``.

    Args:
        hidden: of the text alone, without padding.
        modes: sentence-transformers' names.
        normalize: to length 1.
        skipped: tokens at the beginning that do not count.
    """
    import torch

    rows = torch.from_numpy(np.ascontiguousarray(hidden))
    weights = torch.arange(1, len(rows) + 1, dtype=rows.dtype)[skipped:, None]
    rows = rows[skipped:]
    ways = {
        "cls": lambda: rows[0],
        "max": lambda: rows.max(0).values,
        "mean": lambda: rows.mean(0),
        "mean_sqrt_len_tokens": lambda: rows.sum(0) / len(rows) ** 0.5,
        "weightedmean": lambda: (rows * weights).sum(0) / weights.sum(),
        "lasttoken": lambda: rows[-1],
    }
    found = torch.cat([ways[mode]() for mode in modes])
    if normalize:
        found = torch.nn.functional.normalize(found, dim=0)
    result: NDArray[np.floating] = found.numpy()
    return result


def _loaded(load: Callable[[Path], Any], directory: Path) -> Any:
    with quiet():
        try:
            return load(directory)
        except Exception as error:  # transformers' loaders raise whatever their parts raise
            raise BaseModelError(
                f"transformers cannot read the files of {directory}: {error}",
                "Check the folder with transformers.",
            ) from error
