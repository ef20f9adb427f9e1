"""The README of a bundle: what it is, what was measured, and how to use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_edge.bundle.manifest import Manifest, survival_line
from lora_edge.tasks.task import TASKS

# what the model takes -> how the command line gives it, and Python
_OPTION = {
    "prompt": ("-p 'Hello'",),
    "text": ("--text 'Hello'",),
    "pixel_values": ("--image photo.png",),
}
_ARGUMENT = {"pixel_values": '["photo.png"]', "input_features": "input_features"}


def bundle_card(
    manifest: Manifest,
    cases: Sequence[Mapping[str, Any]] = (),
    on_phones: Sequence[str] = (),
) -> str:
    """Markdown for a bundle's own ``README.md``.

    Args:
        manifest: of the bundle.
        cases: of the report of its export's check, as JSON has them.
        on_phones: what accelerators of phones may take of its graphs, a line each.
    """
    graphs = "two ONNX graphs" if len(manifest.parts) > 1 else "one ONNX graph"
    lines = [
        f"# {manifest.base['name_or_path']}, {manifest.mode}",
        "",
        f"Made by lora-edge {manifest.versions['lora-edge']}: {graphs} "
        f"({manifest.gives.form} form, {manifest.precision}) of a "
        f"{manifest.base['model_type']} model.",
        "",
        "| adapter | kind | layers | largest rank | proved at export |",
        "|---|---|---|---|---|",
    ]
    for name, entry in sorted(manifest.adapters.items()):
        rank = max(entry.ranks.values(), default=0)
        proved = "yes" if entry.proved else "no"
        lines.append(f"| {name} | {entry.kind} | {len(entry.ranks)} | {rank} | {proved} |")
    for name, entry in sorted(manifest.adapters.items()):
        if entry.conversion is not None:
            made = entry.conversion
            lines += [
                "",
                f"{name} is a LoRA that approximates an adapter of type {made.peft_type} "
                f"(`--convert {made.rank}`): relative error of ΔW {made.mean_error:.2e} in "
                f"the mean over its layers, {made.worst_error:.2e} at worst. The proof is of "
                "the LoRA.",
            ]
    if manifest.survival is not None:
        lines += [
            "",
            f"{survival_line(manifest)} The proof is of the rounded weights; survival is what they "
            "keep of the adapter.",
        ]
    lines += _drift(manifest, cases)
    for part in manifest.parts.values():
        if part.static is not None:
            lines += ["", f"`{part.static.file}` is the same graph with {part.static.line()}."]
    if on_phones:
        lines += [
            "",
            "By ONNX Runtime's usability checker, which goes by tables of operators and runs "
            "nothing:",
            "",
            *(f"- {line}" for line in on_phones),
        ]
    task = TASKS[manifest.task]
    argument = _ARGUMENT.get(task.takes, '["Hello"]')
    example = next((name for name in sorted(manifest.adapters) if name != "none"), "NAME")
    lines += [
        "",
        "The figures of the last check against PyTorch are in `parity/`; `lora-edge inspect .` "
        "shows what the bundle holds and what is proved now, after `add` and `remove` too.",
        "",
        "```sh",
        *(f"lora-edge run . -a {example} {option}" for option in _OPTION.get(task.takes, ())),
        "lora-edge validate .",
        "```",
        "",
        "```python",
        "import lora_edge",
        'runner = lora_edge.Runner(".")',
        f'print(runner.{task.verb}({argument}, adapter="{example}"))',
        "```",
    ]
    if manifest.sites:
        path = next(iter(manifest.sites))
        lines += [
            "",
            f"With plain ONNX Runtime, feed `lora.{path}.A`, `.B` and `.gate`, and so on for each "
            f"of the {len(manifest.sites)} sites in `lora_edge.json`; "
            "`adapters/none` holds the values for no adapter."
            + (" They are float16: give it `half.onnx_adapter`." if manifest.half else ""),
        ]
    return "\n".join(lines) + "\n"


def _drift(manifest: Manifest, cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """What int8 activations or float16 add, where the report has measured it."""
    found = [(case, case["drift"]) for case in cases if case.get("drift")]
    if not found:
        return []
    proved = " and ".join(f"`{part.exact}`" for part in manifest.parts.values())
    ships = " and ".join(f"`{part.file}`" for part in manifest.parts.values())
    what = "computes in float16" if manifest.half else "rounds activations to int8"
    lines = [
        "",
        f"The proof is of {proved}, computing in float32. What ships, {ships}, has the same "
        f"weights and {what}, which adds, measured at export on the CPU:",
        "",
        "| | effect that is there | effect error | KL, nats | same best token or label | "
        "cosine of embeddings |",
        "|---|---|---|---|---|---|",
    ]
    forms = {"retained": ".1%", "effect_error": ".1e", "kl": ".1e", "top1": ".1%", "cosine": ".6f"}
    for case, figures in found:
        who = ", ".join(case["adapters"]) or "no adapter"
        values = [(figures[name], form) for name, form in forms.items()]
        cells = ["" if value is None else format(value, form) for value, form in values]
        lines.append(f"| {' | '.join([who, *cells])} |")
    return [*lines, "", '`lora_edge.Runner(".", exact=True)` and `run --exact` compute in float32.']
