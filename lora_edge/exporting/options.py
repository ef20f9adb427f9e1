"""How a bundle is to be built: what was asked for, and which of it goes together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from lora_edge import types as opt
from lora_edge.bundle.manifest import Mode
from lora_edge.errors import UnsupportedModelError
from lora_edge.maths.half import HALF_BITS
from lora_edge.maths.quantization import BITS, Activations, Precision, Rounding
from lora_edge.maths.survival import MIN_EFFECT, KeepHigh
from lora_edge.tasks.task import Task

Form = Literal["fused", "portable"]
Backend = Literal["trace", "optimum"]

_PRECISION: Mapping[int, Any] = {bits: name for name, bits in BITS.items()}


class Shapes(NamedTuple):
    """What is asked of a graph with fixed shapes; None: what :mod:`~lora_edge.exporting.static`
    chooses.

    Attributes:
        seq: tokens of one run.
        past: positions of its cache.
        rank: of A and B.
    """

    seq: int | None = None
    past: int | None = None
    rank: int | None = None


@dataclass(frozen=True)
class Options:
    """How a bundle is built; see :func:`lora_edge.exporting.export.export` for what each means.

    Attributes:
        task: what the base is to do.
        keep_high: of a merged bundle of few bits; ``touched`` of any other.
        min_effect: least share of the adapter's effect, where its layers are rounded.
        shapes: of a graph with fixed shapes; None: none is written.
    """

    mode: Mode
    form: Form
    backend: Backend
    sites: Literal["all", "adapters"]
    kinds: tuple[str, ...]
    task: Task
    rounding: Rounding | None = None
    activations: Activations = "int8"
    keep_high: KeepHigh = "touched"
    min_effect: float = MIN_EFFECT
    shapes: Shapes | None = None

    @property
    def half(self) -> bool:
        """Weights are float16, and computed in."""
        return self.rounding is not None and self.rounding.bits == HALF_BITS

    @property
    def precision(self) -> Precision:
        """Of the linear layers."""
        return "fp32" if self.rounding is None else _PRECISION[self.rounding.bits]


def check_precision(options: Options) -> None:
    """Check that there are quantized graphs of the kind that is asked for.

    Raises:
        UnsupportedModelError: there are none.
    """
    if options.rounding is None:
        return
    # By which backend a task has graphs that are rounded.
    backend = "trace" if len(options.task.parts) == 1 else "optimum"
    if options.half:
        if len(options.task.parts) > 1 or options.backend != backend:
            raise UnsupportedModelError(
                f"--precision fp16 is for models of one graph, by the trace backend, got "
                f"{options.task.name}, {options.backend}: a weight is found by the name that the "
                "trace gives it",
                "Use --precision int8, int4 or fp32."
                if options.backend == backend
                else "Use --precision fp32.",
            )
        return
    if options.backend != backend or options.form != "fused":
        ways = ["--precision fp32"]
        ways += [f"--backend {backend}"] if options.backend != backend else []
        ways += ["--form fused"] if options.form != "fused" else []
        raise UnsupportedModelError(
            f"--precision {options.precision} is for models of one graph by the trace backend and "
            "for encoder-decoders by the optimum backend, not in the portable form, got "
            f"{options.task.name}, {options.backend}, {options.form}: MatMulNBits is ONNX "
            "Runtime's own operator",
            f"Use {', or '.join(ways)}.",
        )
    if options.rounding.per_channel and "decoder" in options.task.parts:
        raise UnsupportedModelError(
            f"--per-channel is for encoders, got {options.task.name}: a decoder reads its weights "
            "once for each token, and they are no smaller by it",
            "Leave --per-channel out.",
        )
    if options.keep_high != "touched" and "decoder" not in options.task.parts:
        raise UnsupportedModelError(
            f"--keep-high {options.keep_high} measures an adapter's effect on what a model "
            f"generates, got {options.task.name}",
            "Use --keep-high touched, or --mode switchable.",
        )


def kept_high(
    keep_high: KeepHigh | None, min_effect: float | None, *, rounded: bool, mode: Mode
) -> tuple[KeepHigh, float]:
    """What becomes of the layers that a merged adapter changes, and the floor.

    Raises:
        OptionError: one of them is given and has no meaning.
    """
    if keep_high is not None:
        opt.one_of("keep_high", keep_high, get_args(KeepHigh))
        if mode != "merged" or not rounded:
            raise opt.refused(
                "keep_high",
                keep_high,
                "none but for a merged bundle of few bits",
                "Give --mode merged and --precision int8 or int4 too, or leave --keep-high out.",
            )
    if min_effect is None:
        return keep_high or "touched", MIN_EFFECT
    if opt.number("min_effect", min_effect, 0) > 1:
        raise opt.refused("min_effect", min_effect, "0 to 1")
    if keep_high not in ("none", "auto"):
        raise opt.refused(
            "min_effect",
            min_effect,
            "none but where a merged adapter is rounded",
            "Give --keep-high auto or none too, or leave --min-effect out.",
        )
    return keep_high, float(min_effect)
