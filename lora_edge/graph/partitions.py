"""What of a graph phones' accelerators may take, by ONNX Runtime's usability checker.

The checker goes by tables of operators and by shapes; it runs nothing, on any machine.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple


class Partitions(NamedTuple):
    """What a provider may take of a graph.

    Attributes:
        provider: its short name.
        taken: nodes that it may take.
        nodes: nodes of the graph, after ONNX Runtime's basic optimizations.
        parts: in how many pieces; between two of them the CPU runs.
        left: operators of nodes that are left to the CPU.
    """

    provider: str
    taken: int
    nodes: int
    parts: int
    left: tuple[str, ...]

    def line(self) -> str:
        """In words."""
        pieces = "1 piece" if self.parts == 1 else f"{self.parts} pieces"
        left = f"; left over: {', '.join(self.left)}" if self.left else ""
        return f"{self.provider}: {self.taken} of {self.nodes} nodes, in {pieces}{left}"


def partitions(graph: Path) -> list[Partitions]:
    """What NNAPI and CoreML, as MLProgram, may take of a graph.

    Args:
        graph: an ONNX file; its data lies beside it.
    """
    from onnxruntime.tools.mobile_helpers import usability_checker as checker
    from onnxruntime.tools.onnx_model_utils import ModelProtoWithShapeInfo, optimize_model

    with tempfile.TemporaryDirectory(prefix="lora-edge-partitions-") as folder:
        basic = Path(folder) / graph.name
        optimize_model(graph, basic, use_external_initializers=True)
        model = ModelProtoWithShapeInfo(basic).model_with_shape_info
        nnapi = checker.check_nnapi_partitions(model, require_fixed_input_sizes=True)
        coreml = checker.check_coreml_partitions(
            model,
            require_fixed_input_sizes=True,
            config_filename="coreml_supported_mlprogram_ops.md",
        )
    return [
        Partitions(
            name,
            found.num_supported_nodes,
            found.num_nodes,
            found.num_partitions,
            tuple(sorted(x.removeprefix("ai.onnx:") for x in _left(found))),
        )
        for name, found in (("nnapi", nnapi), ("coreml", coreml))
    ]


def _left(found: Any) -> set[str]:
    return {*found.unsupported_ops, *found.ops_with_unsupported_rank}
