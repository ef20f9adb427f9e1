"""``lora-edge inspect --base`` compares with the model itself, and says what the export says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

import lora_edge
from lora_edge.base.checkpoint import resolve_base
from lora_edge.fit.inspect import Inspection, inspect_adapter
from tests.support.adapters import make_adapter
from tests.support.encoders import make_encoder
from tests.support.examples import examples
from tests.support.families import make_base
from tests.support.kinds import ROWS, make_kind, make_kind_base
from tests.support.norms import assert_norms_are_pefts

pytestmark = pytest.mark.skipif(
    transformers.__version__ < "5",
    reason="transformers 4 renames no keys, and has no stacked experts",
)
MODES = ("switchable", "merged")
IMAGES = "image-classification"


def _vit_adapter(base: Path, directory: Path, **settings: Any) -> Path:
    torch.manual_seed(1)
    model = transformers.AutoModelForImageClassification.from_pretrained(base)
    fields = {"r": 3, "lora_alpha": 4, "modules_to_save": ["classifier"], **settings}
    adapted = get_peft_model(model, LoraConfig(init_lora_weights=False, **fields))
    adapted.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A ViT whose checkpoint calls its layers otherwise than the model, and an adapter."""
    root = tmp_path_factory.mktemp("vit")
    base = make_encoder("vit", IMAGES, root / "base")
    targets = {"target_modules": ["q_proj", "fc1", "projection"], "use_dora": True}
    return base, _vit_adapter(base, root / "a", **targets)


def _agrees(base: Path, adapter: Path, directory: Path, **options: Any) -> Inspection:
    """What is told of each mode, and that the export does so."""
    found = inspect_adapter(adapter, resolve_base(base))
    assert found.compared == "model"
    for mode in MODES:
        output = directory / mode
        if found.modes[mode]:
            with pytest.raises(lora_edge.LoraEdgeError) as caught:
                lora_edge.export(base, {"adapter": adapter}, mode, output, **options)
            assert str(caught.value) in {x.message for x in found.modes[mode]}
            assert not output.exists()
        else:
            lora_edge.export(base, {"adapter": adapter}, mode, output, **options)
    return found


def test_a_checkpoint_with_other_names(vit: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = vit
    keys = resolve_base(base).keys()
    assert not any("q_proj" in key for key in keys), "transformers renames nothing any more"
    found = _agrees(base, adapter, tmp_path)
    assert found.modes == {"switchable": (), "merged": ()}
    assert found.saved["classifier.weight"].head
    model = transformers.AutoModelForImageClassification.from_pretrained(base)
    adapted = PeftModel.from_pretrained(model, adapter).base_model.model
    assert len(found.modules) == 5
    assert_norms_are_pefts(found, adapted)


def test_the_adapter_of_another_base_is_refused(vit: tuple[Path, Path], tmp_path: Path) -> None:
    _, adapter = vit
    other = make_encoder("vit", IMAGES, tmp_path / "other", hidden_size=48)
    found = _agrees(other, adapter, tmp_path)
    assert all(found.modes.values())
    bert = make_encoder("bert", "text-classification", tmp_path / "bert")
    assert all(inspect_adapter(adapter, resolve_base(bert)).modes.values())


@pytest.mark.parametrize(
    "name", examples(["embedding-and-head", "tokens", "alora"], ["embedding-and-head"])
)
def test_a_tied_head(name: str, tmp_path: Path) -> None:
    base = make_kind_base(ROWS[name].base, tmp_path / "base")
    adapter = make_kind(base, ROWS[name], tmp_path / "a")
    found = inspect_adapter(adapter, resolve_base(base))
    assert {mode: not reasons for mode, reasons in found.modes.items()} == {
        "switchable": True,
        "merged": ROWS[name].merged,
    }
    lora_edge.export(base, {"adapter": adapter}, output=tmp_path / "out")
    if name == "embedding-and-head":
        assert (found.modules["lm_head"].relative_norm or 0) > 0.1
    if name == "tokens":
        assert found.tokens["model.embed_tokens"].reaches == "lm_head"


def test_experts_are_compared_with_the_stacked_parameters(tmp_path: Path) -> None:
    fields = {"num_local_experts": 4, "num_experts_per_tok": 2}
    base = make_base("mixtral", tmp_path / "base", **fields)
    targets = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    adapter = make_adapter(base, tmp_path / "a", r=3, lora_alpha=4, **targets)
    found = inspect_adapter(adapter, resolve_base(base))
    assert [bool(found.modes[mode]) for mode in MODES] == [True, False]
    lora_edge.export(base, {"adapter": adapter}, "merged", tmp_path / "out")
    dense = make_base("llama", tmp_path / "dense")
    refused = inspect_adapter(adapter, resolve_base(dense)).modes["merged"]
    assert any("no stacked parameters" in reason.message for reason in refused)


def test_a_base_that_the_trace_refuses(tmp_path: Path) -> None:
    base = make_base("bloom", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "a", r=3, target_modules=["query_key_value"])
    found = inspect_adapter(adapter, resolve_base(base))
    assert any("trace backend refuses the base" in x and "alibi" in x for x in found.warnings)


def test_without_pytorch_the_names_are_compared(vit: tuple[Path, Path]) -> None:
    """The checkpoint's names are all that is left, and the output says so."""
    script = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'peft', 'onnx', 'onnxruntime'):\n"
        "    sys.modules[name] = None\n"
        "from lora_edge.cli import cli\n"
        "cli(sys.argv[1:], standalone_mode=False)\n"
    )
    base, adapter = vit

    def run(*arguments: str) -> str:
        command = [sys.executable, "-c", script, "inspect", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    facts = json.loads(run(str(adapter), "--base", str(base), "--json"))
    assert facts["compared"] == "names"
    text = " ".join(run(str(adapter), "--base", str(base)).split())
    assert "could not be built here for this task; transformers may call them otherwise" in text
    assert json.loads(run(str(adapter), "--json"))["compared"] is None
