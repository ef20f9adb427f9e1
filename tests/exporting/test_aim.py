from __future__ import annotations

from typing import Any

import pytest

from lora_edge.errors import OptionError
from lora_edge.exporting.aim import advice, aimed_at, check_task, form_for, shapes_for
from lora_edge.exporting.options import Shapes
from lora_edge.targets.table import TARGETS, target


@pytest.mark.parametrize(
    ("names", "asked", "form"),
    [
        ([], None, "fused"),
        ([], "portable", "portable"),
        (["cpu"], None, "fused"),
        (["genai", "web", "node", "transformers.js", "mobile"], None, "fused"),
        (["node"], "portable", "portable"),
        (["webgpu"], None, "portable"),
        (["coreml", "genai"], None, "portable"),
        (["genai", "openvino"], "portable", "portable"),
        (["cuda", "tensorrt", "xnnpack"], None, "fused"),
        (["cuda"], "portable", "portable"),
        (["cuda", "webgpu"], None, "portable"),
    ],
)
def test_the_form_is_one_that_all_take(names: list[str], asked: Any, form: str) -> None:
    assert form_for(aimed_at(names), asked, "trace", "fp32") == form


def test_targets_are_taken_once_and_by_either_name() -> None:
    assert aimed_at(["cpu", "CPUExecutionProvider", "genai"]) == (target("cpu"), target("genai"))


@pytest.mark.parametrize("known", TARGETS, ids=lambda known: known.name)
def test_what_takes_fixed_shapes_only_gets_them_and_nothing_else(known: Any) -> None:
    aims = aimed_at([known.name])
    assert aims == (known,)
    shapes = shapes_for(aims, False, None, None, None)
    assert shapes == (Shapes() if known.dynamic_shapes is False else None)
    if shapes is not None:
        assert form_for(aims, None, "trace", "fp32", fixed=True) == "portable"


def test_fixed_shapes_are_of_the_portable_form() -> None:
    assert shapes_for((), True, 8, None, 4) == Shapes(8, None, 4)
    assert shapes_for(aimed_at(["qnn"]), False, None, 48, None) == Shapes(None, 48, None)
    assert form_for((), None, "trace", "fp32", fixed=True) == "portable"
    assert form_for(aimed_at(["cpu", "genai"]), None, "trace", "fp32", fixed=True) == "portable"
    with pytest.raises(OptionError, match="--form fused is not for --static"):
        form_for((), "fused", "trace", "fp32", fixed=True)
    with pytest.raises(OptionError, match="past is 48, expected none but"):
        shapes_for(aimed_at(["cpu"]), False, None, 48, None)


def test_targets_without_a_form_in_common_are_refused() -> None:
    fused = target("genai")._replace(forms=("fused",))
    with pytest.raises(OptionError, match="coreml takes --form portable, genai takes --form fused"):
        form_for((target("coreml"), fused), None, "trace", "fp32")


def test_few_bits_are_for_targets_of_the_fused_form() -> None:
    assert form_for(aimed_at(["genai", "web"]), None, "trace", "int4") == "fused"
    assert form_for(aimed_at(["webgpu"]), None, "trace", "fp16") == "portable"
    with pytest.raises(OptionError, match=r"webgpu takes the portable form, .* int8"):
        form_for(aimed_at(["genai", "webgpu"]), None, "trace", "int8")


def test_a_target_of_one_task_refuses_others() -> None:
    check_task(aimed_at(["genai", "cpu"]), "text-generation")
    check_task(aimed_at(["node"]), "text-classification")
    with pytest.raises(OptionError, match=r"genai runs text-generation only.* text-classification"):
        check_task(aimed_at(["cpu", "genai"]), "text-classification")


def test_merging_is_advised_where_weights_must_be_constant() -> None:
    assert advice(aimed_at(["cpu", "genai"]), "switchable") == []
    assert advice(aimed_at(["xnnpack"]), "merged") == []
    (line,) = advice(aimed_at(["xnnpack", "cpu"]), "switchable")
    assert line.startswith("xnnpack multiplies by constant weights only: --mode merged")
