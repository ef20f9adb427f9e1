"""llama.cpp's library: it computes what PyTorch does, off and on; what is none is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from environments import llama_cpp_library
from made import Made
from numpy.typing import NDArray
from peft import PeftModel
from row import LackingError
from transformers import AutoModelForCausalLM

from lora_edge.bench.players.llama_cpp import LlamaCppPlayer
from lora_edge.bench.players.llama_library import LlamaLibrary, LlamaModel, LlamaSequence
from lora_edge.errors import ProviderError

TOKENS = [5, 200, 31, 7, 7, 99, 310, 2]


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        return llama_cpp_library()
    except LackingError as error:  # another processor than x86-64, or no npm
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def library(folder: Path) -> LlamaLibrary:
    return LlamaLibrary(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"), "tiny", lambda _: None)


def _torch(made: Made, *, on: bool) -> NDArray[np.float32]:
    model = AutoModelForCausalLM.from_pretrained(made.base())
    if on:
        model = PeftModel.from_pretrained(model, made.adapter(0))
    with torch.inference_mode():
        logits: NDArray[np.float32] = model(torch.tensor([TOKENS])).logits[0].numpy()
    return logits


def _apart(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


@pytest.mark.parametrize("exact", [True, False])
def test_it_computes_what_pytorch_does(
    library: LlamaLibrary, folder: Path, made: Made, *, exact: bool
) -> None:
    model, lora = made.gguf("fp32", folder)
    expected = {on: _torch(made, on=on) for on in (False, True)}
    effect = _apart(expected[True][-1], expected[False][-1])
    allowed = effect / (10_000 if exact else 30)  # attention and cache in float16 round
    for on, logits in expected.items():
        adapter = str(lora) if on else None
        sequence = LlamaSequence(LlamaModel(library, str(model), adapter), 256, 2, exact=exact)
        sequence.run(TOKENS[:-1])
        assert _apart(sequence.logits(), logits[-2]) < allowed
        sequence.run(TOKENS[-1:])
        assert _apart(sequence.logits(), logits[-1]) < allowed
        sequence.clear()
        sequence.run(TOKENS)
        assert _apart(sequence.logits(), logits[-1]) < allowed


def test_its_quantizer_makes_four_bits(library: LlamaLibrary, folder: Path, made: Made) -> None:
    whole, _ = made.gguf("fp32", folder)
    model, _ = made.gguf("int4", folder)
    assert model.stat().st_size < whole.stat().st_size / 3
    sequence = LlamaSequence(LlamaModel(library, str(model), None), 256, 1, exact=True)
    sequence.run(TOKENS)
    assert 0.001 < _apart(sequence.logits(), _torch(made, on=False)[-1]) < 0.5


def test_it_says_what_its_kernels_use(library: LlamaLibrary) -> None:
    said = library.about()
    assert said.startswith("llama.cpp 0.5.0")
    assert "AVX2 = 1" in said
    assert "REPACK = 1" in said


def test_more_than_there_is_room_for_is_refused(
    library: LlamaLibrary, folder: Path, made: Made
) -> None:
    model = LlamaModel(library, str(made.gguf("fp32", folder)[0]), None)
    sequence = LlamaSequence(model, 256, 1, exact=True)
    sequence.run(TOKENS * 32)
    with pytest.raises(ProviderError, match="llama_decode returned 1 for 1 tokens"):
        sequence.run([1])


def test_a_file_that_is_no_model_is_refused(library: LlamaLibrary, tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"no model")
    with pytest.raises(ProviderError, match=r"llama\.cpp cannot make .*x\.gguf: .*invalid magic"):
        LlamaModel(library, str(file), None)
    with pytest.raises(ProviderError, match=r"llama\.cpp cannot quantize .*x\.gguf"):
        library.quantize(file, tmp_path / "y.gguf", 2)


def test_a_function_that_a_release_lacks_is_named(library: LlamaLibrary) -> None:
    with pytest.raises(ProviderError, match=r"this build of llama\.cpp has no llama_nothing"):
        library.call("llama_nothing", None)


def test_a_folder_without_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "libllama-common.so").touch()
    with pytest.raises(ProviderError, match=f"^{tmp_path} has no libllama$"):
        LlamaLibrary(tmp_path)


@pytest.mark.parametrize("name", ["libllama.so", "libllama.v0.5.0.so", "libllama.so.0"])
def test_what_is_no_library_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no library")
    with pytest.raises(ProviderError, match=f"{name} cannot be loaded: "):
        LlamaLibrary(tmp_path)


def test_the_logits_that_are_compared_are_exact(folder: Path, made: Made) -> None:
    model, lora = made.gguf("fp32", folder)
    given = {"library": str(folder), "file": str(model), "lora": str(lora), "room": 256}
    expected, found = _torch(made, on=True)[-1], {}
    for exact in (False, True):
        player = LlamaCppPlayer({**given, "exact": exact, "threads": 1})
        player.imports()
        player.open()
        player.start("a", [TOKENS], ["a0"], 64)
        found[exact] = _apart(player.logits("a"), expected)
        player.step("a", [1])
    assert found[True] < 1e-5 < found[False]
    with pytest.raises(ProviderError, match="one row only"):
        player.start("b", [[1], [2]], ["a0", "a0"], 64)
