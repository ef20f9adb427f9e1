"""Kits that are compiled: what they refuse, and that their programs generate what the Runner does.

The compilers are the machine's; ONNX Runtime for them is that of ``ci/client native``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

import lora_edge
from lora_edge.errors import BundleError, OptionError
from lora_edge.kits.facts import _hash
from lora_edge.kits.kinds import KITS
from lora_edge.kits.kit import make_kit
from tests.support.adapters import make_all_linear
from tests.support.families import make_base
from tests.support.kinds import make_kinds
from tests.support.paths import ROOT
from tests.support.shipped import export_text

NATIVE = ROOT / ".client-native"
LIBRARY = NATIVE / "lib" / "libonnxruntime.so"
ASSEMBLY = NATIVE / "lib" / "Microsoft.ML.OnnxRuntime.dll"
COMPILED = [name for name, kit in KITS.items() if kit.compiled]
# "Word: river Answer:"
PROMPT = [257, 54, 78, 81, 67, 25, 220, 81, 72, 85, 68, 81, 220, 32, 77, 82, 86, 68, 81, 25]
STEPS = 24

Program = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return export_text(tmp_path_factory.mktemp("text") / "bundle", "echo", "shout")


def _edited(bundle: Path, folder: Path, **changes: Any) -> Path:
    copy = Path(shutil.copytree(bundle, folder))
    path = copy / "lora_edge.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return copy


def test_the_hash_is_fnv_1a() -> None:
    assert _hash(b"foobar") == 0x85944171F73967E8


@pytest.mark.parametrize("kind", COMPILED)
def test_the_source_has_the_facts_of_the_bundle(kind: str, text: Path, tmp_path: Path) -> None:
    made = make_kit(text, kind, tmp_path / "out").directory
    (source,) = (f for f in made.rglob("*") if f.name.lower().startswith(("facts.", "bundle.h")))
    said = source.read_text()
    manifest = (made / KITS[kind].place / "lora_edge.json").read_bytes()
    assert str(_hash(manifest)) in said or f"{_hash(manifest):x}" in said
    assert '"onnx/model.onnx"' in said
    for name in ("echo", "none", "shout"):
        assert f'"adapters/{name}/adapter.onnx_adapter"' in said
    readme = (made / "README.md").read_text()
    assert ("Not run yet" in readme) is (kind in ("android", "ios"))


@pytest.mark.parametrize("kind", COMPILED)
def test_the_source_has_each_adapters_own_end_token(
    kind: str, ending: Path, tmp_path: Path
) -> None:
    made = make_kit(ending, kind, tmp_path / "out").directory
    (source,) = (f for f in made.rglob("*") if f.name.lower().startswith(("facts.", "bundle.h")))
    ends = {
        line.split('"')[1]: [int(x) for x in re.findall(r"\d+", line.partition('_adapter"')[2])]
        for line in source.read_text().splitlines()
        if '.onnx_adapter"' in line
    }
    runner = lora_edge.Runner(ending)
    wanted = {name: sorted(runner.eos_of(name)) for name in ("echo", "shout")}
    assert ends == {**wanted, "none": sorted(runner.eos_ids)}
    assert "adapters/NAME/text/tokenizer.json`: shout." in (made / "README.md").read_text()


def test_a_name_that_source_cannot_hold_is_refused(text: Path, tmp_path: Path) -> None:
    manifest = json.loads((text / "lora_edge.json").read_text())
    part = {**manifest["parts"]["decoder"], "file": 'onnx/model".onnx'}
    copy = _edited(text, tmp_path / "bundle", parts={"decoder": part})
    with pytest.raises(BundleError, match="no name that this kit can write"):
        make_kit(copy, "cpp", tmp_path / "out")


def test_what_a_compiled_kit_cannot_do_is_refused(text: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="float16, which the kit ios cannot feed"):
        make_kit(_edited(text, tmp_path / "half", precision="fp16"), "ios", tmp_path / "out")
    with pytest.raises(BundleError, match="no file in float16"):
        make_kit(tmp_path / "half", "cpp", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _needs(*programs: str, made: Path = NATIVE / "made-from") -> pytest.MarkDecorator:
    missing = [name for name in programs if shutil.which(name) is None]
    if not made.is_file():
        missing.append(f"{made.relative_to(ROOT)} (ci/client native)")
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def _called(folder: Path, *command: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, command)],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def _done(folder: Path, *command: object) -> None:
    done = _called(folder, *command)
    assert done.returncode == 0, done.stdout + done.stderr


def _same() -> Path:
    """The library of this environment: what int8 activations round to is a release's own."""
    (file,) = (Path(ort.__file__).parent / "capi").glob("libonnxruntime.so.*")
    return file


def _cpp(made: Path, library: Path) -> Program:
    words = [f"-DONNXRUNTIME_ROOT={NATIVE}", f"-DONNXRUNTIME_LIBRARY={library}"]
    _done(made, "cmake", "-B", "build", *words)
    _done(made, "cmake", "--build", "build")
    (made / "libonnxruntime.so.1").symlink_to(library)
    return lambda *words: _called(made, "build/generate", *words, LD_LIBRARY_PATH=str(made))


def _csharp(made: Path, library: Path) -> Program:
    """By Mono, with ONNX Runtime's own sources."""
    _done(made, "mcs", "-out:generate.exe", f"-r:{ASSEMBLY}", *made.glob("*.cs"))
    shutil.copy(ASSEMBLY, made)
    (made / "libonnxruntime.so").symlink_to(library)
    return lambda *words: _called(made, "mono", "generate.exe", *words)


BUILD: dict[str, Callable[[Path, Path], Program]] = {"cpp": _cpp, "csharp": _csharp}
IN_BOTH = [
    pytest.param("cpp", marks=_needs("cmake", "c++")),
    pytest.param("csharp", marks=_needs("mcs", "mono", made=ASSEMBLY)),
]


def _wanted(bundle: Path, prompt: Sequence[int], adapters: Sequence[str]) -> str:
    """The lines of a program that is right."""
    runner = lora_edge.Runner(bundle)
    lines = []
    for name in adapters:
        adapter = None if name == "none" or name not in runner.adapters else name
        (ids,) = runner.generate_ids([list(prompt)], adapter=adapter, max_new_tokens=STEPS)
        kept = [token for token in ids if token not in runner.eos_of(adapter)]
        lines.append(f"{name}: {' '.join(map(str, kept))}".rstrip())
    return "\n".join(lines)


def _agrees(program: Program, bundle: Path, prompt: Sequence[int], adapters: Sequence[str]) -> None:
    chosen = [word for name in adapters for word in ("--adapter", name)]
    done = program(*chosen, "--max-new-tokens", STEPS, *prompt)
    assert done.returncode == 0, done.stderr
    said = "\n".join(line.rstrip() for line in done.stdout.splitlines())
    assert said == _wanted(bundle, prompt, adapters)
    answers = {line.partition(":")[2] for line in said.splitlines()}
    assert len(answers) == len(set(adapters)), "an adapter does nothing"


@pytest.mark.long
@pytest.mark.parametrize("kind", IN_BOTH)
def test_its_tokens_are_the_runners(kind: str, text: Path, tmp_path: Path) -> None:
    made = make_kit(text, kind, tmp_path / "out").directory
    program = BUILD[kind](made, LIBRARY)
    _agrees(program, text, PROMPT, ["none", "shout", "echo", "none", "shout"])
    for words, said in (
        ([], "usage: generate"),
        (["x"], "x is not a whole number"),
        (["--adapter", "nobody", 1], "there is no adapter nobody; there are:"),
        ([1, 999], "token 999 is not below"),
        ([1] * 600, "the prompt has 600 tokens, and the model reads 512"),
    ):
        done = program(*words)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ")
        assert said in done.stderr
    with (made / "bundle" / "lora_edge.json").open("a") as file:
        file.write(" ")
    assert "is not the bundle that this program was written for" in program(1).stderr


@pytest.mark.long
@pytest.mark.parametrize("kind", IN_BOTH)
@pytest.mark.parametrize(
    "options", [{"precision": "fp16"}, {"precision": "int4"}, {"form": "portable"}]
)
def test_other_forms_too(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    bundle = export_text(tmp_path / "bundle", "echo", "shout", **options)
    library = _same() if options.get("precision") == "int4" else LIBRARY
    program = BUILD[kind](make_kit(bundle, kind, tmp_path / "out").directory, library)
    _agrees(program, bundle, PROMPT, ["shout", "none", "echo"])


@pytest.mark.long
@pytest.mark.parametrize("kind", IN_BOTH)
def test_an_adapter_in_the_weights(kind: str, tmp_path: Path) -> None:
    bundle = export_text(tmp_path / "bundle", "shout", mode="merged")
    program = BUILD[kind](make_kit(bundle, kind, tmp_path / "out").directory, LIBRARY)
    _agrees(program, bundle, PROMPT, ["shout"])


@pytest.mark.long
@pytest.mark.parametrize("kind", IN_BOTH)
def test_an_adapter_that_words_invoke(kind: str, tmp_path: Path) -> None:
    base, adapters = make_kinds("llama", tmp_path, ("alora", "dora"))
    bundle = tmp_path / "bundle"
    lora_edge.export(base, adapters, output=bundle)
    program = BUILD[kind](make_kit(bundle, kind, tmp_path / "out").directory, LIBRARY)
    for prompt in ([5, 6, 7, 9, 11, 20, 21], [7, 9, 11], [5, 7, 9, 11, 30, 7, 9, 11]):
        _agrees(program, bundle, prompt, ["none", "alora", "dora"])
    uninvoked = program("--adapter", "alora", "--adapter", "none", 5, 6, 8).stdout.splitlines()
    assert len({line.partition(":")[2] for line in uninvoked}) == 1


@pytest.mark.long
@pytest.mark.parametrize("kind", IN_BOTH)
@pytest.mark.parametrize("family", ["mistral", "gpt2"])
def test_an_attention_window_and_learned_positions(family: str, kind: str, tmp_path: Path) -> None:
    base = make_base(family, tmp_path / "base")
    adapters = {"all": make_all_linear(family, base, tmp_path / "all")}
    lora_edge.export(base, adapters, output=tmp_path / "bundle")
    made = make_kit(tmp_path / "bundle", kind, tmp_path / "out").directory
    prompt = [5, 9, 77, 100, 200, 31, 12, 14, 88]  # longer than the window
    _agrees(BUILD[kind](made, LIBRARY), tmp_path / "bundle", prompt, ["all", "none", "all"])


@pytest.mark.long
@pytest.mark.parametrize("kind", IN_BOTH)
def test_an_end_token_that_an_adapter_brings(kind: str, ending: Path, tmp_path: Path) -> None:
    program = BUILD[kind](make_kit(ending, kind, tmp_path / "out").directory, LIBRARY)
    _agrees(program, ending, PROMPT, ["shout", "none", "echo"])
    said = program("--adapter", "shout", *PROMPT).stdout
    assert said == "shout: 220 49 40 53 36 49\n"  # without its exclamation mark


@pytest.mark.long
@_needs("java")
def test_the_kit_for_android_compiles(text: Path, tmp_path: Path) -> None:
    """All but the screen, which needs Android's own classes."""
    made = make_kit(text, "android", tmp_path / "out").directory
    sources = [f for f in made.rglob("*.kt") if f.name != "MainActivity.kt"]
    assert len(sources) == 2
    compiler = NATIVE / "node_modules" / "kotlin-compiler" / "bin" / "kotlinc"
    classes = NATIVE / "aar" / "classes.jar"
    _done(made, "bash", compiler, "-Werror", "-cp", classes, "-d", tmp_path / "classes", *sources)
    assert (tmp_path / "classes" / "kit" / "Model.class").is_file()
