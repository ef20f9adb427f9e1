"""What sentence-transformers' files in a model folder say: pooling, prompts, lengths, letter case.

``modules.json`` names the modules and their folders. Whatever cannot be done as it says is refused
by name. Source: sentence-transformers 6, ``base/model.py`` and ``base/modules/transformer.py``.
Knows files; knows nothing of sessions or texts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from lora_edge.errors import (
    BundleError,
    OptionError,
    UnsupportedAdapterError,
    UnsupportedModelError,
)
from lora_edge.files.json import read_json, read_object
from lora_edge.files.paths import path_inside
from lora_edge.maths.pooling import MODES, Mode, Pooling
from lora_edge.tasks.task import EMBEDDING

MODULES_FILE = "modules.json"
PROMPTS_FILE = "config_sentence_transformers.json"
_TOKENIZER_FILE = "tokenizer_config.json"
SENTENCE_FOLDER = "sentence_transformers"
"""Below an adapter's folder in a bundle: the files that it brings of its own."""
TRANSFORMER_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""What the settings of the transformer itself are called; the first that is there counts."""

_PACKAGE = "sentence_transformers."
_HINT = "Take the hidden states of the tokens (logits), and pool them yourself."
_COPY = "Copy the model's folder again, its modules.json and every folder that it names."
# In the order in which older releases put the results side by side.
_FLAGS: Mapping[str, Mode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_POOLING_FIELDS = {
    *_FLAGS, "pooling_mode", "include_prompt", "embedding_dimension", "word_embedding_dimension",
}  # fmt: skip
_HIDDEN = {"method": "forward", "method_output_name": "last_hidden_state"}
_TEXTS_ALONE = ({"text": _HIDDEN}, {"text": _HIDDEN, "message": _HIDDEN})
# Fields of the transformer's settings, and the values at which they change nothing here.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "transformer_task": ("feature-extraction",),
    "module_output_name": ("token_embeddings",),
    "processing_kwargs": (None, {}),
    "query_length": (None,),
    "document_length": (None,),
    "query_expansion": (None,),
    "tokenizer_args": (None, {}),
    "tokenizer_kwargs": (None, {}),
    "processor_kwargs": (None, {}),
    "config_args": (None, {}),
    "config_kwargs": (None, {}),
    "tokenizer_name_or_path": (None,),
}
_FREE = ("max_seq_length", "do_lower_case", "unpad_inputs", "model_args", "model_kwargs", "backend")


@dataclass(frozen=True)
class SentenceModules:
    """How a model folder makes embeddings of texts.

    Attributes:
        pooling: hidden states -> embedding.
        max_length: texts are cut to this many tokens; ``None``: at the model's own limit.
        lower_case: texts are lowered before they are tokenized.
        prompts: name -> what is put in front of a text.
        default_prompt: the prompt of a text for which none is asked; empty: none.
    """

    pooling: Pooling = field(default_factory=Pooling)
    max_length: int | None = None
    lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str = ""

    def prompt(self, name: str | None) -> str:
        """The prompt of a name; ``None``: the folder's default.

        Raises:
            OptionError: there is no such prompt.
        """
        if name is None:
            return self.default_prompt
        if name not in self.prompts:
            known = ", ".join(sorted(self.prompts)) or "none at all"
            raise OptionError(
                f"there is no prompt named {name!r}; the model has {known}",
                "Give one of these, or put the words in front of the text yourself.",
            )
        return self.prompts[name]


def sentence_files(directory: Path) -> tuple[str, ...]:
    """The files of a model folder that :func:`load_sentence_modules` reads, relative to it.

    Raises:
        BundleError: ``modules.json`` cannot be read, or names a folder outside.
    """
    names = [MODULES_FILE, PROMPTS_FILE, _TOKENIZER_FILE, *TRANSFORMER_FILES]
    for kind, path in _modules(directory):
        if kind == "Transformer":
            names += [_join(path, name) for name in TRANSFORMER_FILES]
        else:
            names.append(_join(path, "config.json"))
    return tuple(name for name in dict.fromkeys(names) if (directory / name).is_file())


def load_sentence_modules(directory: Path, model: Path | None = None) -> SentenceModules:
    """What a folder says; without ``modules.json`` the mean of the hidden states.

    Args:
        directory: the folder.
        model: of an adapter's folder: the model's, whose tokenizer it has where it brings none.

    Raises:
        UnsupportedModelError: a module, a way of pooling or a setting that is not known; it is
            named.
        BundleError: a file is missing that ``modules.json`` names, or cannot be read.
    """
    modules = _modules(directory)
    if not (directory / MODULES_FILE).is_file():
        stray = sorted(path.parent.name for path in directory.glob("*_Pooling/config.json"))
        if stray:
            raise UnsupportedModelError(
                f"{directory} has a folder {stray[0]} and no {MODULES_FILE} that names it: "
                "sentence-transformers would not read it",
                _COPY,
            )
        return _with_settings(directory, "", Pooling(), model)
    kinds = [kind for kind, _ in modules]
    known = {"Transformer", "Pooling", "Normalize"}
    strange = [kind for kind in kinds if kind not in known]
    where = directory / MODULES_FILE
    if strange:
        raise UnsupportedModelError(f"{where}: the module {strange[0]!r} is not known", _HINT)
    if kinds[:2] != ["Transformer", "Pooling"] or set(kinds[2:]) - {"Normalize"}:
        raise UnsupportedModelError(
            f"{where}: the modules are {', '.join(kinds) or 'none'}; expected Transformer, "
            "Pooling, and Normalize or nothing",
            _HINT,
        )
    for kind, path in modules[2:]:
        _check_normalize(directory, kind, path)
    normalize = "Normalize" in kinds
    folder = directory / modules[1][1] / "config.json"
    if not folder.is_file():
        raise BundleError(f"{where} names the pooling {modules[1][1]!r}: no {folder}", _COPY)
    pooling = _pooling(read_object(folder, BundleError, _COPY), folder, normalize)
    return _with_settings(directory, modules[0][1], pooling, model)


def _modules(directory: Path) -> list[tuple[str, str]]:
    """Kind and folder of each module, in order; a kind of another package by its full name."""
    path = directory / MODULES_FILE
    if not path.is_file():
        return []
    data = read_json(path, BundleError, _COPY)
    if not isinstance(data, list) or not all(isinstance(entry, dict) for entry in data):
        raise BundleError(f"{path} is not a JSON list of modules", _COPY)
    found = []
    for entry in data:
        kind, folder = entry.get("type", ""), entry.get("path", "")
        if not isinstance(kind, str):
            raise BundleError(f"{path} has the type {kind!r:.100}, expected a name", _COPY)
        if folder != "":  # the model's own
            path_inside(directory, folder, f"{path}: a module's path", BundleError, _COPY)
        found.append((kind.rpartition(".")[2] if kind.startswith(_PACKAGE) else kind, folder))
    return found


def _check_normalize(directory: Path, kind: str, folder: str) -> None:
    path = directory / folder / "config.json"
    # Without a folder of its own the module has no settings: that config.json is the model's.
    config = read_object(path, BundleError, _COPY) if folder and path.is_file() else {}
    for name, value in config.items():
        if value != "sentence_embedding":
            raise UnsupportedModelError(f"{path}: {kind} with {name} {value!r} is not known", _HINT)


def _pooling(config: Mapping[str, Any], path: Path, normalize: bool) -> Pooling:
    unknown = sorted(set(config) - _POOLING_FIELDS)
    if unknown:
        raise UnsupportedModelError(f"{path}: the field {unknown[0]!r} is not known", _HINT)
    named = config.get("pooling_mode")
    modes = [named] if isinstance(named, str) else named
    if modes is None:
        modes = [mode for flag, mode in _FLAGS.items() if config.get(flag)] or ["mean"]
    if not isinstance(modes, list) or not modes or any(mode not in MODES for mode in modes):
        raise UnsupportedModelError(
            f"{path}: pooling by {modes!r} is not known, expected of {', '.join(MODES)}", _HINT
        )
    include = config.get("include_prompt", True)
    if not isinstance(include, bool):
        raise UnsupportedModelError(f"{path}: include_prompt is {include!r}", _HINT)
    return Pooling(tuple(modes), normalize, include)


def _with_settings(
    directory: Path, folder: str, pooling: Pooling, model: Path | None
) -> SentenceModules:
    settings: Mapping[str, Any] = {}
    path = directory / folder
    for name in TRANSFORMER_FILES:
        if (directory / folder / name).is_file():
            path = directory / folder / name
            settings = read_object(path, BundleError, _COPY)
            break
    for name, value in settings.items():
        modality = name == "modality_config" and value in _TEXTS_ALONE
        if name not in _FREE and not modality and value not in _NEUTRAL.get(name, ()):
            raise UnsupportedModelError(f"{path}: {name} is {value!r}, which is not known", _HINT)
    prompts, default = _prompts(directory)
    own = model is None or (directory / _TOKENIZER_FILE).is_file()
    limit = _model_max_length(directory if own or model is None else model)
    longest = settings.get("max_seq_length") or limit
    if longest is not None and (not isinstance(longest, int) or longest < 1):
        raise UnsupportedModelError(f"{path}: max_seq_length is {longest!r}", _HINT)
    lower = settings.get("do_lower_case", False)
    return SentenceModules(pooling, longest, bool(lower), prompts, default)


def _model_max_length(directory: Path) -> int | None:
    """Where texts are cut by the tokenizer's own settings."""
    path = directory / _TOKENIZER_FILE
    if not path.is_file():
        return None
    value = read_object(path, BundleError, _COPY, nonfinite=True).get("model_max_length")
    # transformers writes int(1e30) where there is no limit.
    return int(value) if isinstance(value, int | float) and 1 <= value < 1e9 else None


def _prompts(directory: Path) -> tuple[dict[str, str], str]:
    path = directory / PROMPTS_FILE
    if not path.is_file():
        return {}, ""
    config = read_object(path, BundleError, _COPY)
    prompts = config.get("prompts") or {}
    default = config.get("default_prompt_name")
    texts = isinstance(prompts, dict) and all(isinstance(x, str) for x in prompts.values())
    if not texts or not (default is None or (isinstance(default, str) and default in prompts)):
        raise BundleError(f"{path}: the prompts are {prompts!r}, the default is {default!r}", _COPY)
    return dict(prompts), prompts[default] if default else ""


def _join(folder: str, name: str) -> str:
    return (PurePosixPath(folder) / name).as_posix()


def write_sentence_modules(
    directory: Path,
    task: str,
    folders: Mapping[str, Path],
    *,
    merged: bool = False,
    output: Path | None = None,
) -> None:
    """Carry the sentence-transformers files of adapters' folders where they say other things.

    Args:
        directory: a bundle, which has the base's files; of another task than embeddings, nothing is
            written.
        task: what it is for.
        folders: name -> the adapter's own folder.
        merged: the adapter is in the weights: its files take the place of the base's too.
        output: where the files go; ``None``: into the bundle.

    Raises:
        UnsupportedAdapterError: a module or a setting that cannot be represented; it is named.
        BundleError: a file cannot be read.
    """
    if task != EMBEDDING:
        return
    for name, source in folders.items():
        if not (source / MODULES_FILE).is_file():
            continue
        try:
            own = load_sentence_modules(source, directory)
        except UnsupportedModelError as error:
            what = f"adapter {name} is refused: {error}"
            raise UnsupportedAdapterError(what, error.hint) from error
        if own == load_sentence_modules(directory):
            continue
        folder = (output or directory) / "adapters" / name / SENTENCE_FOLDER
        _copy(source, folder, sentence_files(source))
        if merged:
            _put_first(folder, directory, own, name)


def own_sentence_files(directory: Path) -> tuple[str, ...]:
    """As :func:`sentence_files`, without the tokenizer's."""
    return tuple(name for name in sentence_files(directory) if name != _TOKENIZER_FILE)


def _put_first(folder: Path, directory: Path, own: SentenceModules, name: str) -> None:
    """Make the files of a merged adapter the bundle's own, as other libraries read them there.

    Raises:
        UnsupportedAdapterError: they would say something else there.
    """
    if own.max_length is not None:  # which the adapter's tokenizer may say, and stays with it
        path = folder / next(
            (x for x in sentence_files(folder) if x.rpartition("/")[2] in TRANSFORMER_FILES),
            _join(_modules(folder)[0][1], TRANSFORMER_FILES[0]),
        )
        settings = read_object(path, BundleError, _COPY) if path.is_file() else {}
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = json.dumps({**settings, "max_seq_length": own.max_length}, indent=2)
        path.write_text(whole, encoding="utf-8")
    for relative in own_sentence_files(directory):
        (directory / relative).unlink()
    _copy(folder, directory, own_sentence_files(folder))
    if load_sentence_modules(directory) != own:
        raise UnsupportedAdapterError(
            f"adapter {name} is refused: it cuts no texts, and the base's tokenizer does",
            "Give max_seq_length in its sentence_bert_config.json, or export it switchable.",
        )


def _copy(source: Path, target: Path, names: Sequence[str]) -> None:
    for relative in names:
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / relative, target / relative)
