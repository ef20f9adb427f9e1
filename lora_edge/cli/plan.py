"""What a training run would do, in lines for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_edge.training.trainer import Plan


def plan_lines(made: Plan) -> list[str]:
    """Parameters, steps and memory; what the adapter's exports would say; the adapted modules."""
    memory = made.memory
    share = made.trainable / made.parameters
    lines = [
        f"trainable   {made.trainable:,} parameters, {share:.2%} of the base's {made.parameters:,}",
        f"steps       {made.steps}",
        f"memory      about {_size(memory.total)}: base {_size(memory.base)}, adapter with "
        f"gradients and optimizer {_size(memory.trained)}, activations {_size(memory.activations)}"
        + (f", gaps between them up to {_size(memory.gaps)}" if memory.gaps else "")
        + (
            f", libraries and data {_size(memory.process)}"
            if memory.process
            else "; libraries and device context come on top"
        ),
    ]
    for mode, refusals in made.modes.items():
        lines += [f"{mode:<11} {'yes' if not refusals else f'no: {refusals[0].message}'}"]
        lines += [f"{'':<11} → {refusal.hint}" for refusal in refusals[:1]]
    if made.base is not None:
        lines += [f"base        no: {made.base.message}", f"{'':<11} → {made.base.hint}"]
    lines += [f"modules     {len(made.modules)}"]
    lines += [f"  {path}" for path in made.modules]
    return lines


def _size(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / (1 << 10):.0f} KiB"
