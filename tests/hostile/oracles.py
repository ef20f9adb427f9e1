"""What an accepted file has to be: told by others than the readers (jsonschema, safetensors)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import safetensors

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
BOOL: Schema = {"type": "boolean"}
SHA: Schema = {"type": "string", "pattern": r"^[0-9a-f]{64}\Z"}
NAME: Schema = {
    "type": "string",
    "pattern": r"^(?!/)(?!.*(^|/)\.{0,2}(/|$))[^\\:\x00-\x1f]+\Z",
}


def whole(least: int = 0, most: int = 1 << 50) -> Schema:
    """A whole number of a range; jsonschema would take 2.0."""
    return {"type": "integer", "minimum": least, "maximum": most}


def listed(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def mapped(values: Schema) -> Schema:
    return {"type": "object", "additionalProperties": values}


def maybe(schema: Schema) -> Schema:
    return {"anyOf": [{"type": "null"}, schema]}


def one_of(*values: Any) -> Schema:
    return {"enum": list(values)}


def record(needed: Mapping[str, Schema], more: Mapping[str, Schema] | None = None) -> Schema:
    """An object with these fields and no others."""
    return {
        "type": "object",
        "properties": {**needed, **(more or {})},
        "required": list(needed),
        "additionalProperties": False,
    }


def foreign(fields: Mapping[str, Schema]) -> Schema:
    """An object of another program, with fields that are read."""
    return {"type": "object", "properties": dict(fields)}


SITE = record(
    {"in_features": whole(), "out_features": whole()},
    {
        "kind": one_of("linear", "embedding", "conv", "norm", "head"),
        "bias": BOOL,
        "rank": whole(0, 16),
        "transposed": BOOL,
        "parts": listed(one_of("A", "B", "gate", "G", "bias", "weight", "W", "c")),
        "refusal": TEXT,
        "weight": {},
    },
)
PART = record(
    {
        "file": NAME,
        "form": one_of("fused", "portable", "foreign"),
        "backend": TEXT,
        "inputs": {**listed(TEXT), "minItems": 1},
        "output": one_of("logits"),  # as the graph has it
        "vocab_size": whole(264, 264),
        "max_length": whole(0, 1 << 31),
    },
    {
        "padding": one_of("right", "left", "either"),
        "pad_token_id": whole(-1, 1 << 31),
        "sample": listed(whole(1)),
        "head": TEXT,
        "cache": record(
            {
                "kind": one_of("shared", "concatenated"),
                "layers": whole(2, 2),
                "kv_heads": whole(2, 2),
                "head_dim": whole(8, 8),
            }
        ),
        "exact": one_of(""),  # the seed computes in floats itself
        "static": {"type": "null"},  # nor has it fixed shapes
        "sites": mapped(SITE),
    },
)
MANIFEST = record(
    {
        "mode": one_of("switchable", "merged"),
        "task": one_of("text-generation"),  # the seed's; no mutant of it can be of another
        "precision": one_of("fp32", "int8", "int4"),
        "parts": record({"decoder": PART}),
        "base": {**mapped(TEXT), "required": ["fingerprint", "model_type", "name_or_path"]},
        "kinds": listed(TEXT),
        "adapters": mapped(
            record(
                {
                    "name": TEXT,
                    "file": NAME,
                    "kind": TEXT,
                    "ranks": mapped(whole()),
                    "digest": TEXT,
                    "base_fingerprint": TEXT,
                    "proved": BOOL,
                },
                {
                    "alone": TEXT,
                    "invocation": listed(whole(-1)),
                    "labels": listed(TEXT),
                    "text": listed(TEXT),
                    "conversion": {},
                    "half": one_of(""),  # the seed is no bundle of fp16
                },
            )
        ),
        "base_check": {"type": "object"},
        "versions": mapped(TEXT),
    },
    {
        "files": {
            **mapped(record({"sha256": SHA, "bytes": whole()}, {"sample": maybe(SHA)})),
            "propertyNames": NAME,
        },
        "uncovered": mapped(SITE),
        "tied": listed(TEXT),
        "quantization": {},
        "survival": {},
        "beginning": {"type": "null"},
        "format_version": one_of(2),
    },
)
_NAMES = {"anyOf": [{"type": "null"}, TEXT, listed(TEXT)]}
_TOKENS = listed(whole())
ADAPTER_CONFIG = foreign(
    {
        "peft_type": one_of("LORA"),
        "r": whole(1),
        "lora_alpha": {"type": "number", "minimum": -1e300, "maximum": 1e300},
        "bias": one_of("none", "all", "lora_only", None),
        "fan_in_fan_out": maybe(BOOL),
        "use_rslora": maybe(BOOL),
        "use_dora": maybe(one_of(False)),  # its tensors have no magnitude
        "lora_bias": maybe(one_of(False)),
        "target_modules": _NAMES,
        "exclude_modules": _NAMES,
        "modules_to_save": maybe(listed(TEXT)),
        "rank_pattern": maybe(mapped(whole(1))),
        "alpha_pattern": maybe(mapped({"type": "number"})),
        "task_type": maybe(TEXT),
        "base_model_name_or_path": maybe(TEXT),
        "alora_invocation_tokens": maybe(_TOKENS),
        "trainable_token_indices": maybe({"anyOf": [_TOKENS, mapped(_TOKENS)]}),
        "layers_to_transform": maybe({"anyOf": [{"type": "integer"}, listed({"type": "integer"})]}),
        "layers_pattern": _NAMES,
    }
)
TRAINING = foreign(
    {
        "base": TEXT,
        "base_fingerprint": TEXT,
        "labels": maybe(listed(TEXT)),
        "data": foreign({"sha256": TEXT, "path": maybe(TEXT)}),
        "settings": foreign(
            {
                "rank": whole(1),
                "alpha": {"type": "number", "exclusiveMinimum": 0},
                "seed": whole(0),
                "rslora": BOOL,
                "dora": BOOL,
                "dropout": {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
                "epochs": {"type": "number", "exclusiveMinimum": 0},
                "rank_pattern": mapped(whole(1)),
            }
        ),
        "versions": mapped(TEXT),
    }
)
CASE = foreign(
    {
        "name": TEXT,
        "adapters": listed(TEXT),
        "status": one_of("passed", "failed", "unproved"),
        "reason": TEXT,
        "kind": one_of("base", "adapter", "blend", "mixed", "switch", "task", "proof"),
        "session": TEXT,
    }
)
BASE_CONFIG = foreign({"model_type": maybe(TEXT), "architectures": maybe(listed(TEXT))})


def _complaint(data: Any, schema: Schema) -> str:
    error = jsonschema.exceptions.best_match(
        jsonschema.Draft202012Validator(schema, format_checker=None).iter_errors(data)
    )
    return "" if error is None else f"accepted though {error.json_path} is {error.message}"


def fits(file: str, schema: Schema) -> Callable[[Path], str]:
    """The oracle of a JSON file; bools are no numbers, and a BOM is nothing."""

    def check(folder: Path) -> str:
        text = (folder / file).read_bytes().removeprefix(b"\xef\xbb\xbf")
        return _complaint(json.loads(text), schema)

    return check


def is_report(folder: Path) -> str:
    """The package's own schema of reports, as jsonschema has it."""
    import lora_edge.reports

    schema = Path(lora_edge.reports.__file__).with_name("report.schema.json").read_text()
    return fits("report.json", json.loads(schema))(folder)


def is_journal(folder: Path) -> str:
    """Each finished line."""
    file = folder / "journal" / "finished.jsonl"
    if not file.is_file():  # begun anew
        return ""
    text = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    for line in text[: text.rfind(b"\n") + 1].split(b"\n"):
        if line.strip():
            part = json.loads(line)
            found = _complaint(
                part, foreign({"session": TEXT, "probe": TEXT, "cases": listed(CASE)})
            )
            if found:
                return found
    return ""


def is_safetensors(name: str) -> Callable[[Path], str]:
    """What the package itself takes."""

    def check(folder: Path) -> str:
        try:
            with safetensors.safe_open(folder / name, "np") as opened:
                opened.keys()
        except safetensors.SafetensorError as error:
            return f"accepted though the safetensors package says {error}"
        return ""

    return check
