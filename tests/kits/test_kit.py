"""What a kit writes and refuses, and what its programs say."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lora_edge
from lora_edge.errors import BundleError, OptionError
from lora_edge.kits.kinds import KITS
from lora_edge.kits.kit import MARKER, make_kit
from tests.cli.conftest import cli  # noqa: F401
from tests.support.commands import Cli
from tests.support.paths import ROOT
from tests.support.shipped import export_heads, export_text

PROMPT = "Word: river Answer:"
NAMES = ("echo", "mirror", "shout")
CLIENTS = ROOT / ".client-js"
in_clients = pytest.mark.skipif(
    not (CLIENTS / "node_modules").is_dir() or shutil.which("node") is None,
    reason="needs Node, and the packages of npm in .client-js",
)


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return export_text(tmp_path_factory.mktemp("kits") / "bundle", *NAMES)


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return export_heads(tmp_path_factory.mktemp("kits") / "classifiers")


def _said(folder: Path, *words: object) -> str:
    done = subprocess.run(
        [*map(str, words)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _of_task(bundle: Path, task: str, folder: Path) -> Path:
    """A copy whose manifest says another task."""
    copy = Path(shutil.copytree(bundle, folder))
    path = copy / "lora_edge.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "task": task}))
    return copy


@pytest.mark.parametrize("kind", KITS)
def test_a_kit_has_a_whole_bundle_and_says_what_to_call(
    kind: str,
    generator: Path,
    tmp_path: Path,
    cli: Cli,  # noqa: F811
) -> None:
    result = cli("kit", generator, kind, "-o", tmp_path / "out")
    assert (result.code, result.out) == (0, f"{tmp_path / 'out'}\n")
    next_ones = [line.strip() for line in result.err.split("next:")[1].splitlines() if line]
    assert next_ones == [f"cd {tmp_path / 'out'}", *KITS[kind].commands["generate"]]
    assert json.loads((tmp_path / "out" / MARKER).read_text())["kit"] == kind
    lora_edge.load_bundle(tmp_path / "out" / KITS[kind].place).verify_all()
    readme = (tmp_path / "out" / "README.md").read_text()
    assert all(name in readme for name in NAMES)
    assert (tmp_path / "out" / "lora-edge" / "index.js").is_file() is KITS[kind].scripts
    assert not list((tmp_path / "out").rglob("*.j2"))


def test_the_page_has_the_names_and_nothing_from_elsewhere(generator: Path, tmp_path: Path) -> None:
    made = make_kit(generator, "web", tmp_path / "out").directory
    page = (made / "index.html").read_text()
    assert re.findall(r'value="(\w+)" data-kind="one"', page) == sorted(NAMES)
    assert "a blend" in page
    assert not [
        f for f in made.iterdir() if f.suffix in (".html", ".css") and "://" in f.read_text()
    ]
    pins = json.loads((made / "package.json").read_text())["dependencies"]
    assert pins == {"@huggingface/tokenizers": "0.2.0", "onnxruntime-web": "1.30.0"}


def test_a_base_without_a_head_is_no_choice(classifiers: Path, tmp_path: Path) -> None:
    page = (make_kit(classifiers, "web", tmp_path / "out").directory / "index.html").read_text()
    assert "no adapter" not in page
    assert "a blend" not in page
    assert page.count(" checked") == 1


def test_links_take_no_room(generator: Path, tmp_path: Path) -> None:
    data = "onnx/model.onnx_data"
    for link in (False, True):
        made = make_kit(generator, "python", tmp_path / str(link), link=link).directory
        assert os.path.samefile(made / "bundle" / data, generator / data) is link


def test_what_is_in_the_way_is_left(generator: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("own")
    for force in (False, True):
        with pytest.raises(BundleError):
            make_kit(generator, "python", tmp_path, force=force)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    out = tmp_path / "out"
    make_kit(generator, "python", out)
    with pytest.raises(BundleError, match="not empty"):
        make_kit(generator, "web", out)
    make_kit(generator, "web", out, force=True)
    assert not (out / "main.py").exists()


def test_a_damaged_bundle_makes_no_kit(generator: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(generator, tmp_path / "bundle"))
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        make_kit(copy, "web", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize(
    ("kind", "task", "works"),
    [
        ("web", "token-classification", "text-generation, text-classification, feature-extraction"),
        (
            "node",
            "image-classification",
            "text-generation, text-classification, feature-extraction",
        ),
        ("python", "text-classification", "the kit python takes text-generation"),
    ],
)
def test_other_tasks_are_refused(
    kind: str, task: str, works: str, classifiers: Path, tmp_path: Path
) -> None:
    copy = _of_task(classifiers, task, tmp_path / "bundle")
    with pytest.raises(OptionError, match=f"{task}.*{works}"):
        make_kit(copy, kind, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_kit_in_python_says_what_the_runner_says(generator: Path, tmp_path: Path) -> None:
    made = make_kit(generator, "python", tmp_path / "out").directory
    runner = lora_edge.Runner(generator)
    assert _said(made, sys.executable, "main.py", PROMPT) == runner.generate([PROMPT])[0] + "\n"
    for name in NAMES:
        told = _said(made, sys.executable, "main.py", PROMPT, "--adapter", name)
        assert told == runner.generate([PROMPT], adapter=name)[0] + "\n"
    assert "import lora_edge" not in (made / "main.py").read_text()


def test_an_adapters_own_end_token_ends_the_texts_of_the_kit_in_python(
    ending: Path, tmp_path: Path
) -> None:
    made = make_kit(ending, "python", tmp_path / "out").directory
    runner = lora_edge.Runner(ending)
    assert runner.eos_of("shout") > runner.eos_of("echo")
    wanted = runner.generate([PROMPT], adapter="shout")[0]
    assert wanted == " RIVER"
    assert _said(made, sys.executable, "main.py", PROMPT, "--adapter", "shout") == wanted + "\n"


@pytest.mark.long
@in_clients
def test_an_adapters_own_end_token_ends_the_texts_of_the_kit_in_node(
    ending: Path, tmp_path: Path
) -> None:
    made = _installed(make_kit(ending, "node", tmp_path / "out").directory)
    assert _said(made, "node", "main.mjs", PROMPT, "--adapter", "shout") == " RIVER\n"


def _installed(made: Path) -> Path:
    (made / "node_modules").symlink_to(CLIENTS / "node_modules")
    return made


@pytest.mark.long
@in_clients
def test_the_kit_in_node_says_what_the_runner_says(
    generator: Path, classifiers: Path, tmp_path: Path
) -> None:
    made = _installed(make_kit(generator, "node", tmp_path / "generator").directory)
    runner = lora_edge.Runner(generator)
    for name in NAMES:
        told = _said(made, "node", "main.mjs", PROMPT, "--adapter", name)
        assert told == runner.generate([PROMPT], adapter=name)[0] + "\n"
    blend = {"echo": 0.5, "mirror": 0.5}
    given = [word for name in blend for word in ("--adapter", f"{name}=0.5")]
    told = _said(made, "node", "main.mjs", PROMPT, *given)
    assert told == runner.generate([PROMPT], adapter=blend)[0] + "\n"
    made = _installed(make_kit(classifiers, "node", tmp_path / "classifiers").directory)
    told = _said(made, "node", "main.mjs", "stone=enots", "--adapter", "letters")
    (labels,) = lora_edge.Runner(classifiers).classify(["stone=enots"], adapter="letters")
    assert [line.split("\t")[0] for line in told.splitlines()] == [x.label for x in labels]


@pytest.fixture
def visit(tmp_path: Path) -> Iterator[Any]:
    servers: list[subprocess.Popen[str]] = []

    def call(bundle: Path, verb: str) -> dict[str, Any]:
        made = _installed(make_kit(bundle, "web", tmp_path / "web").directory)
        server = subprocess.Popen(
            ["node", "server.mjs"],
            cwd=made,
            env={**os.environ, "PORT": "0"},
            stdout=subprocess.PIPE,
            text=True,
        )
        servers.append(server)
        assert server.stdout is not None
        address = server.stdout.readline().split()[0]
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{address}/..%2f..%2fetc/hosts")
        program = ROOT / "tests" / "kits" / "page.mjs"
        seen: dict[str, Any] = json.loads(_said(made, "node", program, CLIENTS, address, verb))
        return seen

    yield call
    for server in servers:
        server.terminate()
        server.communicate()


@pytest.mark.long
@in_clients
def test_the_page_generates(visit: Any, generator: Path) -> None:
    seen = visit(generator, "generate")
    runner = lora_edge.Runner(generator)
    for name in NAMES:
        assert seen["answers"][name] == runner.generate([PROMPT], adapter=name)[0]
    assert seen["answers"]["no adapter"] == runner.generate([PROMPT])[0]
    assert seen["answers"]["all of mirror"] == seen["answers"]["mirror"]
    blend = {"echo": 0.5, "mirror": 0.5}
    assert seen["answers"]["blend"] == runner.generate([PROMPT], adapter=blend)[0]
    assert re.search(r"^\d+ tokens, [\d.]+ tokens/s\. Stopped\.$", seen["stopped"])
    assert seen["long"] == "The prompt has 3001 tokens, and the model reads 512."
    assert seen["foreign"] == seen["console"] == seen["unnamed"] == seen["wide"] == []
    assert seen["isolated"]


@pytest.mark.long
@in_clients
def test_the_page_classifies(visit: Any, classifiers: Path) -> None:
    seen = visit(classifiers, "classify")
    (labels,) = lora_edge.Runner(classifiers).classify(["stone=enots"], adapter="letters")
    assert [x[0] for x in seen["answers"]["letters"]] == [x.label for x in labels]
    assert seen["foreign"] == seen["console"] == seen["unnamed"] == seen["wide"] == []
