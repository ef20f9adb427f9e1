"""What an export is for: targets choose the form, or refuse what they do not take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lora_edge import types as opt
from lora_edge.errors import OptionError
from lora_edge.exporting.options import Backend, Form, Shapes
from lora_edge.maths.quantization import Precision
from lora_edge.targets.table import target
from lora_edge.targets.target import Target


def aimed_at(names: Iterable[str]) -> tuple[Target, ...]:
    """The targets of these names, each once.

    Raises:
        OptionError: one is unknown.
    """
    found = {known.name: known for known in map(target, names)}
    return tuple(found.values())


def form_for(
    targets: Sequence[Target],
    form: Form | None,
    backend: Backend,
    precision: Precision,
    *,
    fixed: bool = False,
) -> Form:
    """The form of a text generator that all targets take; ``fused`` where none says.

    Args:
        targets: from :func:`aimed_at`.
        form: what was asked for; None: nothing.
        backend: what makes the graph.
        precision: of its weights.
        fixed: a graph with fixed shapes is asked for, which is made of the portable form.

    Raises:
        OptionError: the targets do not take one form, or not the one that was asked for.
    """
    wanted = [each for each in targets if each.forms]
    if fixed:
        wanted.append(_FIXED)
    common = [x for x in (wanted[0].forms or () if wanted else ()) if _all_take(wanted, x)]
    if wanted and not common:
        takes = ", ".join(f"{each.name} takes --form {each.form}" for each in wanted)
        raise OptionError(
            f"no form is for all of these targets: {takes}", "Export a bundle for each of them."
        )
    if form is not None and common and form not in common:
        bad = next(each for each in wanted if form not in (each.forms or ()))
        raise OptionError(
            f"--form {form} is not for {bad.name}", f"Use --form {common[0]}, or leave it out."
        )
    chosen = form or (common[0] if common else "fused")
    only = [each.name for each in wanted if each.forms == ("portable",)]
    if only and backend == "optimum":
        raise OptionError(
            f"{only[0]} takes the portable form, which the optimum backend does not make",
            f"Use --backend trace, or leave {_given(only[0])} out.",
        )
    if only and precision in ("int8", "int4"):
        raise OptionError(
            f"{only[0]} takes the portable form, which has no weights in {precision}",
            "Use --precision fp32 or fp16.",
        )
    return chosen


def _given(name: str) -> str:
    """How one that takes a form was asked for."""
    return name if name == _FIXED.name else f"--target {name}"


_FIXED = Target("--static", "a graph with fixed shapes", forms=("portable",))


def _all_take(targets: Sequence[Target], form: Form) -> bool:
    return all(form in (each.forms or ()) for each in targets)


def shapes_for(
    targets: Sequence[Target], static: bool, seq: int | None, past: int | None, rank: int | None
) -> Shapes | None:
    """What is asked of a graph with fixed shapes; None: none is written.

    Args:
        targets: one that takes fixed shapes only asks for it.
        static: it was asked for.
        seq: tokens of one run.
        past: positions of its cache.
        rank: of A and B; None of the three: nothing was said.

    Raises:
        OptionError: a number is none, or there is nothing that it is of.
    """
    asked = Shapes(
        *(
            None if value is None else opt.whole(name, value, 1, 1 << 20)
            for name, value in (("seq", seq), ("past", past), ("rank", rank))
        )
    )
    if static or any(each.dynamic_shapes is False for each in targets):
        return asked
    for name, value in asked._asdict().items():
        if value is not None:
            raise opt.refused(
                name,
                value,
                "none but of a graph with fixed shapes",
                f"Give --static or --target qnn too, or leave --{name} out.",
            )
    return None


def check_task(targets: Sequence[Target], task: str) -> None:
    """Check that the targets run a task.

    Raises:
        OptionError: one does not.
    """
    for each in targets:
        if not each.does(task):
            raise OptionError(
                f"{each.name} runs {', '.join(each.tasks)} only, and this is a model for {task}",
                f"Leave {each.name} out of --target.",
            )


def advice(targets: Sequence[Target], mode: str) -> list[str]:
    """What is better done for a target, a line each."""
    constant = [each.name for each in targets if each.runtime_weights is False]
    return [
        f"{name} multiplies by constant weights only: --mode merged leaves less to the CPU"
        for name in constant
        if mode != "merged"
    ]
