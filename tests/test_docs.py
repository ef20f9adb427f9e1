"""The documentation does what it says: links resolve, commands and snippets run, examples work."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import onnxruntime as ort
import pytest

import lora_edge
from lora_edge.cli import cli
from lora_edge.exporting.package import write_package
from tests.support.examples import examples
from tests.support.paths import ROOT

README = "README.md"
DOCS = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
PAGES = [README, "llms.txt", "CHANGELOG.md", "models/README.md", *DOCS]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").iterdir() if path.suffix == ".py")
EXECUTED = "<!-- executed -->"
FEW_STEPS = "4"
# Options of other commands than ours that the pages name.
_OTHERS = {"--cpu", "--multi_gpu", "--write"}
_OTHERS |= {"--lora-edge-bundle", "--lora-edge-reference", "--lora-edge-html"}
_HAS_EXPORT = importlib.util.find_spec("peft") is not None
_HAS_TRAIN = importlib.util.find_spec("accelerate") and importlib.util.find_spec("matplotlib")
_HAS_OPTIMUM = importlib.util.find_spec("optimum") is not None
exporting = pytest.mark.skipif(
    not _HAS_EXPORT or _HAS_OPTIMUM, reason="needs the ordinary environment"
)


class Block(NamedTuple):
    """A fenced block: its language, its text, and whether it says that it is executed."""

    language: str
    text: str
    executed: bool


def _text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def _blocks(page: str) -> list[Block]:
    found = re.findall(r"(<!-- executed -->\n)?^```(\w*)\n(.*?)^```$", _text(page), re.M | re.S)
    return [Block(language, text, bool(mark)) for mark, language, text in found]


def _prose(page: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", _text(page), flags=re.M | re.S)


def _inline(page: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", _prose(page))


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", _prose(str(page.relative_to(ROOT))), re.M)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.strip().replace(" ", "-") for heading in plain}


def _links(page: str) -> list[str]:
    text = re.sub(r"`[^`\n]*`", "", _prose(page))
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_resolve(page: str) -> None:
    for link in _links(page):
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.resolve().exists(), f"{page}: {link}"
        assert not anchor or anchor in _anchors(target.resolve()), f"{page}: {link}"


def test_each_page_and_example_can_be_reached() -> None:
    for page in (README, "llms.txt"):
        assert set(DOCS) <= {link.partition("#")[0] for link in _links(page)}, page
    assert {f"examples/{name}" for name in EXAMPLES} <= set(_links("llms.txt"))


def test_the_readme_is_short() -> None:
    assert len(_text(README).splitlines()) <= 200


def test_llms_txt_follows_its_convention() -> None:
    lines = _text("llms.txt").splitlines()
    assert lines[0] == "# lora-edge"
    assert next(line for line in lines[1:] if line).startswith("> ")
    sections = _text("llms.txt").split("\n## ")[1:]
    for section in sections:
        items = [line for line in section.splitlines()[1:] if line]
        assert items
        assert all(re.fullmatch(r"- \[[^\]]+\]\([^)]+\)(: .+)?", item) for item in items)


@pytest.mark.parametrize("page", [README, *DOCS])
def test_paths_that_are_named_exist(page: str) -> None:
    for path in _inline(page):
        if re.fullmatch(r"(lora_edge|tests|ci|examples|models|docs)/[\w./-]+", path):
            assert (ROOT / path).exists(), f"{page}: {path}"


def test_the_tree_has_a_line_for_each_folder() -> None:
    tree = next(block.text for block in _blocks(README) if "lora_edge/ " in block.text)
    told = set(re.findall(r"^ +(\w+)/ ", tree, re.M))
    folders = {path.parent.name for path in (ROOT / "lora_edge").glob("*/__init__.py")}
    assert told == folders


# Commands ------------------------------------------------------------------------------------


def _commands(page: str) -> Iterator[list[str]]:
    """Verb and arguments of every ``lora-edge`` in the fenced blocks of shell."""
    for block in _blocks(page):
        if block.language != "sh":
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            starts = [
                i + 1 for i, word in enumerate(words) if word in ("lora-edge", "lora_edge.cli")
            ]
            for start in starts:
                ends = [i for i in range(start, len(words)) if words[i] in ("|", ">", "&&", ";")]
                yield words[start : min([*ends, len(words)])]


def _command(verb: str) -> click.Command:
    found = cli.get_command(click.Context(cli), verb)
    assert found is not None, f"lora-edge has no command {verb}"
    return found


def _options(verb: str) -> set[str]:
    return {
        name
        for param in _command(verb).params
        for name in (*param.opts, *param.secondary_opts, "-h", "--help")
    }


@pytest.mark.parametrize("page", [page for page in PAGES if any(_commands(page))])
def test_commands_are_ones_that_exist(page: str) -> None:
    for verb, *arguments in _commands(page):
        command = _command(verb)
        context = click.Context(command, info_name=verb)
        options, rest, _ = command.make_parser(context).parse_args(list(arguments))
        assert not rest, f"{page}: lora-edge {verb} does not take {rest}"
        for param in command.params:
            given = options.get(str(param.name))
            known = isinstance(given, str | list | tuple) and bool(given)
            assert known or not param.required, f"{page}: lora-edge {verb} lacks {param.name}"
            if known and isinstance(param.type, click.Choice | click.types.IntParamType):
                param.type_cast_value(context, given)


@pytest.mark.parametrize("page", PAGES)
def test_options_in_the_text_exist(page: str) -> None:
    verbs = cli.list_commands(click.Context(cli))
    known = set().union(*map(_options, verbs)) | _OTHERS
    for code in _inline(page):
        words = re.split(r"[\s=]+", code)
        if words[0] == "lora-edge" and len(words) > 1 and words[1].isalpha():
            own = _options(words[1])
            assert {word for word in words[2:] if word.startswith("-")} <= own, f"{page}: {code}"
        elif words[0].startswith("--"):
            assert words[0] in known, f"{page}: {code}"


# Snippets ------------------------------------------------------------------------------------


def _snippets(page: str) -> list[str]:
    return [block.text for block in _blocks(page) if block.language == "python"]


@pytest.mark.parametrize("page", [page for page in PAGES if _snippets(page)])
def test_snippets_compile_and_name_what_exists(page: str) -> None:
    for text in _snippets(page):
        compile(text, page, "exec")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("lora_edge"):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), page
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                name = node.attr
                assert node.value.id != "lora_edge" or hasattr(lora_edge, name), f"{page}: {name}"


# Execution -----------------------------------------------------------------------------------


def _environment() -> dict[str, str]:
    quiet = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, **quiet, "PATH": path, "PYTHONPATH": str(ROOT)}


def _shell(script: str, folder: Path) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


class Workshop:
    """A folder with the shipped models, in which the pages' blocks are run once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "models").symlink_to(ROOT / "models")
        self._said: dict[str, list[str]] = {}

    def run(self, page: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Run the blocks of a page that say so, in order; what those of shell wrote to stdout."""
        if page != README:
            self.run(README, monkeypatch)  # makes the bundle
        if page not in self._said:
            monkeypatch.chdir(self.folder)
            names: dict[str, Any] = {}
            self._said[page] = []
            for block in _blocks(page):
                if block.executed and block.language == "sh":
                    self._said[page].append(_shell(block.text, self.folder))
                elif block.executed:
                    exec(compile(block.text, page, "exec"), names)
        return self._said[page]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("docs"))


@exporting
def test_the_first_success_succeeds(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    first, use = workshop.run(README, monkeypatch)
    assert first.splitlines()[-1].strip() == "RIVER!"
    lines = [line.strip() for line in use.splitlines()]
    assert lines[0] == "revir"
    assert any(line.startswith("passed: ") for line in lines)


@exporting
@pytest.mark.parametrize(
    "page", examples([page for page in DOCS if EXECUTED in _text(page)], ["docs/tasks.md"])
)
def test_marked_blocks_run(page: str, workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    assert any(block.executed for block in _blocks(page))
    workshop.run(page, monkeypatch)


def _example(name: str, *arguments: object) -> str:
    """Run a program; what it wrote to stdout."""
    program, said = str(ROOT / "examples" / name), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(said),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("default")  # as Python has it, which starts no program with errors
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [program, *map(str, arguments)])
        code: object = 0
        try:
            runpy.run_path(program, run_name="__main__")
        except SystemExit as stopped:
            code = stopped.code
    assert not code, f"{name}\n{said.getvalue()}"
    return said.getvalue()


@pytest.fixture
def bundle(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Path:
    workshop.run(README, monkeypatch)
    return workshop.folder / "bundle"


@exporting
class TestExamples:
    """Each program of ``examples/`` runs, and says what it should."""

    def test_none_is_forgotten(self) -> None:
        own = {name.removeprefix("test_") for name in dir(type(self)) if name.startswith("test_")}
        elsewhere = {"speech", "onnxruntime_genai_tokens"}  # tests/clients/test_newcomer.py
        assert {name.removesuffix(".py") for name in EXAMPLES} - own == elsewhere

    @pytest.mark.long
    def test_export_and_run(self, tmp_path: Path) -> None:
        said = _example("export_and_run.py", tmp_path / "bundle")
        assert "proved: True" in said
        assert re.search(r"^shout .* RIVER!$", said, re.M)

    def test_blend_and_mix(self, bundle: Path) -> None:
        said = _example("blend_and_mix.py", bundle)
        assert len(re.findall(r"^  shout +RIVER!$", said, re.M)) == 2
        assert len(re.findall(r"^  mirror +revir$", said, re.M)) == 2
        assert float(said.split()[-1]) < 1e-4

    @pytest.mark.skipif(not _HAS_TRAIN, reason="needs lora-edge[train]")
    def test_train_then_export(self) -> None:
        said = _example("train_then_export.py", FEW_STEPS)
        assert re.search(r"^loss: \d", said, re.M)
        assert said.endswith("proved: True\n")

    def test_plain_onnxruntime(self, bundle: Path) -> None:
        runner = lora_edge.Runner(bundle)
        ids = list(runner.tokenizer.encode("Word: river Answer:"))
        said = [_example("plain_onnxruntime.py", bundle, x, *ids) for x in ("shout", "mirror")]
        expected = runner.logits([ids, ids], adapter=["shout", "mirror"])[:, -1].argmax(-1)
        assert [int(x) for x in said] == expected.tolist()

    @pytest.mark.skipif(not hasattr(ort, "ModelPackage"), reason="needs onnxruntime 1.32")
    def test_model_package(self, bundle: Path, tmp_path: Path) -> None:
        write_package({"cpu": bundle}, tmp_path / "package", link=True)
        runner = lora_edge.Runner(bundle)
        ids = list(runner.tokenizer.encode("Word: river Answer:"))
        said = _example("model_package.py", tmp_path / "package", "shout", *ids)
        assert int(said) == int(runner.logits([ids], adapter="shout")[0, -1].argmax())

    def test_validate_in_ci(self, bundle: Path, tmp_path: Path) -> None:
        said = _example("validate_in_ci.py", bundle, tmp_path)
        assert said.startswith("passed: ")
        report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
        assert report["passed"]
        assert {"report.html", "junit.xml"} <= {path.name for path in tmp_path.iterdir()}
        again = _example("validate_in_ci.py", bundle, tmp_path / "b", tmp_path / "report.json")
        assert again.startswith("passed: ")

    @pytest.mark.long
    def test_own_prompts_as_goldens(self, bundle: Path) -> None:
        said = _example("own_prompts_as_goldens.py", bundle)
        assert "adapter shout, given prompts 1: passed" in said
        assert said.endswith("passed: True\n")
        assert not list((bundle / "parity").glob("*given*"))

    def test_embeddings_and_classification(
        self, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        workshop.run("docs/tasks.md", monkeypatch)
        said = _example("embeddings_and_classification.py", workshop.folder / "classifiers")
        assert re.search(r"^letters +reverse +[\d.]+ +stone=enots$", said, re.M)
        cosines = [float(x) for x in said.splitlines()[-1].split(":")[1].split()]
        assert cosines[1] > cosines[2]


@pytest.mark.optimum
@pytest.mark.skipif(not _HAS_OPTIMUM, reason="needs lora-edge[optimum] (transformers 4.57)")
def test_speech() -> None:
    said = _example("speech.py")
    assert said.startswith("automatic-speech-recognition: features [batch, 16, 40]")
    assert said.endswith("proved: True\n")
    base, adapted = re.findall(r"^(?:no adapter|accent) (.+)$", said, re.M)
    assert base != adapted
