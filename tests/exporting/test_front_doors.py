"""Bundles in optimum and sentence-transformers themselves: their answers, and what is refused."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
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
from tests.support.doors import MODES
from tests.support.encoders import load_encoder
from tests.support.paths import ROOT
from tests.support.seq2seq import ALL, give_words, make_seq2seq, make_seq2seq_adapter, optimum
from tests.support.shipped import ADAPTERS, BASE, BERT, CLASSIFIERS, PROMPTS

pytestmark = optimum
sentences = pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None,
    reason="needs sentence-transformers, which ci/venv optimum installs",
)
CLOSE = 1e-5
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

    @pytest.mark.parametrize("mode", MODES)
    def test_texts_that_are_padded_on_the_left(self, mode: str, made: Path) -> None:
        base, adapter, bundle = (made / "left" / name for name in ("base", "a", mode))
        model = in_onnx(bundle)
        lora_edge.set_adapter(model, "a")
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


def _ids(*rows: Sequence[int], left: int = 0) -> dict[str, torch.Tensor]:
    """Rows of token ids as tensors, padded on the left to one width."""
    width = max(map(len, rows))
    ids = [[left] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def _greedy(model: Any, given: dict[str, torch.Tensor]) -> list[list[int]]:
    found = model.generate(**given, max_new_tokens=12, do_sample=False)
    return [row.tolist() for row in found[:, given["input_ids"].shape[1] :]]


def _peft(name: str) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE)
    return PeftModel.from_pretrained(model, ADAPTERS[name]).eval()


def _logits(model: Any, given: dict[str, torch.Tensor]) -> NDArray[np.float32]:
    with torch.no_grad():
        return np.asarray(model(**given).logits)


class TestTextGeneration:
    @pytest.fixture(scope="class")
    def root(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        root = tmp_path_factory.mktemp("texts")
        shout = {"shout": ADAPTERS["shout"]}
        lora_edge.export(BASE, shout, "merged", root / "portable", form="portable")
        lora_edge.export(BASE, shout, "merged", root / "fused")
        alora = make_adapter(
            BASE, root / "a", r=4, target_modules=["q_proj"], alora_invocation_tokens=[97, 98]
        )
        lora_edge.export(BASE, {**ADAPTERS, "invoked": alora}, output=root / "switchable")
        return root

    def test_a_merged_portable_bundle_is_loaded_as_it_is(self, root: Path) -> None:
        """With rows padded on the left, as transformers generates."""
        runner = lora_edge.Runner(root / "portable")
        rows = [list(runner.tokenizer.encode(prompt)) for prompt in PROMPTS]
        model, reference = _load("CausalLM", root / "portable"), _peft("shout")
        for row in rows:
            given = _ids(row)
            found = _logits(model, given)
            np.testing.assert_allclose(found, _logits(reference, given), atol=1e-4)
            np.testing.assert_allclose(found, runner.logits([row]), atol=1e-4)
        given = _ids(*rows, left=256)
        found = _greedy(model, given)
        assert found == _greedy(reference, given)
        assert found != _greedy(_peft("echo"), given)
        own = runner.generate_ids(rows, max_new_tokens=12)
        assert [row[: len(one)] for row, one in zip(found, own, strict=True)] == own

    def test_a_fused_graph_needs_the_call(self, root: Path) -> None:
        model = _load("CausalLM", root / "fused")
        runner = lora_edge.Runner(root / "fused")
        rows = [list(runner.tokenizer.encode(prompt)) for prompt in PROMPTS]
        with pytest.raises(ValueError, match="num_logits_to_keep is required"):
            _greedy(model, _ids(rows[0]))
        lora_edge.set_adapter(model, "shout")
        reference = _peft("shout")
        for row in rows:
            given = _ids(row)
            np.testing.assert_allclose(_logits(model, given), _logits(reference, given), atol=1e-4)
            assert _greedy(model, given) == _greedy(reference, given)
        with pytest.raises(lora_edge.DataError, match="padded on the left"):
            _greedy(model, _ids(*rows, left=256))

    def test_a_switchable_bundle_is_switched(self, root: Path) -> None:
        model = _load("CausalLM", root / "switchable")
        runner = lora_edge.Runner(root / "switchable")
        row = list(runner.tokenizer.encode(PROMPTS[0]))
        with pytest.raises(ValueError, match=r"(lora\.|num_logits).* is required"):
            _greedy(model, _ids(row))
        seen = set()
        for choice in ("shout", "mirror", "echo", None, "shout"):
            lora_edge.set_adapter(model, choice)
            given = _ids(row)
            reference = _peft(choice or "echo")
            with reference.disable_adapter() if choice is None else contextlib.nullcontext():
                np.testing.assert_allclose(
                    _logits(model, given), _logits(reference, given), atol=1e-4
                )
            (found,) = _greedy(model, given)
            (own,) = runner.generate_ids([row], choice, max_new_tokens=12)
            assert found[: len(own)] == own
            seen.add(tuple(found))
        assert len(seen) == 4
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
    np.testing.assert_allclose(found, expected["letters"], atol=CLOSE * 10)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    own = [lora_edge.Runner(merged).logits([row])[0] for row in ids]
    np.testing.assert_allclose(found, own, atol=CLOSE * 10)
    model = _load("SequenceClassification", switchable)
    with pytest.raises(ValueError, match=r"lora\..* is required"):
        model(**given)
    pipe = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)
    runner = lora_edge.Runner(switchable)
    for name in ("claims", "letters", "claims"):
        lora_edge.set_adapter(pipe, name)
        np.testing.assert_allclose(_logits(model, given), expected[name], atol=CLOSE * 10)
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


def test_encoder_decoders(tmp_path: Path) -> None:
    base = make_seq2seq("t5", tmp_path / "base")
    give_words(base)
    adapter = make_seq2seq_adapter(base, tmp_path / "a", "t5", 1, r=5, target_modules=ALL["t5"])
    kind = transformers.AutoModelForSeq2SeqLM
    reference = PeftModel.from_pretrained(kind.from_pretrained(base), adapter).eval()
    given = _ids([5, 9, 13, 7, 1])
    start = torch.tensor([[0, 4, 8]])
    with torch.no_grad():
        expected = reference(**given, decoder_input_ids=start).logits.numpy()
    tokens = _generated(reference, given)
    for mode in ("merged", "switchable"):
        bundle = tmp_path / mode
        lora_edge.export(base, {"a": adapter}, mode, bundle, backend="optimum")  # type: ignore[arg-type]
        with pytest.raises(FileNotFoundError):
            _load("Seq2SeqLM", bundle)  # it looks for a graph with a cache
        model = _load("Seq2SeqLM", bundle, use_cache=False, use_merged=False)
        if mode == "switchable":
            with pytest.raises(ValueError, match=r"lora\..* is required"):
                model(**given, decoder_input_ids=start)
            lora_edge.set_adapter(model, "a")
        found = model(**given, decoder_input_ids=start).logits.numpy()
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert _generated(model, given) == tokens
        runner = lora_edge.Runner(bundle)
        (own,) = runner.generate_ids([given["input_ids"][0].tolist()], "a", max_new_tokens=8)
        assert tokens[1 : 1 + len(own)] == own
    lora_edge.set_adapter(model)
    off = model(**given, decoder_input_ids=start).logits.numpy()
    assert np.abs(off - expected).max() > 1e-2


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
