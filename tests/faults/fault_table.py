"""Every fault: where it is made, how, whose cases must fail, and what must be said about it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

import lora_edge
from lora_edge.parity.case import Case
from tests.faults import injections as i
from tests.faults.worlds import GRID, Worlds
from tests.support.failing import signed

Source = Literal["reference", "goldens"]
SOURCES: tuple[Source, ...] = ("reference", "goldens")
STEPS = 4
EVERY = ("*",)


@dataclass(frozen=True)
class Fault:
    """One mistake.

    Attributes:
        name: what is wrong, for people.
        how: what is broken: an adapter's file, the graph, the runtime, the weights merged.
        world: the bundle that it is made in.
        blamed: adapters whose own cases fail; :data:`EVERY`: all; none: only ``cases`` fail.
        words: pattern of the explanation, found in the reason of each of ``cases``.
        cases: pattern of the names of the cases that must fail and be explained.
        inject: breaks the bundle's folder, whose hashes are made right again.
        patch: breaks the runtime.
        status: verdict of ``cases``; several, with bars between them.
        spreads: healthy rows that share a batch with a broken one suffer too.
    """

    name: str
    how: Literal[
        "adapter file", "graph", "runtime", "merged", "adapter", "manifest", "around", "weights"
    ]
    world: str
    blamed: tuple[str, ...]
    words: str
    cases: str
    inject: i.Injection | None = None
    patch: i.Patch | None = None
    status: str = "failed"
    spreads: bool = False


@dataclass(frozen=True)
class Outcome:
    """What ``validate`` made of a fault.

    Attributes:
        caught: the report is not a pass and each of the fault's cases has the right verdict.
        explained: the words are in each of their reasons.
        spared: nothing is blamed that is healthy.
        reason: of the first of the cases.
    """

    caught: bool
    explained: bool
    spared: bool
    reason: str

    @property
    def killed(self) -> bool:
        """Caught, with the right explanation, and nothing else blamed."""
        return self.caught and self.explained and self.spared


def _file(
    name: str,
    adapter: str,
    words: str,
    edit: Callable[[i.Arrays], i.Arrays] | None = None,
    *,
    inject: i.Injection | None = None,
    world: str = "portable",
) -> Fault:
    made = i.of_file(adapter, edit) if edit else inject
    cases = rf"^adapter {adapter}$"
    return Fault(
        name, "adapter file", world, (adapter,), words, cases, made, spreads=edit is i.overflowed
    )


def _base(name: str, inject: i.Injection, words: str = "", world: str = "portable") -> Fault:
    said = rf"the base itself is wrong.*{words}"
    return Fault(name, "graph", world, EVERY, said, r"^(base|adapter [^,]*)$", inject)


def _around(name: str, world: str, case: str, words: str, inject: i.Injection) -> Fault:
    return Fault(name, "around", world, EVERY, words, f"^{case}$", inject)


def _weights(name: str, world: str, inject: i.Injection, words: str) -> Fault:
    """PyTorch's weights say where; the goldens only that the file is another one."""
    said = f"{words}|not what was compared with PyTorch"
    cases = "^(weights|graph files)$"
    return Fault(name, "weights", world, EVERY, said, cases, inject, status="failed|unproved")


_Q0 = "model.layers.0.self_attn.q_proj"
_PART = r"part of the effect is missing or wrong|the effect is another one|points the other way"
_REWIRED = "/model/model/layers.1/input_layernorm/Cast"


FAULTS: tuple[Fault, ...] = (
    # The numbers in an adapter's file.
    _file("scaled by 2", "plain", "plain is scaled by 2, the root of its rank 4,.*check alpha",
          i.times(2)),
    _file("scaled by sqrt(r)", "rooted", r"rooted is scaled by 2\.24, the root of its rank 5,",
          i.times(5**0.5)),
    _file("scaled by 3", "plain", r"plain is scaled by 3 ",
          i.times(3)),
    _file("rsLoRA's scaling dropped", "rooted",
          r"rooted is scaled by 0\.447, 1 / the root of its rank 5,.*rsLoRA",
          i.plain_scaling),
    _file("rsLoRA's scaling with unequal ranks", "varied",
          r"scaled by rsLoRA's alpha / sqrt\(r\) where alpha / r is right", i.rooted_scaling),
    _file("A scaled instead of B as well", "varied", r"scaled by 2\.89",
          i.times(1.7, r"\.[AB]$")),
    _file("sign flipped", "rooted", "rooted has its sign reversed",
          i.times(-1)),
    _file("all zero", "varied", "does nothing.*B is zero",
          i.times(0, r"\.[AB]$")),
    _file("nearly dead (effect 1e-6)", "plain", "does nothing",
          i.times(1e-6)),
    _file("A and B swapped (square layers)", "plain", "A and B are swapped",
          i.swapped_factors),
    _file("A not transposed", "rooted", "A was not transposed",
          i.each(i.not_transposed, r"\.A$")),
    _file("B not transposed", "rooted", "B was not transposed",
          i.each(i.not_transposed, r"\.B$")),
    _file("B's ranks in reverse order", "rooted", "ranks of B are in reverse order",
          i.each(lambda b: b[::-1], r"\.B$")),
    _file("B's ranks shifted", "rooted", "ranks of B are shifted",
          i.each(lambda b: np.roll(b, 2, 0), r"\.B$")),
    _file("one site zeroed", "plain", rf"at 1 of 8 places: {_Q0} \(B is zero\)",
          i.times(0, rf"{_Q0}\.B$")),
    _file("layer 0's factors in layer 1 too", "plain",
          r"at 4 of 8 places: model\.layers\.1\.self_attn",
          i.copied(".0.", ".1.")),
    _file("neighbouring layers exchanged", "rooted", "layers 0 and 1 are exchanged",
          i.exchanged(".0.", ".1.")),
    _file("q and k exchanged", "plain", "k_proj and q_proj are exchanged",
          i.exchanged("q_proj", "k_proj")),
    _file("q and o exchanged", "plain", "o_proj and q_proj are exchanged",
          i.exchanged("q_proj", "o_proj")),
    _file("gate and up exchanged", "rooted", "gate_proj and up_proj are exchanged",
          i.exchanged("gate_proj", "up_proj")),
    _file("fp16 overflow", "rooted", "NaN or Inf from position 0.*holds NaN or Inf",
          i.overflowed),
    _file("rounded to half precision", "rooted", "rounding",
          i.half),
    _file("another adapter's file", "varied", "it does what plain does",
          inject=i.other_file("varied", "plain")),
    Fault("two adapters' files exchanged", "adapter file", "portable", ("plain", "rooted"),
          "the bundle's (plain|rooted) does what (plain|rooted) should|it does what",
          r"^adapter (plain|rooted)$", i.other_file("plain", "rooted", back=True)),
    _file("an adapter of another base", "plain", r"at 8 of 8 places",
          inject=i.foreign("plain")),
    _file("DoRA's magnitude dropped", "dora", "its magnitude is dropped",
          i.times(0, r"\.G$"), world="kinds"),
    _file("DoRA's B without g", "dora", r"dora is scaled by 0\.8 ",
          i.times(0.8), world="kinds"),
    _file("lora_bias dropped", "lora-bias", r"bias \(it is dropped\)",
          i.times(0, r"\.bias$"), world="kinds"),
    _file("trained bias dropped", "conv1d-bias-all", r"bias \(it is the base's\)",
          i.times(0, r"\.bias$"), world="gpt2"),
    _file("saved norms dropped", "saved-norms", r"norm\.weight \(it is the base's\)",
          i.times(0, r"\.weight$"), world="kinds"),
    _file("trained token rows dropped", "tokens", "right until a token that it trains appears",
          i.times(0, r"embed_tokens\.B$"), world="kinds"),
    _file("embedding's LoRA dropped", "embedding", r"model\.embed_tokens \(B is zero\)",
          i.times(0, r"embed_tokens\.B$"), world="kinds"),
    _file("task head zeroed", "sorts",
          r"task head or the base is wrong.*classifier\.weight \(it is zero\)",
          i.times(0, r"\.[Wc]$"), world="heads"),
    _file("task head of another adapter", "sorts",
          r"task head or the base is wrong.*classifier\.weight \(it is another one\)",
          inject=i.other_head("sorts", "ranks"), world="heads"),
    _file("low-rank part dropped beside a head", "ranks", "does nothing",
          i.times(0, r"\.B$"), world="heads"),
    # The graph.
    Fault("a branch reads another tensor", "graph", "portable", ("plain", "rooted"),
          rf"({_PART}|effect is there but).*holds what its PEFT files do",
          r"^adapter (plain|rooted)$", i.rewired("model.layers.1.self_attn.q_proj", _REWIRED)),
    Fault("a branch is not added", "graph", "portable", ("plain", "rooted"),
          rf"({_PART}).*holds what its PEFT files do",
          r"^adapter (plain|rooted)$", i.branch_cut("model.layers.0.self_attn.k_proj")),
    Fault("the gates are not read", "graph", "portable", (),
          r"alone, and with its adapter on all rows, the row is right; in the mixed batch",
          r"^mixed row \d:", i.of_graph(i.gates_cut)),
    _base("one base weight perturbed", i.weight(r"layers\.1\.mlp\.up_proj", lambda w: w * 1.001)),
    _base("RMSNorm's epsilon",
          i.constant(r"layernorm/Constant_2$", lambda x: np.full_like(x, 1e-2))),
    _base("rotary's theta", i.constant(r"rotary_emb/Constant_1$", lambda x: x ** 1.2),
          "right at each row's first token and wrong from the second on"),
    _base("key heads in another order", i.weight(r"\.k_proj\.weight", i.heads_rolled(8)),
          "right at each row's first token and wrong from the second on", "fused"),
    _base("value heads in another order", i.weight(r"\.v_proj\.weight", i.heads_rolled(8)),
          "", "fused"),
    _base("base weights on a coarse grid", i.weight(r"_proj\.weight", i.coarse(1 / 32))),
    _base("an expert's weights perturbed",
          i.weight(r"experts.*gate_up|experts.*w1|experts\.0", lambda w: w * 1.01), "", "experts"),
    _base("mask ignored", i.of_graph(i.mask_of_ones), "only rows that are padded are wrong"),
    _base("the head reads the position before", i.of_graph(i.earlier_positions),
          "each position of the prompts has the outputs of the one before it", "fused"),
    # The runtime.
    Fault("gate rows exchanged", "runtime", "portable", (),
          "in the mixed batch it does what .* does, which other rows have", r"^mixed row \d:",
          patch=i.gates_turned),
    Fault("a row leaks into its neighbour", "runtime", "portable", (),
          r"in the mixed batch 0\.2 times .*, of another row, leaks into it", "^mixed row [0-2]:",
          patch=i.gates_leaking),
    Fault("a blend's weights ignored", "runtime", "portable", (), "its weights are ignored",
          "^blend", patch=i.weights_ignored),
    Fault("switch ignored", "runtime", "portable", EVERY, "it does what plain does",
          r"^adapter (rooted|varied)$", patch=i.switch_ignored),
    Fault("stale KV after a switch", "runtime", "fused", ("plain", "rooted", "varied"),
          "the prompt is right and the decode steps are wrong.*the KV cache",
          "^adapter [^,]*$", patch=i.stale_cache),
    Fault("KV of another row", "runtime", "fused", EVERY,
          "the decode steps are wrong.*the KV cache", "^(base|adapter [^,]*)$",
          patch=i.cache_rows_turned),
    Fault("KV of another layer", "runtime", "portable", EVERY,
          "right when all tokens are run at once: the KV cache", "^(base|adapter [^,]*)$",
          patch=i.cache_layers_turned),
    Fault("decode positions shifted by one", "runtime", "fused", EVERY,
          "the decode steps are wrong.*positions of decode steps", "^(base|adapter [^,]*)$",
          patch=i.decode_shifted),
    Fault("positions shifted by one", "runtime", "gpt2", EVERY, "the base itself is wrong",
          "^(base|adapter [^,]*)$", patch=i.positions_shifted),
    Fault("an encoder's mask ignored", "runtime", "heads", EVERY,
          "only rows that are padded are wrong", "^adapter [^,]*$", patch=i.encoder_unmasked),
    Fault("aLoRA active too late", "runtime", "kinds", ("alora",), "active too late",
          "^adapter alora$", patch=i.invoked(1)),
    Fault("aLoRA active too early", "runtime", "kinds", ("alora",),
          r"wrong from 1 token\(s\) before its invocation", "^adapter alora$", patch=i.invoked(-1)),
    Fault("aLoRA active from the start", "runtime", "kinds", ("alora",),
          "also where its invocation is not", "^adapter alora$", patch=i.invoked(None)),
    # Where users are: long prompts, large batches, blends of three, rows that rest.
    Fault("positions from 100 on", "graph", "far", EVERY,
          r"wrong from position 1\d\d[,:].*a table of them", "^(base|adapter .*), long prompt$",
          i.rotary_table_from(100)),
    Fault("a window of 96 that the model lacks", "graph", "far", EVERY,
          r"wrong from position (9[6-9]|1\d\d)[,:].*a window", "^(base|adapter .*), long prompt$",
          i.window_of(96)),
    Fault("prompts cut after 64 tokens", "runtime", "far", EVERY,
          r"wrong from position (6[4-9]|7\d)[,:]", "^(base|adapter .*), long prompt$",
          patch=i.prompts_cut(64)),
    Fault("batches of more than 8 rows", "runtime", "far", (),
          "8 copies of it, but not 9: batches of more than 8 rows, not padding",
          r"^mixed row ([89]|1\d) of 16", patch=i.rows_lost(8)),
    Fault("batches of more than 4 rows", "runtime", "far", (),
          "4 copies of it, but not 5: batches of more than 4 rows, not padding",
          "^mixed row [4-7]:", patch=i.rows_lost(4)),
    Fault("a row that rests loses its cache", "runtime", "far", (),
          "right where no row of the batch rests", r"^mixed row 1?[13579] of 16",
          patch=i.resting_overwritten),
    Fault("the neighbours of a row that rests", "runtime", "far", (),
          "right where no row of the batch rests", r"^mixed row 1?[02468] of 16",
          patch=i.neighbours_of_resting),
    Fault("a blend of three holds two", "runtime", "far", (), "varied is left out", "^blend 0.6",
          patch=i.third_dropped),
    Fault("a negative weight loses its sign", "runtime", "far", (), "signs are ignored",
          "^blend 0.6", patch=i.signs_dropped),
    Fault("a negative weight loses its sign in a mixed batch", "runtime", "far", (),
          "signs are ignored", "^mixed row .* - ", patch=i.signs_of_rows_dropped),
    Fault("stale after a mixed batch", "runtime", "fused", (),
          "what ran before it was still in effect, and plain has no part in it",
          "^base -> plain -> base", patch=i.stale_after_mixed),
    # Merged weights.
    Fault("merged never", "merged", "merged", ("small",), "does nothing", "^adapter small$",
          i.merged(lambda base, change: base + 0 * change)),
    Fault("merged twice", "merged", "merged", ("small",),
          r"the effect is (1\.9|2\.)\d* times.*merged twice", "^adapter small$",
          i.merged(lambda base, change: base + 2 * change)),
    Fault("merged with the wrong sign", "merged", "merged", ("small",), "sign is reversed",
          "^adapter small$", i.merged(lambda base, change: base - change)),
    Fault("requantized away", "merged", "merged", ("small",), "does nothing", "^adapter small$",
          i.merged(lambda base, change: np.round((base + change) / GRID) * GRID)),
    Fault("half of it rounded away", "merged", "merged", ("small",), _PART, "^adapter small$",
          i.merged(lambda base, change: base + np.where(np.abs(change) > GRID / 8, change, 0))),
    # What is proved and what is not.
    Fault("an adapter without effect added", "adapter", "portable", ("dead",),
          "no effect: it changes no logit|was never compared", "^adapter dead$",
          i.dead("rooted", 0.0),
          status="unproved"),
    Fault("an adapter of effect 1e-6 added", "adapter", "portable", ("dead",),
          "the floor is not far below the effect|was never compared",
          "^adapter dead$", i.dead("rooted", 1e-6),
          status="unproved"),
    Fault("the manifest names another adapter's file", "manifest", "portable", ("rooted",),
          "it does what varied does", "^adapter rooted$",
          i.of_manifest(i.file_of("rooted", "varied"))),
    Fault("the manifest has another invocation", "manifest", "kinds", ("alora",),
          "the manifest says that alora is activated by the tokens 1, 2, its PEFT config",
          "^adapter alora(, entry)?$", i.of_manifest(i.entry_of("alora", invocation=[1, 2]))),
    Fault("the manifest lets a DoRA be blended", "manifest", "kinds", ("dora",),
          "the manifest says that dora can be blended, its PEFT files that it cannot: DoRA",
          "^adapter dora, entry$", i.of_manifest(i.entry_of("dora", alone=""))),
    Fault("max_length doubled", "manifest", "portable", EVERY,
          "max_length is 64, expected 32", "^graph's facts$",
          i.of_manifest(i.field_of("parts.decoder.max_length", 64))),
    Fault("label names in another order", "manifest", "heads", EVERY,
          r"label names: manifest: none\[0\] is", "^label names$",
          i.of_manifest(i.labels_reversed("none"))),
    # What lies around the graph.
    _around("two letters exchanged", "texts", "tokenizer", r"tokenizer: texts\[\d+\]: ids\[",
            i.of_json("tokenizer.json", i.letters_exchanged)),
    _around("no special tokens around a text", "texts", "tokenizer", r"ids is .*expected \[",
            i.of_json("tokenizer.json", i.nothing_put_around)),
    _around("another chat template", "texts", "chat template", "text is .*expected ",
            i.of_text("chat_template.jinja", "<|assistant|>", "<|user|>")),
    _around("another end token", "texts", "end tokens", "is 5, expected ",
            i.of_json("generation_config.json", i.field_of("eos_token_id", 5))),
    _around("samples where the base is greedy", "texts", "generation defaults", "min_p has 0.0",
            i.of_json("generation_config.json", lambda x: {**x, "do_sample": True})),
    _around("label names exchanged in config.json", "heads", "label names", r"config\.json\[0\] is",
            i.of_json("config.json", i.config_labels_exchanged)),
    _around("CLS pooling for the mean", "sentences", "embeddings", r"values\[0\] is",
            i.of_json("pooling/config.json", i.field_of("pooling_mode", "cls"))),
    _around("embeddings not normalized", "sentences", "embeddings", r"values\[0\] is",
            i.of_json("modules.json", lambda modules: modules[:2])),
    _around("a prompt left out", "sentences", "embeddings", r"values\[0\] is",
            i.of_json("config_sentence_transformers.json", lambda _: {})),
    _around("pixels by another mean", "pictures", "images", r"values\[0\] is",
            i.of_json("preprocessor_config.json", i.field_of("image_mean", [0.4, 0.5, 0.5]))),
    _around("another filter for the pixels", "pictures", "images", r"values\[\d+\] is",
            i.of_json("preprocessor_config.json", i.field_of("resample", 0))),
    # The weights themselves.
    _weights("an embedding row that no case reads", "portable", i.unread_row,
             r"model\.embed_tokens\.weight differs from the checkpoint's in 1 of 97 rows"),
    _weights("the rotary table from position 1,500 on", "tables",
             i.of_graph(i.tables(i.far_positions(1500), 2048)),
             r"rotary_emb \(cos\), differs .* in 548 of 2048 rows, first in row 1500"),
    _weights("a weight of the graph without branches", "fused",
             i.base_graph(i.one_number(r"layers\.1\.mlp\.up_proj")),
             r"onnx/base\.onnx: model\.layers\.1\.mlp\.up_proj\.weight differs"),
    _weights("rotary's frequencies in the graph without branches", "portable",
             i.base_graph(i.constants(r"rotary_emb/Constant_1$", lambda x: x * 1.0001)),
             r"onnx/base\.onnx: .*rotary_emb\.\w*inv_freq, differs"),
)  # fmt: skip


@dataclass(frozen=True)
class Damage:
    """A fault of integrity: ``validate`` refuses the bundle before any number is computed.

    Attributes:
        name: what is wrong, for people.
        inject: breaks a bundle's folder; nothing is signed again.
        words: pattern of the error.
    """

    name: str
    inject: i.Injection
    words: str


DAMAGES: tuple[Damage, ...] = (
    Damage("weights cut off", i.cut_off("onnx/model.onnx_data"), "model.onnx_data differs"),
    Damage("graph cut off", i.cut_off("onnx/model.onnx"), "model.onnx differs"),
    Damage("adapter file cut off", i.cut_off("adapters/plain/adapter.onnx_adapter"), "differs"),
    Damage("adapter file missing", i.missing("adapters/plain/adapter.onnx_adapter"), "is missing"),
    Damage("adapter changed and not signed", i.of_file("plain", i.times(2)), "differs"),
    Damage("another tokenizer", i.overwritten("tokenizer.json", b"{}"), "tokenizer.json differs"),
    Damage("golden case changed", i.golden_changed, "parity/.* differs"),
    Damage("manifest with another hash", i.of_manifest(i.other_hash), "differs from its hash"),
    Damage("manifest of another format", i.of_manifest(i.other_format), "format_version"),
    Damage("manifest not JSON", i.overwritten("lora_edge.json", b"{"), "is not JSON"),
    Damage("adapter of another base by fingerprint", i.of_manifest(i.other_fingerprint("plain")),
           "was exported for the base"),
)  # fmt: skip


def outcome(fault: Fault, worlds: Worlds, source: Source, folder: Path) -> Outcome:
    """Break a copy of the fault's world below ``folder`` and validate it."""
    base, bundle = worlds.copy(fault.world, folder / "bundle")
    try:
        if fault.inject is not None:
            fault.inject(bundle)
            signed(bundle)
        with fault.patch() if fault.patch else nullcontext():
            live = {"reference": base, "steps": STEPS} if source == "reference" else {}
            report = lora_edge.validate(bundle, **live)  # type: ignore[arg-type]
    finally:
        shutil.rmtree(bundle)
    return _judged(fault, report.passed, report.cases)


def _judged(fault: Fault, passed: bool, cases: Sequence[Case]) -> Outcome:
    mine = [case for case in cases if re.search(fault.cases, case.name) and case.figures]
    mine = mine or [case for case in cases if re.search(fault.cases, case.name)]
    reasons = [case.reason for case in mine]
    caught = (
        not passed and bool(mine) and all(case.status in fault.status.split("|") for case in mine)
    )
    explained = all(re.search(fault.words, reason) for reason in reasons)
    shared = fault.spreads or not fault.blamed
    spared = [
        case
        for case in cases
        if fault.blamed != EVERY
        and not re.search(fault.cases, case.name)
        and not set(case.adapters) & set(fault.blamed)
        and not (case.name.startswith(("mixed", "blend")) and shared)
        # Whatever else is wrong with a graph that was changed, it is not the one that was proved.
        and not (case.name == "graph files" and fault.how in {"graph", "merged", "weights"})
    ]
    healthy = all(case.status == "passed" for case in spared)
    return Outcome(caught, explained, healthy, reasons[0] if reasons else "")
