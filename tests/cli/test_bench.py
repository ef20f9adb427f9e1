"""``lora-edge bench``: a table, JSON and a chart, and who cannot take part says why.

No time is asserted.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from lora_edge.bench.plan import Entry, Figure, Plan, Settings, Taker
from lora_edge.bench.rivals import RIVALS, Given, Rival, rival
from lora_edge.bench.run import tried
from lora_edge.bench.standard import FIGURES, Choices, chosen_adapter, standard_plan
from lora_edge.bundle.bundle import Bundle, load_bundle
from lora_edge.bundle.manifest import Manifest
from lora_edge.clients.process import Process, ProcessError
from lora_edge.errors import DataError, OptionError
from tests.support.commands import Cli
from tests.support.paths import ROOT

FEW = ("--processes", "1", "--steps", "1", "--threads", "1", "--tokens", "8")


def test_a_bundle_is_measured(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    file, drawn = tmp_path / "b.json", tmp_path / "b.svg"
    only = "decode,memory,load,batch,switch,files"
    done = cli(
        "bench", bundle, *FEW, "--only", only, "--against", "llama.cpp,merged", "--json", file,
        "--chart", drawn,
    )  # fmt: skip
    assert done.code == 0, done.err
    data = json.loads(file.read_text(encoding="utf-8"))
    schema = json.loads((ROOT / "lora_edge/reports/bench.schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(data, schema)
    figures = {figure["name"]: figure for figure in data["figures"]}
    assert set(figures) == {"decode", "pss", "private", "peak", "load", "batch", "switch", "files"}
    names = [entry["name"] for entry in figures["decode"]["entries"]]
    assert names == ["off", "off again", "on: echo", "pinned: echo"]
    assert len(set(data["about"])) == 5
    # One process has no spread: nothing but what is counted is judged.
    for name, figure in figures.items():
        verdicts = {entry["verdict"] for entry in figure["entries"][2:]}
        assert verdicts == ({"less"} if name == "files" else {"not resolved"}) or not verdicts
        assert all(entry["value"] > 0 for entry in figure["entries"])
    size = sum(path.stat().st_size for path in (bundle / "onnx").iterdir())
    assert figures["files"]["entries"][0]["costs"] == [size]
    assert re.search(r"^left out: llama\.cpp: it needs a GGUF file: --with ", done.out, re.M)
    assert re.search(r"^left out: merged: it needs a merged bundle: --with ", done.out, re.M)
    assert "nothing is resolved" in done.out
    assert drawn.read_text(encoding="utf-8").startswith("<svg")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--adapter", "nobody"), "has no adapter 'nobody'; it has echo"),
        (("--against", "nobody"), "'nobody' is nobody that a bundle is compared with"),
        (("--only", "nothing"), "'nothing' is no figure"),
        (("--tokens", "510"), "a prompt of 510 tokens and 36 new ones do not fit"),
        (("--with", "merged"), "'merged' is not NAME=DIR"),
        (("--cpu-time", "--threads", "2"), "give --threads 1"),
        (("--processes", "0"), "--processes"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    cli: Cli, bundle: Path, arguments: tuple[str, ...], said: str
) -> None:
    done = cli("bench", bundle, *arguments)
    assert done.code == 2
    assert said in done.err
    assert not done.out
    assert "Traceback" not in done.err


def test_a_bundle_that_generates_no_text_is_refused(tmp_path: Path) -> None:
    text = (ROOT / "tests/bundle/v1/encoder.json").read_text(encoding="utf-8")
    encoder = Bundle(tmp_path, Manifest.from_json(text))
    with pytest.raises(DataError, match="bench measures bundles that generate text"):
        standard_plan(encoder, Choices(), [])


def _given(bundle: Path, **more: Any) -> Given:
    return Given(load_bundle(bundle), "echo", 64, **more)


def test_everyone_who_lacks_something_says_what(bundle: Path, tmp_path: Path) -> None:
    reasons = {name: rival(name, _given(bundle)).reason for name in RIVALS}
    assert not reasons.pop("genai")  # it runs the bundle itself
    assert all(reason.startswith("it needs ") for reason in reasons.values()), reasons
    model = _given(bundle, files={"llama.cpp": "x.gguf"})
    assert rival("llama.cpp", model).reason == (
        "it needs its shared libraries: --with llama.cpp-library=DIR"
    )
    bare = rival("genai", _given(bundle, files={"genai": str(tmp_path)}))
    assert bare.reason == f"{tmp_path} has no genai_config.json"
    with pytest.raises(OptionError, match="nobody"):
        rival("nobody", _given(bundle))


def test_openvino_takes_the_adapters_own_file(bundle: Path, tmp_path: Path) -> None:
    peft = tmp_path / "echo"
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": False}

    def found(**changes: Any) -> Rival:
        peft.mkdir(exist_ok=True)
        (peft / "adapter_config.json").write_text(json.dumps(config | changes), encoding="utf-8")
        given = {"files": {"openvino": str(tmp_path)}, "peft": {"echo": str(peft)}}
        return rival("openvino", _given(bundle, **given))

    off, on = found().ways
    assert "lora" not in off.entry.given
    assert on.entry.given["lora"] == str(peft / "adapter_model.safetensors")
    assert on.entry.given["exact"] is True  # the bundle is in float32
    assert (off.computes, on.computes) == ("base", "adapter echo")
    assert on.entry.given["alpha"] == 2.0
    assert found(use_rslora=True).ways[1].entry.given["alpha"] == 4.0
    for other in ({"use_dora": True}, {"rank_pattern": {"q_proj": 8}}, {"peft_type": "IA3"}):
        assert found(**other).reason == f"it takes LoRA of one rank alone; {peft} is another"


def test_a_contestant_that_cannot_run_is_left_out_with_its_reason(bundle: Path) -> None:
    own = {"bundle": str(bundle)}
    takers = [Taker(x, x, "decode") for x in ("off", "off again", "llama.cpp", "odd", "other")]
    entries = [
        Entry("off", "bundle", own),
        Entry("off again", "bundle", own),
        Entry("llama.cpp", "llama.cpp", {"library": str(bundle), "file": "x.gguf", "room": 8}),
        Entry("odd", "bundle", {"bundle": str(bundle / "onnx")}),
        Entry("other", "bundle", own, python=str(bundle / "no-python")),
    ]
    plan = Plan(entries, [Figure("decode", "", "tokens/s", tuple(takers))], 10)
    said: list[str] = []
    ready = tried(plan, Settings(), said.append)
    assert [x.name for x in ready.figures[0].takers] == ["off", "off again"]
    assert ready.left_out["llama.cpp"] == f"{bundle} has no libllama"
    assert set(ready.runs) == {"off", "off again"}
    assert re.fullmatch(r"onnxruntime \d+\.\d+\.\d+.*", ready.runs["off"])
    assert "is not a bundle" in ready.left_out["odd"]
    assert "cannot be started" in ready.left_out["other"]
    assert len(said) == 3


def test_without_its_reference_nothing_is_measured(bundle: Path) -> None:
    entries = [Entry("off", "bundle", {"bundle": str(bundle / "onnx")})]
    figure = Figure("decode", "", "tokens/s", (Taker("off", "off", "decode"),))
    with pytest.raises(ProcessError, match=r"off: .* is not a bundle"):
        tried(Plan(entries, [figure], 10), Settings(), lambda _: None)


def test_a_process_that_dies_is_told_with_what_it_said(tmp_path: Path) -> None:
    dying = tmp_path / "python"
    dying.write_text(f"#!{sys.executable}\nimport sys; sys.exit('no memory left')\n")
    dying.chmod(0o755)
    with Process("off", [str(dying)]) as process, pytest.raises(ProcessError) as told:
        process.ask("memory")
    assert str(told.value) == "off: its process died: exit code 1; no memory left"


def test_the_plan_follows_what_the_bundle_holds(bundle: Path) -> None:
    opened = load_bundle(bundle)
    plan = standard_plan(opened, Choices("shout", tokens=8, steps=2), [])
    figures = {figure.name: figure for figure in plan.figures}
    assert list(figures) == [
        "start", "open", "decode", "pss", "private", "peak", "prefill 128", "long", "load", "batch",
        "switch", "files",
    ]  # fmt: skip
    assert set(plan.left_out) == {"prefill 1024"}  # the model has 512 positions
    assert figures["decode"].takers[2].adapters == ("shout",)
    mixed = figures["batch"].takers[2]
    assert set(mixed.adapters) == {"shout", "echo", "mirror", None}
    assert (len(mixed.adapters), figures["batch"].scale) == (8, 8)
    assert not figures["batch"].takers[0].together
    assert figures["switch"].takers[2].adapters == ("shout", "echo")
    assert chosen_adapter(opened, "") == "echo"
    assert set(FIGURES) == set(Choices().figures)
