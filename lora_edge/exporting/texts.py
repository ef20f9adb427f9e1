"""The text side of an export: tokenizers and chat templates that say what transformers says.

The base's files are taken as they are where the runtime reads them as transformers does; else
transformers writes them anew. Either way they are compared, on a corpus of texts and conversations,
before anything is published. What an adapter's folder brings of its own is compared with the base's
by meaning, and carried where it differs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lora_edge.adapter.directory import text_aspects
from lora_edge.base.checkpoint import Base
from lora_edge.bundle.bundle import file_entry
from lora_edge.bundle.manifest import Manifest, aspect_names
from lora_edge.errors import (
    AdapterError,
    BaseModelError,
    BundleError,
    DataError,
    LoraEdgeError,
    MissingDependencyError,
)
from lora_edge.files.tokenizer import (
    TEMPLATE_FILE,
    TEMPLATE_FOLDER,
    VOCABULARIES,
    has_vocabulary,
    read_templates,
)
from lora_edge.names import TextAspect
from lora_edge.runtime.text.corpus import CONTEXTS, CONVERSATIONS, TEXTS
from lora_edge.runtime.text.texts import text_folder
from lora_edge.runtime.text.tokenizer import Tokenizer

_CONFIG = "tokenizer_config.json"
_OURS = ("tokenizer.json", _CONFIG, "special_tokens_map.json", "added_tokens.json", TEMPLATE_FILE)
_SHOWN, _LENGTH = 5, 12
_FIVE = {"thinking", "reasoning_content"}  # keys that transformers 4 does not know
Say = Callable[[str], None]


def write_base_text(base: Base, stage: Path, manifest: Manifest, say: Say) -> None:
    """Write the base's tokenizer and chat templates into a bundle, equal to transformers'.

    A base without a tokenizer, or with one that is written in Python, gives a bundle that takes
    token ids only; ``say`` is told.

    Raises:
        BaseModelError: transformers cannot read the tokenizer, or the files cannot be made equal.
    """
    from lora_edge.base.tokenizer import read_tokenizer

    if not has_vocabulary(base.directory):
        if manifest.reads.vocab_size:
            say(f"{base.name_or_path} has no tokenizer: the bundle takes token ids, and no text")
        return
    _check_sentencepiece(base.directory)
    theirs = read_tokenizer(base.directory, BaseModelError)
    if not theirs.portable:
        say(
            f"the tokenizer of {base.name_or_path} ({theirs.kind}) is written in Python, and no "
            "tokenizer.json can be made of it: the bundle takes token ids, and no text"
        )
        return
    _copy(base.directory, stage)
    problem = _difference(stage, None, theirs)
    if problem:
        _clear(stage)
        with tempfile.TemporaryDirectory(prefix="lora-edge-") as scratch:
            theirs.save(Path(scratch), BaseModelError)
            _copy(Path(scratch), stage)
        say(f"its tokenizer is written anew, as transformers reads it: {problem}")
        problem = _difference(stage, None, theirs)
    if problem:
        raise BaseModelError(
            f"the tokenizer of {base.name_or_path} cannot be carried over: {problem}",
            "Load it with AutoTokenizer and save_pretrained() it into the base's folder.",
        )


def write_adapter_texts(
    directory: Path,
    manifest: Manifest,
    folders: Mapping[str, Path],
    say: Say,
    *,
    output: Path | None = None,
) -> Manifest:
    """Carry what adapters' folders bring of their own, where it differs from the base's.

    Args:
        directory: the bundle, with the base's tokenizer and ``config.json``.
        manifest: its manifest.
        folders: name -> PEFT directory.
        say: told of what is carried.
        output: where the new files of a switchable bundle go; ``None``: into it.

    Returns:
        The manifest with what each adapter brings, and the hashes of the new files.

    Raises:
        AdapterError: an adapter's tokenizer cannot be honoured.
        MissingDependencyError: its files differ from the base's, and transformers, which could tell
            whether they mean the same, is not installed.
    """
    entries, files = dict(manifest.adapters), dict(manifest.files)
    written = directory if output is None else output
    for name, folder in folders.items():
        merged = manifest.mode == "merged"
        target = directory if merged else written / text_folder(name)
        aspects = _carry(name, folder, directory, target, manifest, say)
        if not aspects:
            continue
        entries[name] = dataclasses.replace(entries[name], text=aspects)
        if not merged:
            found = (x for x in target.rglob("*") if x.is_file())
            files |= {x.relative_to(written).as_posix(): file_entry(x) for x in sorted(found)}
        say(f"{name} brings its own {aspect_names(aspects)}, used where it is used")
    return dataclasses.replace(manifest, adapters=entries, files=files)


def own_folders(
    adapters: Mapping[str, str | os.PathLike[str]], local: Mapping[str, str | os.PathLike[str]]
) -> dict[str, Path]:
    """Name -> the folder that the adapter was given in, though it was converted since.

    Args:
        adapters: name -> folder or hub id.
        local: name -> PEFT directory.
    """
    return {name: Path(x if Path(x).is_dir() else local[name]) for name, x in adapters.items()}


def _carry(
    name: str, folder: Path, base: Path, target: Path, manifest: Manifest, say: Say
) -> tuple[TextAspect, ...]:
    with _blaming(name):
        held = text_aspects(folder)
    if not held or _reads_alike(folder, base, held):
        return ()
    try:
        from lora_edge.base.tokenizer import read_tokenizer
    except ImportError as error:
        raise MissingDependencyError(
            f"adapter {name} brings its own {aspect_names(held)}, and transformers, which tells "
            "whether it differs from the base's, is not installed",
            "Install it with: pip install 'lora-edge[export]'; or remove the adapter's tokenizer "
            "files, if the base's are right for it.",
        ) from error
    if "tokenizer" not in held:
        return _write_templates(read_templates(folder), target)
    _check_sentencepiece(folder)
    theirs = _read_adapters(read_tokenizer, folder, base)
    if not theirs.portable:
        raise AdapterError(
            f"adapter {name} brings a tokenizer that is written in Python ({theirs.kind})",
            "Remove its tokenizer files, if the base's tokenizer is right for it.",
        )
    based = read_tokenizer(base, BaseModelError) if has_vocabulary(base) else None
    aspects: list[TextAspect] = []
    templates = theirs.templates
    if based is None or theirs.meaning() != based.meaning():
        _check_vocabulary(name, theirs, manifest, say)
        aspects.append("tokenizer")
    if templates and (based is None or templates != based.templates):
        aspects.append("chat_template")
    if not aspects:
        return ()
    with tempfile.TemporaryDirectory(prefix="lora-edge-") as scratch:
        theirs.save(Path(scratch), AdapterError)
        target.mkdir(parents=True, exist_ok=True)
        if "tokenizer" in aspects:
            (target / "special_tokens_map.json").unlink(missing_ok=True)
            for file in ("tokenizer.json", _CONFIG):
                shutil.copyfile(Path(scratch) / file, target / file)
    if "chat_template" in aspects:
        _write_templates(templates, target)
    over = None if target == base else target
    problem = _difference(base, over, theirs)
    if problem:
        raise AdapterError(
            f"the tokenizer of adapter {name} cannot be carried over: {problem}",
            "Load it with AutoTokenizer and save_pretrained() it into the adapter's folder.",
        )
    return tuple(aspects)


def _check_sentencepiece(folder: Path) -> None:
    """transformers blames another package where this one is missing."""
    pieces = [x.name for kind in ("*.model", "*.spm") for x in sorted(folder.glob(kind))]
    if (folder / "tokenizer.json").is_file() or not pieces or find_spec("sentencepiece"):
        return
    raise MissingDependencyError(
        f"{folder} has its tokenizer in {pieces[0]} alone, and reading that needs sentencepiece, "
        "which is not installed",
        "Install it with: pip install sentencepiece protobuf",
    )


def _read_adapters(read: Callable[..., Any], folder: Path, base: Path) -> Any:
    """The adapter's tokenizer; by the base's config where it does not say its class."""
    try:
        return read(folder, AdapterError)
    except AdapterError:
        if (folder / "config.json").is_file() or not (base / "config.json").is_file():
            raise
        with tempfile.TemporaryDirectory(prefix="lora-edge-") as scratch:
            _copy(folder, Path(scratch), everything=True)
            shutil.copyfile(base / "config.json", Path(scratch) / "config.json")
            found = read(Path(scratch), AdapterError)
        return dataclasses.replace(found, where=str(folder))


def _check_vocabulary(name: str, theirs: Any, manifest: Manifest, say: Say) -> None:
    rows = manifest.reads.vocab_size
    beyond = sorted(token for token, index in theirs.vocabulary.items() if index >= rows)
    pads = theirs.special_tokens.get("pad_token")
    if not beyond or not rows:
        return
    if beyond == [pads]:
        say(f"{name}: the padding token {pads!r} has no row in the base, and is never used")
        return
    shown = ", ".join(map(repr, beyond[:_SHOWN])) + (" ..." if len(beyond) > _SHOWN else "")
    raise AdapterError(
        f"adapter {name} brings a tokenizer with {len(beyond)} tokens beyond the base's vocabulary "
        f"of {rows}: {shown}",
        "Save the base with its resized embeddings, and export that one; or remove the adapter's "
        "tokenizer files, if it was trained without these tokens.",
    )


def _reads_alike(folder: Path, base: Path, held: tuple[TextAspect, ...]) -> bool:
    """Whether the runtime reads both folders alike, transformers unasked."""
    try:
        templates = read_templates(folder)
        if templates and templates != read_templates(base):
            return False
        if "tokenizer" not in held:
            return True
        return Tokenizer(folder).meaning() == Tokenizer(base).meaning()
    except BundleError:  # no tokenizer.json in one of them, or a damaged one
        return False


def _write_templates(templates: Mapping[str, str], target: Path) -> tuple[TextAspect, ...]:
    target.mkdir(parents=True, exist_ok=True)
    (target / TEMPLATE_FILE).unlink(missing_ok=True)
    shutil.rmtree(target / TEMPLATE_FOLDER, ignore_errors=True)
    for name, source in templates.items():
        file = target / TEMPLATE_FILE
        if name != "default":
            file = target / TEMPLATE_FOLDER / f"{name}.jinja"
            if file.name != f"{name}.jinja" or len(file.relative_to(target).parts) != 2:
                raise AdapterError(
                    f"a chat template is called {name!r}", "Give it a name that is a file's."
                )
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source, encoding="utf-8", newline="")
    return ("chat_template",)


def _copy(source: Path, target: Path, *, everything: bool = False) -> None:
    names = [name for name in _OURS if (source / name).is_file()]
    if everything:
        names += [x.name for pattern in VOCABULARIES for x in source.glob(pattern) if x.is_file()]
    names += [f"{TEMPLATE_FOLDER}/{x.name}" for x in (source / TEMPLATE_FOLDER).glob("*.jinja")]
    for name in dict.fromkeys(names):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def _clear(folder: Path) -> None:
    for name in _OURS:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / TEMPLATE_FOLDER, ignore_errors=True)


def _difference(folder: Path, over: Path | None, theirs: Any) -> str:
    """Where the runtime and transformers differ first; empty where they agree."""
    try:
        ours = Tokenizer(folder, over)
        return next(_differences(ours, theirs), "")
    except BundleError as error:
        return str(error)


def _differences(ours: Tokenizer, theirs: Any) -> Iterator[str]:
    special = dict(ours.special_tokens)
    conversations = list(CONVERSATIONS)
    if not theirs.modern:  # what transformers 5 does otherwise than 4 is not the model's affair
        special = {x: text for x, text in special.items() if x in theirs.special_tokens}
        conversations = [
            x for x in CONVERSATIONS if not any(_FIVE & {*m} or None in m.values() for m in x)
        ]
    if special != theirs.special_tokens:
        names = sorted({x for x, _ in special.items() ^ theirs.special_tokens.items()})
        yield f"the special tokens {', '.join(names)} differ"
    if ours.vocabulary() != theirs.vocabulary:
        yield "the vocabularies differ"
    joined = [f"a{token}b {token} c{token}" for token in theirs.added[:256]]
    for text in (*TEXTS, *joined):
        for around in (True, False):
            ids = theirs.encode(text, special_tokens=around)
            if ours.encode(text, special_tokens=around) != ids:
                yield f"the ids of {text[:40]!r} differ"
        if ours.decode(ids) != theirs.decode(ids):
            yield f"the text of the ids of {text[:40]!r} differs"
    for text, pair in zip(TEXTS, reversed(TEXTS), strict=True):
        coded = ours.encode_input(text, pair, max_length=_LENGTH)
        if (coded.ids, coded.type_ids) != theirs.encode_pair(text, pair, _LENGTH):
            yield f"the ids of {text[:20]!r} and {pair[:20]!r} differ, cut to {_LENGTH}"
    if theirs.templates and dict(ours.templates) != theirs.templates:
        yield "the chat templates differ"
    if not theirs.templates:
        return
    for messages in conversations:
        for context in CONTEXTS:
            for _ in range(2):  # a template may print the time
                expected = theirs.render(messages, **context)
                found = _rendered(ours, messages, context)
                if found in (None, expected):  # what we refuse is no silent difference
                    break
            else:
                yield f"the chat template renders {messages!r:.60} otherwise"


def _rendered(ours: Tokenizer, messages: Any, context: Mapping[str, Any]) -> str | None:
    try:
        return ours.chat_text(messages, **context)
    except DataError:
        return None


@contextlib.contextmanager
def _blaming(name: str) -> Iterator[None]:
    """Errors in an adapter's own files are the adapter's."""
    try:
        yield
    except LoraEdgeError as error:
        raise AdapterError(f"adapter {name}: {error}", error.hint) from error
