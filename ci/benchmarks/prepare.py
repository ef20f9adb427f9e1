"""What the benchmark runs: a random model, an adapter, and the graphs made of them.

The weights are random: the cost of a step does not depend on their values. Nothing is published,
so the export's self-check is left out; the contestants' logits are compared when they run.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from lora_edge import graph as passes
from lora_edge.adapter.load import load_adapter
from lora_edge.base.checkpoint import resolve_base
from lora_edge.bundle.part import Part, SiteEntry
from lora_edge.capture import capture
from lora_edge.exporting.graphs import with_weights
from lora_edge.fit.changes import parameter_changes

# peft 0.21 asks transformers 5 for a name that is about to go.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)

_TOKENIZER = Path(__file__).parents[2] / "models" / "tiny-llama"


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama; the defaults are those of a model of 135 million parameters."""

    layers: int = 30
    hidden: int = 576
    intermediate: int = 1536
    heads: int = 9
    kv_heads: int = 3
    vocabulary: int = 49152
    positions: int = 2048
    rank: int = 16


TINY = Shape(layers=2, hidden=64, intermediate=96, heads=2, kv_heads=1, vocabulary=320, rank=4)


@dataclass(frozen=True)
class Graphs:
    """What the contestants are made from.

    Attributes:
        base: the model's folder.
        adapter: the PEFT folder.
        merged: our graph with the adapter in its weights.
        switchable: our graph with a branch on every linear layer but the head.
        plain: the same without any branch, what a bundle's ``onnx/base.onnx`` is.
        genai: onnxruntime-genai's graph of the merged weights; None if it is not installed.
        part: facts of our two graphs.
        genai_part: facts of genai's.
        sites: the branches of ``switchable``, with where ``plain`` has their weights.
    """

    base: Path
    adapter: Path
    merged: Path
    switchable: Path
    plain: Path
    genai: Path | None
    part: Part
    genai_part: Part
    sites: dict[str, SiteEntry]


def prepare(folder: Path, shape: Shape) -> Graphs:
    """Make everything in an empty folder; about a minute and 2.5 GB for the default shape."""
    logging.disable_progress_bar()
    base, adapter, merged_model = folder / "base", folder / "adapter", folder / "merged-model"
    make_model(base, shape)
    make_adapter(base, adapter, shape.rank)
    _merge(base, adapter, merged_model)
    genai = _build_genai(merged_model, folder / "genai") if genai_installed() else None
    shutil.rmtree(merged_model)

    merged, switchable = folder / "merged", folder / "switchable"
    for directory in (merged, switchable):
        directory.mkdir()
    captured = capture(resolve_base(base), switchable)
    changes = parameter_changes(load_adapter(adapter, "x"), captured.modules, captured.tied)
    sites = {
        path: SiteEntry.of(layer)
        for path, layer in captured.modules.items()
        if layer.kind == "linear" and path != captured.head
    }
    model = passes.load(captured.path())
    passes.fuse(model)
    passes.merge(model, passes.find_sites(model, sites), changes)
    passes.save_with_data(model, merged / "model.onnx")
    model = passes.load(captured.path())
    passes.fuse(model)
    plain = captured.path().with_name("base.onnx")
    passes.save_graph(model, plain)
    found = passes.find_sites(model, sites)
    sites = with_weights(sites, found)
    passes.branch(model, found)
    passes.save_graph(model, captured.path())
    return Graphs(
        base=base,
        adapter=adapter,
        merged=merged / "model.onnx",
        switchable=captured.path(),
        plain=plain,
        genai=genai,
        part=captured.reads,
        genai_part=replace(captured.reads, form="foreign", backend="genai"),
        sites=sites,
    )


def genai_installed() -> bool:
    """Whether the reference's builder is in this environment."""
    return find_spec("onnxruntime_genai") is not None


def make_model(folder: Path, shape: Shape) -> None:
    """A random Llama of a shape, its head tied."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=shape.positions,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(folder)


def make_adapter(base: Path, folder: Path, rank: int, seed: int = 1) -> None:
    """A random adapter of every linear layer but the head."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules="all-linear",
        init_lora_weights=False,  # B is random too
        task_type="CAUSAL_LM",
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)


def _merge(base: Path, adapter: Path, merged: Path) -> None:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    model.merge_and_unload().save_pretrained(merged)
    copy_tokenizer(merged)  # genai's builder wants one, any one


def copy_tokenizer(folder: Path) -> None:
    """The tokenizer that ships, of bytes."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(_TOKENIZER / name, folder / name)


def _build_genai(model: Path, output: Path) -> Path:
    """The graph that onnxruntime-genai's builder makes, in a process of its own."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model)]
    command += ["-o", str(output), "-p", "fp32", "-e", "cpu", "-c", str(output / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"onnxruntime-genai's builder failed:\n{done.stderr[-2000:]}")
    return output / "model.onnx"
