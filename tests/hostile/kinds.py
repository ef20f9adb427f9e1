"""Every kind of file that is read: where it lies, how it is damaged, and what reads it."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple
from zipfile import ZIP_DEFLATED, ZipFile

from lora_edge.bundle.bundle import file_entry, load_bundle
from lora_edge.tasks.task import TEXT
from tests.hostile import harms, mutate, oracles, seeds

Mutate = Callable[[Random, bytes], bytes]
Read = Callable[[Path], None]


class Kind(NamedTuple):
    """A kind of file.

    Attributes:
        family: the seeds' folder.
        files: one of them is damaged.
        mutate: how.
        read: reads the folder as the package does.
        signed: the manifest's hash of the file is made right again.
        oracle: what is wrong with a folder that was accepted; empty: nothing.
        weight: how many mutants there are of it, relative to the others.
    """

    family: str
    files: tuple[str, ...]
    mutate: Mutate
    read: Read
    signed: bool = False
    weight: int = 2
    oracle: Callable[[Path], str] | None = None


def _run(bundle: Path) -> None:
    """Open a bundle and use it, as people do."""
    from lora_edge import Runner

    runner = Runner(bundle, threads=1)
    runner.logits([[1, 2, 3]], adapter=next(iter(runner.adapters), None))
    for _ in runner.adapters[1:]:
        runner.logits([[1, 2]], adapter=list(runner.adapters)[:1])
    runner.generate(["ab"], max_new_tokens=2)


def _command(*arguments: object) -> None:
    from lora_edge.cli import cli

    cli.main([str(x) for x in arguments], prog_name="lora-edge", standalone_mode=False)


def _manifest(folder: Path) -> None:
    _command("inspect", folder)
    _run(folder)


def _adapter_file(folder: Path) -> None:
    from lora_edge import Runner

    Runner(folder, threads=1).logits([[1, 2, 3]], adapter="alpha")


def _package(folder: Path) -> None:
    """Check a model package, and use its bundles."""
    from lora_edge.bundle.package import load_package

    package = load_package(folder)
    package.check()
    for number, variant in enumerate(package.variants.values()):
        _run(variant.unpack(folder / f"unpacked-{number}").directory)


def _adapter(folder: Path) -> None:
    from lora_edge.adapter.load import examine, load_adapter
    from lora_edge.errors import AdapterError

    examine(folder, "x")
    adapter = load_adapter(folder, "x")
    _ = adapter.kind, adapter.heads, adapter.ranks(), adapter.labels, adapter.invocation
    for mode in ("switchable", "merged"):
        try:
            adapter.check_mode(mode)  # type: ignore[arg-type]
        except AdapterError:
            continue
    for module in adapter.modules.values():
        module.factors()
        module.delta()


def _added(folder: Path) -> None:
    """Read an adapter, and add it to a bundle."""
    import shutil

    import lora_edge

    _adapter(folder)
    bundle = folder / "bundle"
    shutil.copytree(folder.parent.parent / "seeds" / "bundle", bundle)
    lora_edge.add(bundle, {"x": folder})
    lora_edge.Runner(bundle, threads=1).logits([[1, 2]], adapter="x")


def _training(folder: Path) -> None:
    from lora_edge.errors import LoraEdgeError
    from lora_edge.training.record import read_recipe

    try:
        read_recipe(folder / "training.json")
    except LoraEdgeError:
        _adapter(folder)
        raise
    _adapter(folder)


def _base(folder: Path) -> None:
    from lora_edge.base.checkpoint import resolve_base

    base = resolve_base(folder)
    _ = base.model_type, base.fingerprint()
    for key in tuple(base.keys()):
        base.weight(key)
    base.parameter("model.norm.weight")


def _model(folder: Path) -> None:
    from lora_edge.base.checkpoint import resolve_base
    from lora_edge.base.model import load_model

    load_model(resolve_base(folder), None, TEXT)


def _text(folder: Path) -> None:
    from lora_edge.runtime.text.defaults import read_defaults
    from lora_edge.runtime.text.tokenizer import Tokenizer

    tokenizer = Tokenizer(folder)
    ids = tokenizer.encode("Hello, wörld")
    tokenizer.decode(ids)
    tokenizer.encode_input("a", "b", max_length=8)
    tokenizer.encode_chat("Hello")
    tokenizer.chat_text([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    for token in read_defaults(folder).eos_ids:
        assert type(token) is int, f"the end token {token!r} was accepted"


def _pooling(folder: Path) -> None:
    import numpy as np

    from lora_edge.bundle.sentence import load_sentence_modules

    modules = load_sentence_modules(folder)
    hidden = np.ones((2, 3, 8), np.float32)
    found = modules.pooling(hidden, np.array([[1, 1, 1], [1, 0, 0]], np.int64))
    assert np.isfinite(found).all(), "an embedding that is not finite was accepted"
    assert modules.max_length is None or modules.max_length > 0, "a length was accepted"


def _image(folder: Path) -> None:
    import numpy as np

    from lora_edge.runtime.outputs.image import ImageProcessor

    processor = ImageProcessor.load(folder)
    file = next(iter(sorted(folder.glob("mutant*"))), folder / "image.png")
    pixels = processor([file])
    assert np.isfinite(pixels).all(), "pixels that are not finite were accepted"


def _golden(folder: Path) -> None:
    from lora_edge.parity.record.golden import load_golden

    golden = load_golden(folder / "golden.npz")
    _ = golden.prompts, golden.stem, golden.probe.adapters


def _journal(folder: Path) -> None:
    from lora_edge.parity.record.journal import Journal

    journal = Journal(folder / "journal", seeds.KEY)
    for probe in ("base", "adapter a"):
        for case in journal.finished("cpu, all", probe) or ():
            assert case.status in ("passed", "failed", "unproved"), f"status {case.status!r}"


def _report(folder: Path) -> None:
    from lora_edge.reports import compare, html, junit, load_report, markdown

    data = load_report(folder / "report.json")
    whole = load_report(folder.parent.parent / "seeds" / "record" / "report.json")
    for worse in (compare(data, whole), compare(whole, data)):
        for page in (html, junit, markdown):
            page(data, worse)


def _lines(folder: Path) -> None:
    from lora_edge.cli.run import _read
    from lora_edge.errors import LoraEdgeError
    from lora_edge.parity.plan.examples import read_examples, read_prompts
    from lora_edge.training.data import read_data

    fault: LoraEdgeError | None = None
    for file in sorted(folder.iterdir()):
        for read in (
            lambda file: _read(file, "prompt", None),
            lambda file: _read(file, "text", None),
            read_prompts,
            read_examples,
            read_data,
        ):
            try:
                read(file)
            except LoraEdgeError as error:
                fault = error
    if fault is not None:
        raise fault


def of_npz(random: Random, content: bytes) -> bytes:
    """An .npz file: its bytes, or one of its members."""
    if random.random() < 0.4:
        return mutate.of_bytes(random, content)
    members = {}
    with ZipFile(io.BytesIO(content)) as packed:
        for name in packed.namelist():
            members[name] = packed.read(name)
    name = random.choice([*members, "facts.npy", "facts.npy"])
    if name == "facts.npy":
        import numpy as np

        text = str(np.load(io.BytesIO(members[name])))
        changed = mutate.of_json(random, text.encode()).decode("utf-8", "replace")
        buffer = io.BytesIO()
        np.save(buffer, np.array(changed.replace("\0", "")))
        members[name] = buffer.getvalue()
    elif random.random() < 0.2:
        del members[name]
    else:
        members[name] = mutate.of_bytes(random, members[name])
    buffer = io.BytesIO()
    with ZipFile(buffer, "w", ZIP_DEFLATED) as packed:
        for key, value in members.items():
            packed.writestr(key, value)
    return buffer.getvalue()


def of_safetensors(random: Random, content: bytes) -> bytes:
    """A safetensors file: its bytes, or its header."""
    if random.random() < 0.4:
        return mutate.of_bytes(random, content)
    length = int.from_bytes(content[:8], "little")
    header = mutate.of_json(random, content[8 : 8 + length])
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def _json(family: str, file: str, read: Read, schema: oracles.Schema, *, weight: int = 2) -> Kind:
    """A JSON file with a schema of what may be accepted."""
    oracle = oracles.fits(file, schema)
    return Kind(family, (file,), mutate.of_json, read, weight=weight, oracle=oracle)


def _safetensors(family: str, file: str, read: Read) -> Kind:
    return Kind(family, (file,), of_safetensors, read, oracle=oracles.is_safetensors(file))


_TEXT_FILES = ("tokenizer_config.json", "special_tokens_map.json", "config.json")
_IMAGES = ("png", "jpeg", "bmp", "gif", "webp", "tiff", "ppm", "ico", "tga", "pcx", "dds")

KINDS: dict[str, Kind] = {
    "manifest": _json("bundle", "lora_edge.json", _manifest, oracles.MANIFEST, weight=4),
    "adapter-file": Kind(
        "bundle",
        ("adapters/alpha/adapter.onnx_adapter",),
        mutate.of_bytes,
        _adapter_file,
        signed=True,
    ),
    "graph": Kind("bundle", ("onnx/model.onnx",), mutate.of_bytes, _run, signed=True),
    "package": Kind("package", ("manifest.json", "cpu/lora_edge.json"), mutate.of_json, _package),
    "bundle-text": Kind(
        "bundle",
        ("tokenizer_config.json", "generation_config.json"),
        mutate.of_json,
        _run,
        signed=True,
        weight=1,
    ),
    "adapter-config": _json(
        "adapter", "adapter_config.json", _adapter, oracles.ADAPTER_CONFIG, weight=4
    ),
    "adapter-added": _json(
        "adapter", "adapter_config.json", _added, oracles.ADAPTER_CONFIG, weight=1
    ),
    "safetensors": _safetensors("adapter", "adapter_model.safetensors", _adapter),
    "training-record": _json("adapter", "training.json", _training, oracles.TRAINING),
    "base-config": _json("base", "config.json", _base, oracles.BASE_CONFIG, weight=1),
    "base-model": Kind("model", ("config.json",), mutate.of_json, _model, weight=1),
    "base-index": Kind("base", ("model.safetensors.index.json",), mutate.of_json, _base),
    "base-weights": _safetensors("base", "model-00001-of-00002.safetensors", _base),
    "tokenizer": Kind("text", ("tokenizer.json",), mutate.of_json, _text),
    "tokenizer-config": Kind("text", _TEXT_FILES, mutate.of_json, _text),
    "generation-config": Kind("text", ("generation_config.json",), mutate.of_json, _text),
    "chat-template": Kind("text", ("chat_template.jinja",), mutate.of_template, _text),
    "pooling": Kind(
        "pooling",
        (
            "modules.json",
            "1_Pooling/config.json",
            "sentence_bert_config.json",
            "config_sentence_transformers.json",
        ),
        mutate.of_json,
        _pooling,
    ),
    "image-config": Kind("images", ("preprocessor_config.json",), mutate.of_json, _image),
    "image": Kind("images", tuple(f"image.{x}" for x in _IMAGES), mutate.of_bytes, _image),
    "golden": Kind("record", ("golden.npz",), of_npz, _golden),
    "journal": Kind(
        "record",
        ("journal/finished.jsonl", "journal/lora-edge-validation.json"),
        mutate.of_lines,
        _journal,
        oracle=oracles.is_journal,
    ),
    "report": Kind("record", ("report.json",), mutate.of_json, _report, oracle=oracles.is_report),
    "jsonl": Kind("data", ("pairs.jsonl", "chats.jsonl", "labels.jsonl"), mutate.of_lines, _lines),
    "csv": Kind("data", ("pairs.csv", "labels.csv"), mutate.of_csv, _lines, weight=1),
    "prompts": Kind("data", ("prompts.txt",), mutate.of_csv, _lines, weight=1),
}
KINDS |= {
    name: Kind(
        "data",
        ("prompts.txt",),
        mutate.of_bytes,
        harms.of_mutants(harm),
        weight=0,
        oracle=lambda _: "accepted though it is wrong",
    )
    for name, (harm, _) in harms.HARMS.items()
}


def damage(kind: Kind, random: Random, folder: Path) -> str:
    """Put a mutant of one of the kind's files into a copy of its family; the file's name."""
    files = [name for name in kind.files if (folder / name).is_file()]
    name = random.choice(files)
    file = folder / name
    content = kind.mutate(random, file.read_bytes())
    if kind.family == "data":  # every reader reads every file
        for other in folder.iterdir():
            other.unlink()
    elif kind.family == "images" and name.startswith("image."):
        file = folder / f"mutant{file.suffix}"
        if random.random() < 0.02:
            content = (folder / "bomb.png").read_bytes()
    file.unlink(missing_ok=True)  # it is a link to the seed
    file.write_bytes(content)
    if kind.signed:
        bundle = load_bundle(folder)
        files_now = {**bundle.manifest.files, name: file_entry(file)}
        bundle.write_manifest(dataclasses.replace(bundle.manifest, files=files_now))
    return name


def names(count: int) -> list[str]:
    """``KIND:NUMBER`` of so many cases, the kinds by their weight."""
    whole = sum(kind.weight for kind in KINDS.values())
    found = [
        f"{name}:{number}"
        for name, kind in KINDS.items()
        for number in range(-(-count * kind.weight // whole))
    ]
    # All kinds from the beginning, so that a short run sees each.
    return sorted(found, key=lambda case: int(case.partition(":")[2]))[:count]
