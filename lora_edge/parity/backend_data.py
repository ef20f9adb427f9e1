"""Golden cases as whole tensors, in the layout of ONNX's backend tests, for other tools to replay.

One prompt for the base and for each adapter; all that the graph is fed, adapters included, and all
that PyTorch gives for it, the cache too. Knows the reference and runtimes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from lora_edge.base.checkpoint import Base, resolve_base
from lora_edge.bundle.bundle import Bundle, load_bundle
from lora_edge.errors import DataError, MissingDependencyError
from lora_edge.files.transaction import check_free, staging
from lora_edge.names import NUM_LOGITS_TO_KEEP, past_name, present_name
from lora_edge.parity.ask import open_reference
from lora_edge.parity.explain.rerun import rerun
from lora_edge.parity.plan.states import Probe
from lora_edge.parity.question import sources_of
from lora_edge.parity.record.golden import recorded
from lora_edge.parity.reference import Reference
from lora_edge.parity.subjects import subject_of
from lora_edge.runtime import Runner

_PARTS: tuple[Literal["key", "value"], ...] = ("key", "value")
_MARKER = "model.onnx"
_TOKENS = 32  # of a prompt, at most


def write_onnx_test_data(
    bundle: str | os.PathLike[str] | Bundle,
    output: str | os.PathLike[str],
    reference: str | os.PathLike[str] | Base | None = None,
    *,
    text: str | None = None,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[str]:
    """Write the graph with a data set for the base and one for each adapter.

    Args:
        bundle: of a text generator.
        output: the folder to make; it must not exist, or be empty.
        reference: the base model; ``None``: the one that the bundle names.
        text: the prompt; ``None``: of each golden case its own, the first 32 tokens.
        adapters: PEFT directories of adapters whose files the bundle does not hold.
        progress: called with a line for each set.

    Returns:
        What each data set is of, in their order.

    Raises:
        DataError: the bundle has another task, or an adapter without golden cases.
        BundleError: the reference is another base, or the folder is in the way.
        MissingDependencyError: ``lora-edge[export]`` is not installed.
    """
    try:
        from lora_edge.graph.backend_data import DataSet, write_test_data
    except ImportError as error:
        raise MissingDependencyError.of_export(error) from error
    check_free(Path(output), marker=_MARKER)
    target = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    if target.manifest.driver != "decoder":
        raise DataError(
            f"the bundle's task is {target.manifest.task}: test data are of text generators only",
            "Use its golden cases: lora-edge validate BUNDLE",
        )
    named = target.manifest.base["name_or_path"] if reference is None else reference
    base = named if isinstance(named, Base) else resolve_base(named)
    runner = Runner(target, exact=True)
    sources = sources_of(target, base, runner.adapters, adapters or {})
    model = open_reference(target, base, sources)
    plain = [golden for golden in recorded(target) if not golden.probe.part]
    goldens = [golden for golden in plain if golden.probe.kind in {"base", "adapter"}]
    covered = {name for golden in goldens for name in golden.probe.adapters}
    missing = sorted(set(runner.adapters) - covered)
    if missing:
        raise DataError(
            f"{', '.join(missing)} was never compared with PyTorch, and has no prompts of its own",
            "Run lora-edge validate with --reference first.",
        )
    sets: list[DataSet] = []
    names: list[str] = []
    for golden in goldens:
        if golden.probe.given:
            continue
        # The last row holds what an adapter needs to be reached (an invocation, trained tokens).
        row = (
            golden.probe.rows[-1][:_TOKENS]
            if text is None
            else subject_of(target.manifest).tokens_of(runner, text)
        )
        state = golden.probe.states[0]
        probe = Probe(golden.probe.name, golden.probe.kind, (row,), (state,), 0)
        if progress is not None:
            progress(f"data set {len(sets)}: {probe.name}, {len(row)} tokens")
        sets.append(DataSet(*_tensors(runner, model, probe)))
        names.append(probe.name)
    with staging(Path(output), marker=_MARKER) as stage:
        write_test_data(stage, target.directory / runner.graph_file, sets)
    return names


def _tensors(
    runner: Runner, model: Reference, probe: Probe
) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """What the graph is fed, and what PyTorch gives."""
    fed: dict[str, NDArray[Any]] = {}

    def listen(run: int, values: Mapping[str, Any]) -> None:
        if run == 0:
            fed.update({name: value.numpy().copy() for name, value in values.items()})

    rerun(runner, probe, [()], listen)
    layers = runner.decoder.kept.layers
    logits, cache = model.prefill(probe.rows[0], probe.states[0])
    outputs: dict[str, NDArray[Any]] = {"logits": logits[None]}
    if NUM_LOGITS_TO_KEEP in fed:
        kept = int(fed[NUM_LOGITS_TO_KEEP])
        outputs["logits"] = logits[-kept:][None]  # 0 is all of them
    for layer, pair in enumerate(_kept(cache, layers)):
        for part, array in zip(_PARTS, pair, strict=True):
            # Nothing is past, and what is present is as long as the prompt.
            past = fed[past_name(layer, part)]
            fed[past_name(layer, part)] = past[:, :, :0]
            outputs[present_name(layer, part)] = array.astype(past.dtype)
    return fed, outputs


def _kept(cache: Sequence[Any], layers: int) -> Sequence[Any]:
    if len(cache) != layers:
        raise DataError(
            f"PyTorch keeps {len(cache)} layers, the graph {layers}",
            "This is a fault of lora-edge; report it.",
        )
    return cache
