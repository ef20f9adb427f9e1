"""Bundles in optimum and sentence-transformers themselves: their answers, and what is refused."""

from __future__ import annotations

import importlib.util
import itertools
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from peft import PeftModel

import lora_edge
from tests.support.adapters import make_adapter
from tests.support.commands import exit_code
from tests.support.doors import MODES, Mode
from tests.support.encoders import load_encoder
from tests.support.families import make_base
from tests.support.paths import ROOT
from tests.support.seq2seq import ALL, give_words, make_seq2seq, make_seq2seq_adapter, optimum
from tests.support.shipped import BERT, CLASSIFIERS

pytestmark = optimum
sentences = pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None,
    reason="needs sentence-transformers, which ci/venv optimum installs",
)
CLOSE, STEPS = 1e-5, 12
TEXTS = ["Hello river WORD", "the quick word: river", "lemon", "stone and more and more words " * 9]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles of BERT and of an embedding Llama, exported with transformers 5."""
    python = ROOT / ".venv" / "bin" / "python"
    if not python.exists():
        pytest.skip("needs .venv (ci/venv), in which BERT is exported")
    root = tmp_path_factory.mktemp("doors")
    command = [python, "-m", "tests.support.doors", root]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return root


def in_pytorch(base: Path, adapter: Path | None = None, modules: Path | None = None) -> Any:
    """sentence-transformers on PyTorch, with an adapter merged by PEFT."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(modules or base), device="cpu", backend="torch")
    if adapter is not None:
        adapted = PeftModel.from_pretrained(load_encoder(base, "feature-extraction"), adapter)
        model[0].model = adapted.merge_and_unload()
        assert model[0].auto_model is model[0].model
    return model


def in_onnx(bundle: Path) -> Any:
    """The same on a bundle."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(bundle), device="cpu", backend="onnx")


@sentences
class TestSentenceTransformers:
    @pytest.fixture(scope="class")
    def root(self, made: Path) -> Path:
        return made / "sentences"

    def test_a_merged_bundle_is_loaded_as_it_is(self, root: Path) -> None:
        model, reference = in_onnx(root / "merged"), in_pytorch(root / "base", root / "one")
        runner = lora_edge.Runner(root / "merged")
        for name in (None, "query"):
            found = model.encode(TEXTS, prompt_name=name)
            assert found.shape == (4, 256)
            np.testing.assert_allclose(found, runner.embed(TEXTS, prompt_name=name), atol=CLOSE)
            expected = reference.encode(TEXTS, prompt_name=name)
            np.testing.assert_allclose(found, expected, atol=CLOSE)
        plain = model.encode(TEXTS)
        np.testing.assert_allclose(np.linalg.norm(plain, axis=1), 1, atol=CLOSE)
        assert np.abs(plain - model.encode(TEXTS, prompt_name="query")).max() > 1e-3
        assert np.abs(plain - in_pytorch(root / "base").encode(TEXTS)).max() > 1e-3

    def test_a_switchable_bundle_is_switched(self, root: Path) -> None:
        model = in_onnx(root / "switchable")
        with pytest.raises(ValueError, match=r"lora\..* is required"):
            model.encode(TEXTS)  # never the base in silence
        runner = lora_edge.Runner(root / "switchable")
        seen = []
        for choice in ("one", "two", None, {"one": 0.5, "two": 0.25}, "one"):
            lora_edge.set_adapter(model, choice)
            found = model.encode(TEXTS)
            np.testing.assert_allclose(found, runner.embed(TEXTS, choice), atol=CLOSE)
            if not isinstance(choice, dict):
                adapter = root / choice if choice else None
                expected = in_pytorch(root / "base", adapter).encode(TEXTS)
                np.testing.assert_allclose(found, expected, atol=CLOSE)
            seen.append(found)
        np.testing.assert_array_equal(seen[0], seen[-1])
        for one, other in itertools.combinations(seen[:-1], 2):
            assert np.abs(one - other).max() > 1e-3

    def test_what_is_refused_leaves_the_adapter(self, root: Path) -> None:
        model = in_onnx(root / "switchable")
        lora_edge.set_adapter(model, "two")
        before = model.encode(TEXTS)
        with pytest.raises(lora_edge.AdapterNotFoundError, match="no adapter 'three'"):
            lora_edge.set_adapter(model, "three")
        with pytest.raises(lora_edge.DataError, match="own sentence-transformers files"):
            lora_edge.set_adapter(model, "own")
        np.testing.assert_array_equal(model.encode(TEXTS), before)
        with pytest.raises(lora_edge.AdapterNotFoundError, match="a merged bundle runs its one"):
            lora_edge.set_adapter(in_onnx(root / "merged"), {"one": 0.5})

    def test_the_modules_of_a_merged_adapter_are_the_bundles(
        self, root: Path, tmp_path: Path
    ) -> None:
        found = in_onnx(root / "own-merged").encode(TEXTS)
        runner = lora_edge.Runner(root / "own-merged")
        np.testing.assert_allclose(found, runner.embed(TEXTS), atol=CLOSE)
        modules = Path(shutil.copytree(BERT, tmp_path / "modules"))
        not_peft = shutil.ignore_patterns("adapter_*")
        shutil.copytree(root / "own", modules, ignore=not_peft, dirs_exist_ok=True)
        expected = in_pytorch(root / "base", root / "own", modules).encode(TEXTS)
        np.testing.assert_allclose(found, expected, atol=CLOSE)
        assert found.shape == (4, 128)

    def test_texts_that_are_padded_on_the_left(self, made: Path) -> None:
        base, adapter, bundle = (made / "left" / name for name in ("base", "a", "merged"))
        model = in_onnx(bundle)
        found = model.encode(TEXTS[:3])
        reference = in_pytorch(base, adapter)
        assert reference.tokenizer.padding_side == "left"
        np.testing.assert_allclose(found, reference.encode(TEXTS[:3]), atol=CLOSE)
        own = lora_edge.Runner(bundle).embed(TEXTS[:3], "a")
        np.testing.assert_allclose(found, own, atol=CLOSE)


def _load(kind: str, bundle: Path, **options: Any) -> Any:
    """``ORTModelFor….from_pretrained``."""
    from optimum import onnxruntime as doors

    return getattr(doors, f"ORTModelFor{kind}").from_pretrained(bundle, **options)


def _ids(*rows: Sequence[int]) -> dict[str, torch.Tensor]:
    """Rows of token ids as tensors, padded on the left to one width."""
    width = max(map(len, rows))
    ids = [[0] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def _greedy(model: Any, given: dict[str, torch.Tensor]) -> list[list[int]]:
    found = model.generate(**given, max_new_tokens=STEPS, do_sample=False, pad_token_id=0)
    return [row.tolist() for row in found[:, given["input_ids"].shape[1] :]]


def _logits(model: Any, given: dict[str, torch.Tensor]) -> NDArray[np.float32]:
    with torch.no_grad():
        return np.asarray(model(**given).logits)


ROWS = [[5, 9, 13, 7], [17, 40, 3, 99, 120, 8, 8], [61], [200, 4, 77, 31, 18]]
EVEN = ([ROWS[0]], [ROWS[1]], [ROWS[0], ROWS[0][::-1]])


class TestTextGeneration:
    @pytest.fixture(scope="class")
    def root(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        root = tmp_path_factory.mktemp("texts")
        # optimum takes it for granted that heads are hidden_size / num_attention_heads wide.
        base = make_base("llama", root / "base", head_dim=16, eos_token_id=None)
        adapters = {
            name: make_adapter(base, root / name, seed, r=4, target_modules=targets)
            for seed, (name, targets) in enumerate(
                {"one": ["q_proj", "down_proj"], "two": ["v_proj", "o_proj"]}.items()
            )
        }
        one = {"one": adapters["one"]}
        lora_edge.export(base, one, "merged", root / "portable", form="portable")
        adapters["invoked"] = make_adapter(
            base, root / "a", r=4, target_modules=["q_proj"], alora_invocation_tokens=[97, 98]
        )
        lora_edge.export(base, adapters, output=root / "switchable")
        return root

    def peft(self, root: Path, name: str | None) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(root / "base")
        return (
            model.eval() if name is None else PeftModel.from_pretrained(model, root / name).eval()
        )

    def test_a_merged_portable_bundle_is_loaded_as_it_is(self, root: Path) -> None:
        """With rows padded on the left, as transformers generates."""
        runner = lora_edge.Runner(root / "portable")
        model, reference = _load("CausalLM", root / "portable"), self.peft(root, "one")
        for row in ROWS:
            given = _ids(row)
            found = _logits(model, given)
            np.testing.assert_allclose(found, _logits(reference, given), rtol=CLOSE, atol=CLOSE)
            np.testing.assert_allclose(found, runner.logits([row]), rtol=CLOSE, atol=CLOSE)
        given = _ids(*ROWS)
        found = _greedy(model, given)
        assert found == _greedy(reference, given) == runner.generate_ids(ROWS, None, STEPS)
        assert found != _greedy(self.peft(root, None), given)

    @pytest.mark.long
    def test_a_merged_fused_bundle_needs_the_call(self, root: Path) -> None:
        one = {"one": root / "one"}
        lora_edge.export(root / "base", one, "merged", root / "fused")
        model = _load("CausalLM", root / "fused")
        with pytest.raises(ValueError, match="num_logits_to_keep is required"):
            _greedy(model, _ids(ROWS[0]))
        lora_edge.set_adapter(model, "one")
        reference = self.peft(root, "one")
        for rows in EVEN:
            given = _ids(*rows)
            np.testing.assert_allclose(
                _logits(model, given), _logits(reference, given), rtol=CLOSE, atol=CLOSE
            )
            assert _greedy(model, given) == _greedy(reference, given)

    def test_a_switchable_bundle_is_switched(self, root: Path) -> None:
        model = _load("CausalLM", root / "switchable")
        runner = lora_edge.Runner(root / "switchable")
        with pytest.raises(ValueError, match=r"(lora\.|num_logits).* is required"):
            _greedy(model, _ids(ROWS[1]))
        seen = set()
        for choice, rows in zip(("one", "two", None, "one"), (*EVEN, EVEN[0]), strict=True):
            lora_edge.set_adapter(model, choice)
            reference, given = self.peft(root, choice), _ids(*rows)
            expected = _logits(reference, given)
            np.testing.assert_allclose(_logits(model, given), expected, rtol=CLOSE, atol=CLOSE)
            found = _greedy(model, given)
            assert found == _greedy(reference, given)
            assert found == runner.generate_ids(rows, choice, STEPS)
            seen.add(str(_greedy(model, _ids(ROWS[1]))))
        assert len(seen) == 3
        with pytest.raises(lora_edge.DataError, match="padded on the left"):
            _greedy(model, _ids(*ROWS))
        many = {**_ids(ROWS[0], ROWS[0]), "past_key_values": model(**_ids(ROWS[0], ROWS[0]))[1]}
        many["attention_mask"] = torch.ones(2, 8, dtype=torch.long)
        with pytest.raises(lora_edge.DataError, match="2 rows of 4 new tokens stand behind a past"):
            model(**many)
        with pytest.raises(lora_edge.DataError, match="invoked is an aLoRA"):
            lora_edge.set_adapter(model, "invoked")


def test_labels(made: Path) -> None:
    """The classifiers that ship, and their names in a pipeline."""
    merged, switchable = (made / "labels" / mode for mode in MODES)
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    texts = ["stone=enots", "stone=STONE and more"]
    given = tokenizer(texts, padding=True, return_tensors="pt")
    counts = {"claims": 2, "letters": 4}
    expected = {}
    for name, count in counts.items():
        base = load_encoder(BERT, "text-classification", count)
        expected[name] = _logits(PeftModel.from_pretrained(base, CLASSIFIERS[name]).eval(), given)
    model = _load("SequenceClassification", merged)
    found = _logits(model, given)
    np.testing.assert_allclose(found, expected["letters"], rtol=CLOSE, atol=CLOSE)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    own = [lora_edge.Runner(merged).logits([row])[0] for row in ids]
    np.testing.assert_allclose(found, own, rtol=CLOSE, atol=CLOSE)
    model = _load("SequenceClassification", switchable)
    with pytest.raises(ValueError, match=r"lora\..* is required"):
        model(**given)
    pipe = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)
    runner = lora_edge.Runner(switchable)
    for name in ("claims", "letters", "claims"):
        lora_edge.set_adapter(pipe, name)
        np.testing.assert_allclose(_logits(model, given), expected[name], rtol=CLOSE, atol=CLOSE)
        labels = [row[0].label for row in runner.classify(texts, adapter=name)]
        assert [x["label"] for x in pipe(texts)] == labels
    with pytest.raises(lora_edge.DataError, match="no task head"):
        lora_edge.set_adapter(model)


def test_features(made: Path) -> None:
    root = made / "sentences"
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "merged")
    given = tokenizer(TEXTS[:3], padding=True, return_tensors="pt")
    base = load_encoder(root / "base", "feature-extraction")
    reference = PeftModel.from_pretrained(base, root / "one").eval()
    with torch.no_grad():
        expected = reference(**given).last_hidden_state.numpy()
    there = given["attention_mask"].numpy().astype(bool)
    own = lora_edge.Runner(root / "merged").logits(
        given["input_ids"].tolist(), attention_mask=given["attention_mask"].numpy()
    )
    for bundle in ("merged", "switchable"):
        model = _load("FeatureExtraction", root / bundle)
        lora_edge.set_adapter(model, "one")
        found = model(**given).last_hidden_state.numpy()
        np.testing.assert_allclose(found[there], expected[there], atol=CLOSE)
        np.testing.assert_allclose(found[there], own[there], atol=CLOSE)
    with pytest.warns(UserWarning, match="'own' brings its own sentence-transformers files"):
        lora_edge.set_adapter(model, "own")
    model.use_io_binding = True
    with pytest.raises(lora_edge.DataError, match="IO binding"):
        model(**given)


@pytest.mark.parametrize("mode", ["merged", pytest.param("switchable", marks=pytest.mark.long)])
def test_encoder_decoders(mode: Mode, tmp_path: Path) -> None:
    base = make_seq2seq("t5", tmp_path / "base")
    give_words(base)
    adapter = make_seq2seq_adapter(base, tmp_path / "a", "t5", 1, r=5, target_modules=ALL["t5"])
    kind = transformers.AutoModelForSeq2SeqLM
    reference = PeftModel.from_pretrained(kind.from_pretrained(base), adapter).eval()
    given, start = _ids([5, 9, 13, 7, 1]), torch.tensor([[0, 4, 8]])
    with torch.no_grad():
        expected = reference(**given, decoder_input_ids=start).logits.numpy()
        off = kind.from_pretrained(base)(**given, decoder_input_ids=start).logits.numpy()
    tokens = _generated(reference, given)
    bundle = tmp_path / mode
    lora_edge.export(base, {"a": adapter}, mode, bundle, backend="optimum")
    with pytest.raises(FileNotFoundError):
        _load("Seq2SeqLM", bundle)  # it looks for a graph with a cache
    model = _load("Seq2SeqLM", bundle, use_cache=False, use_merged=False)
    if mode == "switchable":
        with pytest.raises(ValueError, match=r"lora\..* is required"):
            model(**given, decoder_input_ids=start)
    lora_edge.set_adapter(model, "a")
    found = model(**given, decoder_input_ids=start).logits.numpy()
    np.testing.assert_allclose(found, expected, rtol=CLOSE, atol=CLOSE)
    assert np.abs(off - expected).max() > 1e-2
    assert _generated(model, given) == tokens
    runner = lora_edge.Runner(bundle)
    (own,) = runner.generate_ids(given["input_ids"].tolist(), "a", max_new_tokens=8)
    assert tokens[1 : 1 + len(own)] == own
    if mode == "switchable":
        lora_edge.set_adapter(model)
        found = model(**given, decoder_input_ids=start).logits.numpy()
        np.testing.assert_allclose(found, off, rtol=CLOSE, atol=CLOSE)


def _generated(model: Any, given: dict[str, torch.Tensor]) -> list[int]:
    found = model.generate(**given, max_new_tokens=8, do_sample=False, num_beams=1)
    tokens: list[int] = found[0].tolist()
    return tokens


def test_other_models_are_refused(made: Path, tmp_path: Path) -> None:
    merged, switchable = (made / "sentences" / mode for mode in MODES)
    with pytest.raises(lora_edge.OptionError, match="model is a Linear, expected one with a"):
        lora_edge.set_adapter(torch.nn.Linear(2, 2), "one")
    alone = tmp_path / "alone"
    shutil.copytree(merged / "onnx", alone / "onnx")
    shutil.copy(merged / "config.json", alone)
    with pytest.raises(lora_edge.OptionError, match=r"model\.onnx, which is in no bundle"):
        lora_edge.set_adapter(_load("FeatureExtraction", alone), "one")
    damaged = Path(shutil.copytree(switchable, tmp_path / "damaged"))
    model = _load("FeatureExtraction", damaged)
    with (damaged / "adapters/one/adapter.onnx_adapter").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    with pytest.raises(lora_edge.BundleError, match="differs from its hash"):
        lora_edge.set_adapter(model, "one")


@pytest.mark.long
def test_the_lines_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What docs/libraries.md shows for optimum, line by line."""
    text = (ROOT / "docs" / "libraries.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S)
    shell, python = (body for _, body in blocks if "shouting" in body)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    assert exit_code(shlex.split(shell)[1:]) == 0
    exec(compile(python, "docs/libraries.md", "exec"), {})
    assert "RIVER!" in capsys.readouterr().out
