"""The kinds of projects, and what each can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

Verbs = tuple[str, ...]
_WORDS = '"Some text"'
_INSTALL = "npm install --ignore-scripts"
_TEXTS: Verbs = ("generate", "classify", "embed")


class KitKind(NamedTuple):
    """A kind of project.

    Attributes:
        name: as ``lora-edge kit`` takes it.
        verbs: what of a bundle it can do: ``generate``, ``classify``, ``embed``.
        commands: what to call in its folder, by verb.
        scripts: it has a copy of the package in JavaScript.
        compiled: names and sizes of the bundle are in its source, so that it runs no other; it
            takes token ids, and needs no tokenizer.
        place: where in the project the bundle is.
        half: it can feed a graph in float16.
    """

    name: str
    verbs: Verbs
    commands: Mapping[str, Sequence[str]]
    scripts: bool = False
    compiled: bool = False
    place: str = "bundle"
    half: bool = True


def _compiled(name: str, *commands: str, place: str = "bundle", half: bool = True) -> KitKind:
    done = {"generate": commands}
    return KitKind(name, ("generate",), done, compiled=True, place=place, half=half)


KITS: Mapping[str, KitKind] = {
    kit.name: kit
    for kit in (
        KitKind("web", _TEXTS, dict.fromkeys(_TEXTS, ("npm install", "npm start")), scripts=True),
        KitKind(
            "node",
            _TEXTS,
            {
                "generate": (_INSTALL, f"node main.mjs {_WORDS}"),
                "classify": (_INSTALL, f"node main.mjs {_WORDS}"),
                "embed": (_INSTALL, f'node main.mjs {_WORDS} "Another text"'),
            },
            scripts=True,
        ),
        KitKind(
            "python",
            ("generate",),
            {"generate": ("pip install -r requirements.txt", f"python main.py {_WORDS}")},
        ),
        _compiled(
            "cpp",
            "cmake -B build -DONNXRUNTIME_ROOT=FOLDER",
            "cmake --build build --config Release",
            "build/generate 12 7 93",
        ),
        _compiled("csharp", "dotnet run -- 12 7 93"),
        _compiled("android", "gradle installDebug", place="app/src/main/assets/bundle"),
        # ONNX Runtime's Objective-C has no float16 tensors.
        _compiled("ios", "swift run generate 12 7 93", place="Sources/Kit/bundle", half=False),
    )
}
"""Every kind, by its name."""
