"""Whole files of every kind, small, made without PyTorch: what the mutants are made from."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np

from lora_edge.bundle.adapter_files import write_none
from lora_edge.bundle.bundle import file_entries
from lora_edge.exporting.package import write_package
from lora_edge.parity.case import Case, Layer, TaskFigures
from lora_edge.parity.compare import Figures, Floor, Limits, expect
from lora_edge.parity.plan.states import Probe
from lora_edge.parity.record.golden import Golden, save_golden
from lora_edge.parity.record.journal import Journal
from lora_edge.parity.report import Report, Session
from tests.support.images import PROCESSOR
from tests.support.modules import load_file
from tests.support.paths import ROOT

KEY = {"bundle": "x", "seed": 0}


def make(folder: Path) -> None:
    """A folder for each family of files."""
    _bundle(folder / "bundle")
    write_package({"cpu": folder / "bundle"}, folder / "package")
    _adapter(folder / "adapter")
    _base(folder / "base")
    (folder / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(ROOT / "models" / "tiny-llama" / name, folder / "model")
    _text(folder / "text")
    _pooling(folder / "pooling")
    _images(folder / "images")
    _record(folder / "record")
    _data(folder / "data")


def _tiny() -> Any:
    """The runtime tests' tiny decoder and its bundles."""
    return load_file("tiny", ROOT / "tests" / "runtime" / "conftest.py")


def _bundle(folder: Path) -> None:
    bundle = _tiny().make_bundle(folder, "fused")
    manifest = bundle.manifest
    none = write_none(folder, manifest.sites, manifest.base["fingerprint"], {})
    bundle.write_manifest(
        dataclasses.replace(
            manifest,
            adapters={**manifest.adapters, none.name: none},
            files=file_entries(folder),
        )
    )


def safetensors(tensors: dict[str, np.ndarray]) -> bytes:
    """A safetensors file of float32."""
    header, end = {}, 0
    for name, value in tensors.items():
        size = value.nbytes
        header[name] = {
            "dtype": "F32",
            "shape": list(value.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header).encode()
    body = b"".join(value.astype("<f4").tobytes() for value in tensors.values())
    return struct.pack("<Q", len(text)) + text + body


def _adapter(folder: Path) -> None:
    """One that fits the bundle."""
    folder.mkdir()
    random = np.random.default_rng(0)
    tensors = {}
    for layer in range(2):
        for name, out in (("q_proj", 32), ("v_proj", 16)):
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{key}.lora_A.weight"] = random.normal(size=(4, 32)).astype(np.float32)
            tensors[f"{key}.lora_B.weight"] = random.normal(size=(out, 4)).astype(np.float32)
    (folder / "adapter_model.safetensors").write_bytes(safetensors(tensors))
    shipped = ROOT / "models" / "adapters" / "echo"
    config = json.loads((shipped / "adapter_config.json").read_text())
    config |= {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 4},
        "alpha_pattern": {"v_proj": 4.0},
        "layers_to_transform": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    record = json.loads((shipped / "training.json").read_text())
    record["base_fingerprint"] = "base-1"
    record["labels"] = ["no", "yes"]
    (folder / "training.json").write_text(json.dumps(record))


def _base(folder: Path) -> None:
    folder.mkdir()
    for name in ("config.json", "generation_config.json"):
        shutil.copy(ROOT / "models" / "tiny-llama" / name, folder)
    random = np.random.default_rng(1)
    weights = {
        "model.embed_tokens.weight": random.normal(size=(8, 4)).astype(np.float32),
        "model.norm.weight": np.ones(4, np.float32),
    }
    files = {}
    for number, (name, value) in enumerate(weights.items(), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        (folder / file).write_bytes(safetensors({name: value}))
        files[name] = file
    index = {"metadata": {"total_size": 144}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _text(folder: Path) -> None:
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(ROOT / "models" / "tiny-llama" / name, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "default", "template": "{{ messages[0].content }}"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>"})
    )
    shutil.copy(ROOT / "models" / "tiny-llama" / "chat_template.jinja", folder)
    (folder / "generation_config.json").write_text(
        json.dumps(
            {
                "eos_token_id": [257, 258],
                "pad_token_id": 0,
                "do_sample": True,
                "temperature": 0.7,
                "top_p": 0.9,
                "top_k": 20,
                "repetition_penalty": 1.1,
            }
        )
    )


def _pooling(folder: Path) -> None:
    (folder / "1_Pooling").mkdir(parents=True)
    places = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(places.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True})
    )
    (folder / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": 32, "do_lower_case": False})
    )
    (folder / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": {"query": "query: "}, "default_prompt_name": None})
    )


def _images(folder: Path) -> None:
    import PIL.Image

    folder.mkdir()
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)
    image = PIL.Image.fromarray(pixels)
    for name in ("png", "jpeg", "bmp", "gif", "webp", "tiff", "ppm", "ico", "tga", "pcx", "dds"):
        buffer = io.BytesIO()
        try:
            image.save(buffer, name)
        except (OSError, KeyError, ValueError):  # not built in
            continue
        (folder / f"image.{name}").write_bytes(buffer.getvalue())
    buffer = io.BytesIO()
    PIL.Image.new("1", (13_300, 13_300)).save(buffer, "png")
    (folder / "bomb.png").write_bytes(buffer.getvalue())


def _record(folder: Path) -> None:
    """A golden case, a journal and a report."""
    folder.mkdir()
    random = np.random.default_rng(0)
    rows = ((1, 2, 3), (4, 5))
    tails: tuple[tuple[int, ...], ...] = ((6, 7), (8, 9))
    state = (("a", 1.0),)
    golden = Golden(
        Probe("adapter a", "adapter", rows, (state, state), 2),
        tails,
        tuple(
            expect(
                random.normal(size=(len(row) + 2, 12)).astype(np.float32),
                random.normal(size=(len(row) + 2, 12)).astype(np.float32),
            )
            for row in rows
        ),
        {"a": Floor(1e-6, 1e-7)},
        {"torch": "2"},
    )
    from lora_edge.parity.record.golden import reduce

    golden = reduce(golden, 4)
    name = save_golden(folder, golden)
    (folder / name).rename(folder / "golden.npz")
    (folder / "parity").rmdir()
    figures = _built(Figures, 0.25)
    case = Case(
        "adapter a",
        ("a",),
        "failed",
        "adapter a: off",
        figures,
        Limits(1e-6, 1e-5, 1e-7, 1e-6),
        {"half": 0.5},
        "adapter",
        "cpu, all",
        (Layer("model.layers.0", 0.5, 1e-7, 1e-6),),
        TaskFigures("accuracy", 10, 0.5, 0.5, 0.1, 1, 1, 1.0),
    )
    good = Case("base", (), "passed", "", figures, Limits(1, 1, 1, 1), session="cpu, all")
    journal = Journal(folder / "journal", KEY)
    journal.finish("cpu, all", "base", [good])
    journal.finish("cpu, all", "adapter a", [case], golden)
    report = Report(
        "b",
        "switchable",
        "goldens",
        ("a",),
        (good, case),
        {"torch": "2"},
        1.5,
        (Session("cpu", "all", "fp32", {"CPUExecutionProvider": {"MatMul": 3}}),),
        {"system": "Linux"},
        {"depth": "quick", "steps": 64, "seed": 0},
        "base",
    )
    (folder / "report.json").write_text(report.to_json())


def _built(kind: Any, value: float) -> Any:
    """A dataclass of numbers, all of them set."""
    whole = {"int", int}
    return kind(
        **{
            field.name: 3 if field.type in whole else value
            for field in dataclasses.fields(kind)
            if field.default is dataclasses.MISSING
        }
    )


def _data(folder: Path) -> None:
    folder.mkdir()
    pairs = [{"prompt": f"p{i}", "completion": f"c{i}", "adapter": "a"} for i in range(3)]
    chats = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    ] * 3
    labels = [{"text": f"t{i}", "label": ["no", "yes"][i % 2]} for i in range(4)]
    for name, rows in (("pairs", pairs), ("chats", chats), ("labels", labels)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    (folder / "pairs.csv").write_text('prompt,completion\na,"b, c"\nd,"e\nf"\n')
    (folder / "labels.csv").write_text("text,label\na,0\nb,1\n")
    (folder / "prompts.txt").write_text("one\ntwo\n")
