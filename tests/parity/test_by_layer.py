"""A model runs layer by layer, its weights as the checkpoint has them, as one that was cast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from lora_edge.base.checkpoint import Base, resolve_base
from lora_edge.base.mapped import Mapped
from lora_edge.base.model import load_whole
from lora_edge.files import spilled
from lora_edge.maths.quantization import Quantization, quantize
from lora_edge.parity import by_layer
from lora_edge.parity.by_layer import ByLayer, decoded
from lora_edge.parity.peft_models import widened
from lora_edge.parity.plan.states import BASE, only
from lora_edge.parity.reference import Reference
from lora_edge.tasks.task import Task
from tests.support.encoders import make_encoder
from tests.support.families import make_base
from tests.support.seq2seq import make_seq2seq

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("text-generation", {"target_modules": "all-linear", "use_dora": True}),
    "gpt2": (
        "text-generation",
        {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True},
    ),
    "mixtral": ("text-generation", {"target_modules": ["q_proj"]}),
    "albert": ("text-classification", {"target_modules": ["query"]}),
    "bert": ("feature-extraction", {"target_modules": ["query"], "use_dora": True}),
    "vit": ("image-classification", {"target_modules": "all-linear"}),
    "t5": ("text2text-generation", {"target_modules": ["q", "wi"]}),
    "whisper": ("automatic-speech-recognition", {"target_modules": ["q_proj", "fc1"]}),
}


def _made(family: str, folder: Path, dtype: torch.dtype) -> Base:
    task = Task(CASES[family][0])
    if task.causal:
        made = make_base(family, folder)
    elif task.seq2seq:
        made = make_seq2seq(family, folder)
    else:
        made = make_encoder(family, task.name, folder)
    _cast(made, dtype)
    return resolve_base(made)


def _cast(folder: Path, dtype: torch.dtype) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    cast = {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}
    save_file(cast, file, {"format": "pt"})


def _adapted(base: Base, task: Task, settings: dict[str, Any], *, stored: bool) -> Any:
    config = transformers.AutoConfig.from_pretrained(base.directory)
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"  # the grouped operator takes no float64
    loaded = load_whole(base, task, config=config, stored=stored)
    torch.manual_seed(0)
    return get_peft_model(loaded, LoraConfig(r=4, init_lora_weights=False, **settings)).eval()


def _row(model: Any, task: Task) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    name = model.get_base_model().main_input_name
    if name == "pixel_values":
        size = model.config.image_size
        return {name: torch.randn(1, 3, size, size, generator=random)}
    row = {"input_ids": torch.tensor([[5, 9, 7, 8, 9]])}
    if name == "input_features":
        row = {name: torch.randn(1, 16, 40, generator=random)}
    return {**row, "decoder_input_ids": torch.tensor([[3, 8, 4]])} if task.seq2seq else row


def _run(model: Any, row: dict[str, torch.Tensor], dtype: torch.dtype) -> list[np.ndarray]:
    cast = {k: x.to(dtype) if x.is_floating_point() else x for k, x in row.items()}
    with torch.inference_mode():
        found = model.base_model(**cast)
    values = (found[0], *(x for x in found[1:] if isinstance(x, torch.Tensor)))
    return [x.numpy() for x in values]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", CASES)
def test_layer_by_layer_is_as_the_whole(
    family: str, stored: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, settings = CASES[family]
    task, base = Task(name), _made(family, tmp_path, stored)
    whole = _adapted(base, task, settings, stored=False)
    row = _row(whole, task)
    wanted = {torch.float32: _run(whole, row, torch.float32)}
    with widened(whole):
        wanted[torch.float64] = _run(whole, row, torch.float64)
    model = _adapted(base, task, settings, stored=True)
    mapped = Mapped(model, base.files)
    # What PEFT reads from an adapter's files, and would otherwise make of the base's weights.
    own = {name: x for name, x in whole.state_dict().items() if "lora_" in name}
    model.load_state_dict(own, strict=False)
    before = {name: (x.dtype, x.data_ptr(), x.clone()) for name, x in model.state_dict().items()}
    for parts in (False, True):
        if parts:  # several parts of each
            monkeypatch.setattr(by_layer, "_LARGE", 1)
            monkeypatch.setattr(by_layer, "_PART", 500)
            monkeypatch.setattr(spilled, "LEAST", 1)  # outputs in files
        layers = ByLayer(mapped, parts=parts)
        for dtype, outputs in wanted.items():
            held: list[int] = []

            def count(*_: Any, dtype: torch.dtype = dtype, held: list[int] = held) -> None:
                held.append(sum(x.numel() for x in model.parameters() if x.dtype == dtype))

            with layers.computing(model, dtype):
                leaves = [x for x in model.modules() if not list(x.children())]
                hooks = [x.register_forward_hook(count) for x in leaves]
                found = _run(model, row, dtype)
            for hook in hooks:
                hook.remove()
            for one, other in zip(outputs, found, strict=True):
                assert one.dtype == other.dtype
                close = 1e-5 if dtype == torch.float32 else 1e-13
                np.testing.assert_allclose(one, other, rtol=0, atol=close * np.abs(one).max())
            total = sum(x.numel() for x in model.parameters())
            if dtype == torch.float64 and family != "albert":  # its layers are one
                assert 0 < max(held) < total
    for name, value in model.state_dict().items():
        assert value.dtype == before[name][0]
        assert value.data_ptr() == before[name][1]
        assert torch.equal(value, before[name][2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_a_part_of_a_layer_runs_alone(dtype: torch.dtype, tmp_path: Path) -> None:
    """Before, after and without its layer; one that fails leaves nothing behind."""
    base = _made("llama", tmp_path, torch.bfloat16)
    model = load_whole(base, Task("text-generation"), stored=True)
    part, layer = model.model.layers[0].mlp, model.model.layers[0]
    before = {name: (x.dtype, x.data_ptr()) for name, x in model.state_dict().items()}
    row = {"input_ids": torch.tensor([[5, 9, 7]])}
    x = torch.randn(1, 3, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with ByLayer(Mapped(model, base.files)).computing(model, dtype), torch.inference_mode():
        first = part(x.to(dtype))
        model(**row)
        with pytest.raises(RuntimeError):
            layer(x.to(dtype)[..., :-1], position_embeddings=None)
        again = part(x.to(dtype))
        other = model.model.layers[1].mlp(x.to(dtype))
    assert first.dtype == again.dtype == other.dtype == dtype
    assert torch.equal(first, again)
    whole = load_whole(base, Task("text-generation")).to(dtype)
    with torch.inference_mode():
        assert torch.equal(first, whole.model.layers[0].mlp(x.to(dtype)))
        assert torch.equal(other, whole.model.layers[1].mlp(x.to(dtype)))
    assert before == {name: (x.dtype, x.data_ptr()) for name, x in model.state_dict().items()}


def test_matrices_are_the_files_own(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        base = _made("llama", tmp_path / str(dtype), dtype)
        model = load_whole(base, Task("text-generation"), stored=True)
        mapped = Mapped(model, base.files)
        for name, x in model.named_parameters():
            assert x.dtype == (dtype if x.ndim > 1 else torch.float32), name
            assert x.ndim == 1 or x in mapped, name
        assert all(x.dtype != torch.bfloat16 for x in model.buffers())
        assert torch.zeros(9, 9) not in mapped


def test_what_was_written_is_not_given_back(tmp_path: Path) -> None:
    """Its memory holds what the file does not."""
    base = resolve_base(make_base("llama", tmp_path, vocab_size=2048, hidden_size=64))
    model = load_whole(base, Task("text-generation"), stored=True)
    mapped = Mapped(model, base.files)
    weight = model.get_input_embeddings().weight
    before = weight.detach().clone()
    mapped.give_back(weight)
    assert torch.equal(weight, before)
    with torch.no_grad():
        weight.detach()[:] += 1
    assert weight not in mapped
    mapped.give_back(weight)
    assert torch.equal(weight, before + 1)


def test_what_was_rounded_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or else the whole checkpoint is in memory when all of it is codes."""
    monkeypatch.setattr(by_layer, "WHOLE", 0)
    base = _made("llama", tmp_path / "base", torch.bfloat16)
    given: list[int] = []
    monkeypatch.setattr(Mapped, "give_back", lambda _, tensor: given.append(id(tensor)))
    paths = tuple(f"model.layers.{i}.mlp.{x}_proj" for i in (0, 1) for x in ("up", "down"))
    reference = Reference(base)
    reference.round(Quantization(4, 32, paths))
    assert given == [id(reference._shared.get_submodule(path).weight) for path in paths]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(48, 64), (24, 40)])
def test_codes_are_decoded_as_they_mean(bits: int, shape: tuple[int, int]) -> None:
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    blocks = quantize(weight, bits)
    np.testing.assert_array_equal(decoded(blocks).numpy(), blocks.weight())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bits", [None, 4])
def test_the_reference_of_a_large_model_is_as_of_a_small_one(
    stored: torch.dtype, bits: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter beside others, one that stands apart, and both dtypes that are computed in."""
    base = _made("llama", tmp_path / "base", stored)
    own: dict[str, dict[str, Any]] = {
        "plain": {"target_modules": "all-linear"},
        "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "table": {"target_modules": ["embed_tokens", "lm_head", "o_proj"], "use_dora": True},
    }
    for name, settings in own.items():
        loaded = load_whole(base, Task("text-generation"))
        torch.manual_seed(1)
        made = get_peft_model(loaded, LoraConfig(r=3, init_lora_weights=False, **settings))
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) * 0.02
        made.save_pretrained(tmp_path / name, save_embedding_layers=False)
    layers = [f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qo"]
    rounding = None if bits is None else Quantization(bits, 32, tuple(layers))

    def outputs() -> dict[str, np.ndarray]:
        reference = Reference(base, quantization=rounding)
        for name in own:
            reference.attach(name, tmp_path / name)
        found = {}
        for name, state in {"base": BASE, **{x: only(x) for x in own}}.items():
            found[name] = reference.logits([(5, 9, 7, 200)], [state])[0]
            with reference.wide():
                found[f"wide {name}"] = reference.logits([(5, 9, 7, 200)], [state])[0]
        found["again"] = reference.logits([(5, 9, 7, 200)], [BASE])[0]
        return found

    small = outputs()
    monkeypatch.setattr(by_layer, "WHOLE", 0)
    plain: dict[str, np.ndarray] = {}
    for parts, least in ((1 << 20, 1 << 20), (1, 1 << 20), (1, 1)):
        monkeypatch.setattr(by_layer, "_LARGE", parts)
        monkeypatch.setattr(spilled, "LEAST", least)
        large = outputs()
        if least == 1:  # outputs and codes in files, which is no affair of their values
            for name, wanted in plain.items():
                np.testing.assert_array_equal(large[name], wanted)
            assert spilled._place(large["base"]) is not None or not spilled._SPILLS
        plain = large
        for name, wanted in small.items():
            assert large[name].dtype == wanted.dtype
            close = 1e-12 if wanted.dtype == np.float64 else 1e-5
            np.testing.assert_allclose(large[name], wanted, rtol=0, atol=close)
        np.testing.assert_array_equal(large["base"], large["again"])
