"""The page: what it says, what it needs, and what a reader sees in a browser."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lora_edge.reports import Regression, html
from lora_edge.reports.words import verdict

Reports = dict[str, dict[str, Any]]
KINDS = ("good", "faulty", "unproved")
CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)
HOSTILE = "<script>alert(1)</script>\"'&"


class _Page(HTMLParser):
    """The text, tags and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in {"src", "href"}]

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_says_what_the_report_says(reports: Reports, kind: str) -> None:
    data = reports[kind]
    page = _Page(html(data))
    assert verdict(data) in page.text
    mark = {"good": "✓ passed", "faulty": "✗ not passed", "unproved": "? not proved"}[kind]
    assert mark in page.text
    for case in data["cases"]:
        assert case["name"] in page.text
        if case["reason"]:
            assert " ".join(case["reason"].split()) in page.text
    for value in (*data["versions"].values(), *data["machine"].values(), data["command"]):
        assert value in page.text


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_needs_nothing_else(reports: Reports, kind: str) -> None:
    text = html(reports[kind])
    page = _Page(text)
    assert page.links == []
    assert "script" not in page.tags
    assert "http" not in text.replace("http-equiv", "")


def test_names_are_text(reports: Reports) -> None:
    data = copy.deepcopy(reports["faulty"])
    data["adapters"] = [HOSTILE]
    for case in data["cases"]:
        case["name"] = case["reason"] = HOSTILE
        case["adapters"] = [HOSTILE] if case["adapters"] else []
    page = _Page(html(data))
    assert "script" not in page.tags
    assert HOSTILE in page.text


def test_layers_regressions_and_the_reproduction_are_shown(reports: Reports) -> None:
    data = copy.deepcopy(reports["faulty"])
    case = next(case for case in data["cases"] if case["status"] == "failed")
    paths = [f"model.layers.{index}.mlp.down_proj" for index in range(12)]
    case["layers"] = [
        {"path": path, "error": 1e-7 if i < 7 else 0.3, "floor": 1e-7, "limit": 1e-6}
        for i, path in enumerate(paths)
    ]
    data["repro"] = "repro/adapter-mirror"
    page = _Page(html(data, [Regression("cpu, all", "adapter echo", "adapter echo got worse")]))
    assert f"The first layer that differs is {paths[7]}" in page.text
    assert paths[3] in page.text
    assert paths[0] not in page.text  # far from where it begins
    assert "3 earlier layers agree with PyTorch's" in page.text
    assert f"{paths[7]} ← first" in page.text
    assert "adapter echo got worse" in page.text
    assert "repro/adapter-mirror" in page.text


def test_the_verdict_names_the_layer(reports: Reports) -> None:
    data = copy.deepcopy(reports["faulty"])
    case = next(c for c in reversed(data["cases"]) if c["status"] == "failed" and c["figures"])
    wrong = {"path": "model.layers.1.mlp", "error": None, "floor": 1e-7, "limit": 1e-6}
    case["layers"] = [{**wrong, "path": "model.layers.0.mlp", "error": 1e-7}, wrong]
    text = html(data)
    said = f"The first layer that differs is model.layers.1.mlp in the case {case['name']}."
    first = _Page(text[: text.index("</section>")]).text
    assert said in first
    assert "✗ not finite" in _Page(text).text  # NaN and Inf in its place


def test_the_page_can_be_heard_and_reached(reports: Reports) -> None:
    text = html(reports["faulty"])
    assert text.count('role="img" aria-labelledby="effect-title effect-desc"') == 1
    assert text.count('id="effect-title"') == text.count('id="effect-desc"') == 1
    assert text.count("<table>") == text.count('<div class="scroll" tabindex="0" role="region"') > 2
    for sign in ("✗ failed", "✓", "✗"):  # no verdict by its colour alone
        assert sign in text


def _colours(style: str) -> list[tuple[int, int, int]]:
    found = re.findall("#([0-9a-f]+);", style)
    assert len(found) == 8
    whole = ["".join(2 * digit for digit in text) if len(text) == 3 else text for text in found]
    return [(int(x[:2], 16), int(x[2:4], 16), int(x[4:], 16)) for x in whole]


def _luminance(colour: tuple[float, float, float]) -> float:
    parts = [c / 255 for c in colour]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out(reports: Reports, theme: str) -> None:
    """WCAG 2.2, 1.4.3: text at least 4.5 : 1, also on what the verdict and the heat map tint."""
    _, light, dark = html(reports["good"]).split(":root {")[:3]
    style = (light if theme == "light" else dark).split("}")[0]
    page, card, ink, soft, _, *states = _colours(style)
    tint = float(style.split("--tint:")[1].split("%")[0]) / 100
    heat = 60 * float(style.split("--heat:")[1].split("%")[0]) / 100  # a cell's largest weight
    pairs = [(text, ground) for text in (ink, soft) for ground in (page, card)]
    for state in states:
        pairs.append((state, card))
        for share, text in ((tint, state), (tint, soft), (heat, ink)):
            mixed = tuple(share * s + (1 - share) * c for s, c in zip(state, card, strict=True))
            pairs.append((text, mixed))
    for text, ground in pairs:
        bright, dim = sorted((_luminance(text), _luminance(ground)), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= 4.5, (text, ground)


def test_forty_adapters(reports: Reports) -> None:
    text = html(_many(reports["good"]))
    assert _Page(text).text.count("adapter-39") > 3
    assert len(text) < 2_000_000


def _many(data: dict[str, Any]) -> dict[str, Any]:
    many = copy.deepcopy(data)
    many["adapters"] = [f"adapter-{index:02}" for index in range(40)]
    own = [case for case in data["cases"] if case["adapters"] == ["echo"]]
    for name in many["adapters"]:
        for case in copy.deepcopy(own):
            case["adapters"] = [name]
            case["name"] = case["name"].replace("echo", name)
            many["cases"].append(case)
    return many


_PROBE = """<script>
addEventListener("load", () => {
  const box = document.getElementById("verdict").getBoundingClientRect();
  const texts = [...document.querySelectorAll("svg text")];
  const size = (node) => node.getBoundingClientRect().height;
  document.body.dataset.seen = JSON.stringify({
    width: innerWidth, height: innerHeight, scroll: document.documentElement.scrollWidth,
    bottom: box.bottom, smallest: Math.min(...texts.map(size)),
    outside: texts.filter((node) => {
      const own = node.getBoundingClientRect(), all = node.ownerSVGElement.getBoundingClientRect();
      return own.left < all.left - 1 || own.right > all.right + 1 || own.bottom > all.bottom + 1;
    }).length,
  });
});
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [360, 390, 1280])
@pytest.mark.parametrize("kind", [*KINDS, "many"])
def test_what_a_reader_sees(reports: Reports, kind: str, width: int, tmp_path: Path) -> None:
    data = _many(reports["good"]) if kind == "many" else reports[kind]
    # Headless Chromium has a least width of its own; a frame has none.
    inner = tmp_path / "page.html"
    inner.write_text(html(data).replace("</body>", _PROBE), encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(
        f"<iframe src='page.html' style='border:0;width:{width}px;height:844px'></iframe>"
        "<script>addEventListener('load', () => { const page = document.querySelector('iframe');"
        "document.body.append(page.contentDocument.body.dataset.seen); });</script>"
    )
    done = subprocess.run(
        [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--allow-file-access-from-files",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1400,1000",
            "--virtual-time-budget=5000",
            "--dump-dom",
            frame.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = done.stdout[done.stdout.index('{"width"') :]
    seen = json.loads(found[: found.index("}") + 1])
    assert seen["width"] == width
    assert seen["scroll"] <= width, "the page is wider than the screen"
    assert seen["bottom"] <= seen["height"], "the verdict is below the first screen"
    assert seen["smallest"] >= 8, "the chart's text cannot be read"
    assert seen["outside"] == 0, "the chart's text is cut off"
