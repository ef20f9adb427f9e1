"""What a run leaves behind for people and for the next run: training.json, the card, the plot.

Knows files; knows nothing of torch or PEFT.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypedDict

from lora_edge.base.checkpoint import resolve_base
from lora_edge.errors import AdapterError, DataError
from lora_edge.files.json import read_object
from lora_edge.files.schema import decode
from lora_edge.files.transaction import write_atomically
from lora_edge.training.images import read_source
from lora_edge.training.settings import Settings

RECORD_NAME = "training.json"
RECORD_VERSION = 2
PLOT_NAME = "loss.png"
METRICS_NAME = "metrics.jsonl"
TENSORBOARD_NAME = "tensorboard"  # a folder

_LIBRARIES = ("lora-edge", "torch", "transformers", "peft", "accelerate")


@dataclass(frozen=True)
class Recipe:
    """What a record says of how an adapter is made.

    Attributes:
        base: folder or hub id.
        base_fingerprint: of the base's weights.
        data: where the data lay; ``None`` in records of release 0.1.
        data_sha256: of its bytes.
        evaluation: where the evaluation's data lay; ``None`` without.
        evaluation_sha256: of its bytes.
        settings: all of them.
        adapter_sha256: of the weights' file that came out; ``None`` where it is not known.
        versions: of Python and the libraries.
    """

    base: str
    base_fingerprint: str
    data: str | None
    data_sha256: str
    evaluation: str | None
    evaluation_sha256: str | None
    settings: Settings
    adapter_sha256: str | None
    versions: Mapping[str, str]


def read_recipe(file: Path) -> Recipe:
    """Read a ``training.json``, or the ``run.json`` of an interrupted run.

    Raises:
        DataError: it cannot be read, or lacks something.
        AdapterError: settings that cannot be meant, or that this release does not know.
    """
    hint = "Give the training.json that `lora-edge train` wrote beside an adapter."
    found = read_object(file, DataError, hint, nonfinite=True)
    what = f"{file} is not the record of a training run"
    record = decode(_Record, found, what, DataError, hint)
    data = record["data"]
    evaluation: Mapping[str, Any] = record.get("evaluation") or {}
    return Recipe(
        base=record["base"],
        base_fingerprint=record["base_fingerprint"],
        data=data.get("path"),
        data_sha256=data["sha256"],
        evaluation=evaluation.get("path"),
        evaluation_sha256=evaluation.get("sha256"),
        settings=Settings.from_json(record["settings"]),
        adapter_sha256=(record.get("result") or {}).get("adapter_sha256"),
        versions=record["versions"],
    )


class _Path(TypedDict, total=False):
    path: str | None


class _Source(_Path):
    sha256: str


class _Result(TypedDict, total=False):
    adapter_sha256: str | None


class _Made(TypedDict):
    base: str
    base_fingerprint: str
    data: _Source
    settings: dict[str, Any]
    versions: dict[str, str]


class _Record(_Made, total=False):
    evaluation: _Source | None
    result: _Result | None


def check_recipe(recipe: Recipe, base: str, data: Path, evaluation: Path | None) -> None:
    """Check that a record's base and data are what they were.

    Raises:
        AdapterError: the base's weights are others.
        DataError: the data's bytes are others.
    """
    found = resolve_base(base).fingerprint()
    if found != recipe.base_fingerprint:
        raise AdapterError(
            f"the record was made with a base of fingerprint {recipe.base_fingerprint[:12]}, "
            f"{base} has {found[:12]}",
            "Give the base that the record was made with as BASE.",
        )
    for path, wanted in ((data, recipe.data_sha256), (evaluation, recipe.evaluation_sha256)):
        digest = None if path is None else read_source(path).sha256
        if digest != wanted:
            raise DataError(
                f"{path} has sha256 {str(digest)[:12]}, the record was made with "
                f"{str(wanted)[:12]}",
                "Give the data of then: as DATA, or with --eval.",
            )


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide on the bytes."""
    found = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            # Run from a checkout that is not installed.
            from lora_edge import __version__

            found[library] = __version__
    return found


def write_json(file: Path, record: Mapping[str, Any]) -> None:
    """Write a record for people to read too."""
    text = json.dumps(record, indent=2, ensure_ascii=False)
    write_atomically(file, text + "\n")


def card(record: Mapping[str, Any]) -> str:
    """The adapter's model card: base, data, what was set, what came out, how to use it."""
    data, result = record["data"], record["result"]
    evaluation = record.get("evaluation")
    labels = record.get("labels")
    head = {
        "base_model": record["base"],
        "library_name": "peft",
        "pipeline_tag": "text-classification" if labels else "text-generation",
        "tags": ["lora", "lora-edge"],
    }
    if data["kind"] == "image":
        head["pipeline_tag"] = "image-classification"
    yaml = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items())
    about = [
        ("base", f"`{record['base']}`, fingerprint `{record['base_fingerprint'][:16]}`"),
        ("data", f"`{data['file']}`, sha256 `{data['sha256'][:16]}`, {data['examples']} examples"),
    ]
    if evaluation:
        source = f"`{evaluation['file']}`, sha256 `{evaluation['sha256'][:16]}`"
        about.append(("evaluated on", f"{source}, {evaluation['examples']} examples"))
    if labels:
        about.append(("labels", ", ".join(labels)))
    results = [
        ("optimizer steps", str(result["steps"])),
        ("trainable parameters", f"{result['trainable_parameters']:,}"),
        ("training loss at the end", f"{result['final_loss']:.4f}"),
        *(
            (key.replace("eval_", "evaluation: "), f"{value:.4f}")
            for key, value in result.get("evaluation", {}).items()
        ),
    ]
    if result.get("best_step") is not None:
        results.append(("weights of step", f"{result['best_step']}, the best evaluation"))
    return (
        f"---\n{yaml}\n---\n\n# LoRA adapter for {record['base']}\n\n"
        f"{_table('trained on', about)}\n{_table('result', results)}\n"
        f"{_table('option', _given(record['settings']))}\n"
        "Options that are not listed have their defaults. `training.json` holds all of them:\n\n"
        "```sh\nlora-edge train --from training.json -o again   # the same bytes, on one machine\n"
        f"lora-edge export {record['base']} -a adapter=. -o bundle\n```\n\n"
        "```python\nfrom peft import PeftModel\n"
        'model = PeftModel.from_pretrained(base, ".")\n```\n'
    )


def _given(settings: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """The options that are not at their defaults, and those that everyone asks for."""
    asked = ("rank", "alpha", "target_modules", "lr", "epochs", "batch_size", "seed")
    usual = Settings().to_json()
    return [
        (f"`{one.name}`", f"`{json.dumps(settings[one.name])}`".replace("|", "\\|"))
        for one in fields(Settings)
        if one.name in asked or settings[one.name] != usual[one.name]
    ]


def _table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    lines = [f"| {title} | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)]
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Mapping[str, float]], file: Path) -> bool:
    """Draw the losses of a metrics.jsonl as a PNG; whether matplotlib was there to do so."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o-")):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats)")
    axes.grid(visible=True, alpha=0.3)
    if axes.get_lines():
        axes.legend()
    figure.savefig(file, dpi=120)
    return True
