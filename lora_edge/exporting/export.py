"""The export: capture -> passes -> bundle -> self-check -> publish.

Nothing is published before the staged bundle has passed the same check that ``validate`` makes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from lora_edge import types as opt
from lora_edge.adapter.load import load_adapter
from lora_edge.adapter.source import peft_directories
from lora_edge.base.checkpoint import resolve_base
from lora_edge.bundle.bundle import Bundle, file_entries, file_entry, load_bundle
from lora_edge.bundle.card import bundle_card
from lora_edge.bundle.manifest import MANIFEST_NAME, ConversionEntry, Manifest, Mode
from lora_edge.bundle.sentence import write_sentence_modules
from lora_edge.errors import AdapterError, BaseModelError, ParityError
from lora_edge.exporting.aim import advice, aimed_at, check_task, form_for, shapes_for
from lora_edge.exporting.build import build
from lora_edge.exporting.clients import write_client_files
from lora_edge.exporting.graphs import Progress
from lora_edge.exporting.mobile import check_size, is_mobile, phones, write_mobile
from lora_edge.exporting.options import Options, check_precision, kept_high
from lora_edge.exporting.static import check_static
from lora_edge.exporting.texts import own_folders, write_adapter_texts, write_base_text
from lora_edge.files.portable import check_apart
from lora_edge.files.transaction import staging
from lora_edge.fit.check import check_base_of, other_base
from lora_edge.fit.convert import Conversion, converting
from lora_edge.fit.kinds import KINDS
from lora_edge.fit.rename import fitted
from lora_edge.fit.task import chosen_task
from lora_edge.maths.half import HALF_BITS
from lora_edge.maths.quantization import (
    BITS,
    BLOCK_SIZE,
    BLOCK_SIZES,
    Activations,
    Algorithm,
    Precision,
    Rounding,
)
from lora_edge.maths.survival import KeepHigh

if TYPE_CHECKING:
    from lora_edge.parity.reference import Reference
    from lora_edge.parity.report import Report


def export(
    base: str | os.PathLike[str],
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    mode: Mode = "switchable",
    output: str | os.PathLike[str] = "bundle",
    *,
    task: str | None = None,
    form: Literal["fused", "portable"] | None = None,
    targets: Sequence[str] = (),
    static: bool = False,
    seq: int | None = None,
    past: int | None = None,
    rank: int | None = None,
    backend: Literal["trace", "optimum"] = "trace",
    sites: Literal["all", "adapters"] = "all",
    kinds: Sequence[str] = ("lora",),
    convert: int | float | None = None,
    precision: Precision = "fp32",
    activations: Activations = "int8",
    head_precision: Precision = "int8",
    block_size: int = BLOCK_SIZE,
    symmetric: bool = False,
    algorithm: Algorithm = "rtn",
    per_channel: bool = False,
    keep_high: KeepHigh | None = None,
    min_effect: float | None = None,
    low_memory: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Export a base model and adapters to a bundle, and publish it only if it passes its check.

    Args:
        base: folder of a Hugging Face model, or a hub id.
        adapters: name -> PEFT directory, hub id, or folder of MLX-LM. Merged bundles take exactly
            one.
        mode: ``switchable`` (adapters are inputs of one graph) or ``merged`` (into the weights).
        output: the folder to make.
        task: ``text-generation``, ``text-classification``, ``token-classification``,
            ``feature-extraction``, ``image-classification``, ``text2text-generation`` or
            ``automatic-speech-recognition`` (these two with the optimum backend only); ``None``:
            what the adapters were trained for, else what the base is.
        form: of a text generator: ``fused`` (``com.microsoft`` operators) or ``portable``
            (standard operators only); ``None``: what the ``targets`` take, ``fused`` without any.
        targets: where the bundle is to run, as ``lora-edge targets`` names the places. They choose
            the ``form``, and ``static`` where one takes fixed shapes only; what one is known not to
            take is refused. ``mobile`` also writes the graphs in ONNX Runtime's format, ``.ort``,
            and replays a golden case on each; ``mobile``, ``nnapi`` and ``coreml`` are told how
            many nodes these providers may take.
        static: write a graph with fixed shapes too, of a text generator in the portable form and
            fp32, on the same weights and adapter files: one row, ``seq`` new tokens behind ``past``
            positions, A and B of ``rank``. It is proved like the other.
        seq: tokens of one run; 16 when omitted, or what the model's positions allow.
        past: positions of its cache; when omitted 496, or what the model's positions leave.
        rank: when omitted the largest of the adapters, 16 without any.
        backend: ``trace``, or ``optimum`` (needs ``lora-edge[optimum]``; has a form of its own).
        sites: put branches on ``all`` linear layers of the decoder (the head only if an adapter
            needs it), or only on those that the ``adapters`` change.
        kinds: kinds of adapters, of ``lora``, ``dora``, ``bias``, ``norm``, ``embedding`` and
            ``conv``, for which a switchable graph gets inputs wherever they are possible, for
            adapters to come. What the given adapters need they get in any case.
        convert: approximate adapters of other types than LoRA by LoRAs of this rank, or, between 0
            and 1, of the ranks that keep this share of each delta's energy; ``None`` refuses them.
            The bundle is proved against the converted adapters; the error of the conversion itself
            goes to ``progress`` and into the manifest.
        precision: ``fp32``; ``fp16``, weights, activations and cache, for providers that compute in
            it (a graph in float32 is written beside, on the same data, and is what is proved; what
            float16 adds is measured, and refused beyond a limit); or, of the linear layers' weights
            but for experts and their routers, ``int8`` or ``int4``, codes for blocks of inputs (by
            the trace backend, of encoder-decoders by the optimum backend, not in the portable form;
            heads of labels and convolutions stay in fp32). The bundle is proved against PyTorch
            with the same rounded weights, which are also what DoRA's norms are of; of layers that a
            merged adapter changes, see ``keep_high``.
        activations: what the layers of ``int8`` and ``int4`` multiply their codes with: ``int8``
            (faster: each block of activations is rounded to 8 bits; a graph in floats is written
            beside it, on the same data, and is what is proved) or ``fp32``. What int8 activations
            add is measured, and refused beyond a limit.
        head_precision: of a text generator's output layer and of the token embedding, where
            ``precision`` is not ``fp32``. The codes of a tied embedding are the output layer's.
        block_size: inputs that share a scale and a zero point: 16, 32, 64 or 128.
        symmetric: the zero point is the middle code, so that none is stored; ``rtn`` only.
        algorithm: ``rtn``: each block's range is spread evenly over its codes; ``k-quant``: scale
            and zero point are searched for the least error (llama.cpp's, as ONNX Runtime has it).
        per_channel: of an encoder in int8: one scale for each output and one for each tensor of
            activations, the common *dynamic quantization*: faster and less exact. Codes have 7
            bits, with which every processor computes the same. ``block_size``, ``symmetric`` and
            ``algorithm`` are of the token embedding alone.
        keep_high: of a merged bundle of few bits, the layers that the adapter changes: ``touched``
            (the default): all of them stay in fp32, the change exact over the rounded base;
            ``none``: W + ΔW is rounded as all else; ``auto``: it is rounded, and as few layers as
            need be stay at 8 bits or in fp32 for ``min_effect`` to be reached.
        min_effect: with ``none`` and ``auto``: the least share of the adapter's effect on logits
            that is published; 0.9 when omitted.
        low_memory: prove a bundle in float32 of a base of more than 50 million numbers in parts,
            which takes longer; and one of few bits of more than 5 billion on fewer prompts, as
            :func:`~lora_edge.parity.validate` says.
        force: replace an existing bundle.
        progress: called with one line for each stage.

    Returns:
        The published bundle.

    Raises:
        BaseModelError, AdapterError: an input is refused.
        CaptureError: the base graph differs from PyTorch.
        ParityError: an adapter does not do in the bundle what it does in PyTorch, int8 activations
            add more than they may, or rounding leaves less of an adapter than ``min_effect``.
        BundleError: ``output`` is in the way.
    """
    opt.called("progress", progress)
    given = opt.paths("adapters", adapters or {})
    opt.path("output", output)
    for name, value, known in (
        ("mode", mode, get_args(Mode)),
        ("backend", backend, ("trace", "optimum")),
        ("sites", sites, ("all", "adapters")),
        ("activations", activations, get_args(Activations)),
        ("head_precision", head_precision, get_args(Precision)),
        ("algorithm", algorithm, get_args(Algorithm)),
    ):
        opt.one_of(name, value, known)
    if form is not None:
        opt.one_of("form", form, ("fused", "portable"))
    aims = aimed_at(opt.words("targets", targets))
    opt.flag("static", static)
    shapes = shapes_for(aims, static, seq, past, rank)
    opt.flag("force", force)
    opt.flag("low_memory", low_memory)
    opt.flag("symmetric", symmetric)
    opt.flag("per_channel", per_channel)
    if opt.whole("block_size", block_size, 1) not in BLOCK_SIZES:
        raise opt.refused("block_size", block_size, f"one of {BLOCK_SIZES}")
    if symmetric and algorithm != "rtn":
        raise opt.refused(
            "symmetric", symmetric, f"False with {algorithm}, which finds zero points"
        )
    if task is not None and not opt.text("task", task):
        raise opt.refused("task", task, "the name of a task")
    if convert is not None and opt.number("convert", convert, 0) >= 1:
        opt.whole("convert", convert, 1)
    say = progress or opt.silent
    model = resolve_base(base)
    unknown = sorted(set(opt.words("kinds", kinds)) - set(KINDS))
    if unknown:
        raise AdapterError(
            f"{unknown[0]!r} is no kind of adapter", f"Kinds are {', '.join(KINDS)}."
        )
    if precision not in get_args(Precision):
        raise BaseModelError(
            f"{precision!r} is no precision", f"Precisions are {', '.join(get_args(Precision))}."
        )
    rounding = None
    if precision != "fp32":
        rounding = Rounding(
            BITS[precision],
            BITS.get(head_precision),
            block_size,
            symmetric,
            algorithm,
            per_channel,
        )
    if per_channel and (precision != "int8" or activations != "int8"):
        raise opt.refused(
            "per_channel",
            per_channel,
            "False but with precision int8 and activations int8",
            "Give --precision int8 too, or leave --per-channel out.",
        )
    form = form_for(aims, form, backend, precision, fixed=shapes is not None)
    for line in advice(aims, mode):
        say(line)
    few = rounding is not None and rounding.bits != HALF_BITS
    kept = kept_high(keep_high, min_effect, rounded=few, mode=mode)
    with (
        peft_directories(given) as local,
        converting(local, model, convert, say) as (paths, conversions),
    ):
        loaded = [load_adapter(path, name) for name, path in paths.items()]
        if mode == "merged" and len(loaded) != 1:
            raise AdapterError(
                f"a merged bundle holds exactly one adapter, got {len(loaded)}",
                "Use --mode switchable for any number of adapters.",
            )
        fingerprint = model.fingerprint()  # reads every weight: one that is cut off is named here
        for adapter in loaded:
            check_apart(adapter.name, paths, AdapterError)
            adapter.check_mode(mode)
            adapter.check_effect()
            check_base_of(adapter, fingerprint, model.name_or_path)
            if notice := other_base(adapter, model):
                say(f"{adapter.name}: {notice}")
        where = Path(output)
        with staging(where, marker=MANIFEST_NAME, force=force) as stage, ExitStack() as stack:
            wanted = chosen_task(model, loaded, task, mode, say)
            check_task(aims, wanted.name)
            loaded = stack.enter_context(fitted(loaded, model, wanted, say))
            options = Options(
                mode,
                form,
                backend,
                sites,
                tuple(kinds),
                wanted,
                rounding,
                activations,
                *kept,
                shapes=shapes,
            )
            check_precision(options)
            check_static(options)
            manifest, reference = build(model, loaded, stage, options, say)
            if is_mobile(aims):
                check_size(stage, tuple(manifest.parts.values()))
            write_client_files(model, stage, manifest, reference.architecture)
            write_base_text(model, stage, manifest, say)
            folders = own_folders(adapters or {}, local)
            write_sentence_modules(stage, manifest.task, folders, merged=mode == "merged")
            manifest = write_adapter_texts(stage, manifest, folders, say)
            staged = Bundle(stage, _signed(stage, manifest, conversions))
            report = _prove(staged, reference, say, low_memory=low_memory)
            staged = load_bundle(stage)
            if is_mobile(aims):
                staged = write_mobile(staged, say)
            lines = phones(staged, aims)
            for line in lines:
                say(line)
            _finish(staged, report, lines)
    return load_bundle(output)


def _signed(stage: Path, manifest: Manifest, conversions: Mapping[str, Conversion]) -> Manifest:
    """The manifest with the conversions and the hashes of all files of ``stage``, written there."""
    entries = dict(manifest.adapters)
    for name, conversion in conversions.items():
        entries[name] = dataclasses.replace(
            entries[name], conversion=ConversionEntry(**conversion.facts())
        )
    signed = dataclasses.replace(manifest, adapters=entries, files=file_entries(stage))
    Bundle(stage, manifest).write_manifest(signed)
    return signed


def _prove(staged: Bundle, reference: Reference, say: Progress, *, low_memory: bool) -> Report:
    from lora_edge.parity import validate

    say("validating every adapter against PyTorch")
    report = validate(staged, reference, low_memory=low_memory)
    if report.reach is not None and report.reach.fewer:
        say(report.reach.fewer)
    if report.exact and not report.passed:
        made = staged.manifest.quantization
        half = made is not None and made.half
        raise ParityError(
            "every adapter does what it does in PyTorch, and "
            f"{'float16' if half else 'int8 activations'} change{'s' if half else ''} too much: "
            f"{report.failures[0].reason}",
            "Nothing was published. "
            + (
                "Export with --precision fp32."
                if half
                else "Export with --activations fp32, which is slower and exact."
            ),
        )
    if not report.passed:
        first = report.failures[0].reason if report.failures else "nothing was compared"
        raise ParityError(
            f"the export is not proved to do what PyTorch does: {first}",
            "Nothing was published. An adapter without effect cannot be proved: is it trained?",
        )
    return report


def _finish(staged: Bundle, report: Report, on_phones: Sequence[str]) -> None:
    card = bundle_card(staged.manifest, report.to_data()["cases"], on_phones)
    readme = staged.directory / "README.md"
    readme.write_text(card, encoding="utf-8")
    # What was there before has its hash.
    files = {**staged.manifest.files, "README.md": file_entry(readme)}
    staged.write_manifest(dataclasses.replace(staged.manifest, files=files))
