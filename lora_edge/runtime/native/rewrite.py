"""A graph with branches -> the same with ``LoraSum`` nodes in their place, for this device alone.

::

    q+k+v = MatMulNBits(x); q', k', v' = Split(q+k+v); q = q' + x A B; k = ...; v = ...

becomes ``q, k, v = Split(LoraSum(q+k+v, x, A, B, A, B, A, B))``, and an attention that alone reads
q, k and v reads the sum instead. Where a layer has a node of its own, ``LoraSum(y, x, A, B)``;
where a model has q, k and v in one layer, ``y + Concat(x A B, ...)`` becomes one such sum too.
Branches of any other kind (gates, DoRA, biases, embeddings, convolutions) stay as they are. Works
on the bytes of the file, of which all else is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from lora_edge.files.protobuf import (
    bytes_field,
    fields,
    messages,
    number,
    text,
    varint_field,
)
from lora_edge.names import parse_lora_input

DOMAIN, OPERATOR = "lora_edge", "LoraSum"

_MODEL_GRAPH, _MODEL_OPSETS = 7, 8
_NODE, _OUTPUT = 1, 12  # of a graph
_INPUTS, _OUTPUTS, _NAME, _OPERATOR, _ATTRIBUTE, _DOMAIN = 1, 2, 3, 4, 5, 7  # of a node
_GRAPHS = (6, 11)  # of an attribute
_LAST_AXIS = (1 << 64) - 1  # -1, as a varint has it
_ATTENTION = "GroupQueryAttention"


@dataclass
class Node:
    """A node of a graph.

    Attributes:
        operator: its operator.
        inputs: names of what it reads.
        outputs: names of what it makes.
        name: its name.
        domain: of the operator.
        attributes: each as it is in the file.
    """

    operator: str
    inputs: list[str]
    outputs: list[str]
    name: str = ""
    domain: str = ""
    attributes: list[bytes] = field(default_factory=list)

    def encoded(self) -> bytes:
        """The node as a field of a graph."""
        parts = [bytes_field(_INPUTS, x) for x in self.inputs]
        parts += [bytes_field(_OUTPUTS, x) for x in self.outputs]
        parts += [bytes_field(_NAME, self.name), bytes_field(_OPERATOR, self.operator)]
        parts += [bytes_field(_ATTRIBUTE, x) for x in self.attributes]
        if self.domain:
            parts.append(bytes_field(_DOMAIN, self.domain))
        return bytes_field(_NODE, b"".join(parts))


@dataclass(frozen=True)
class _Branch:
    """``sum = y + x A B``, or ``y + Concat(x A B, ...)``, and the nodes that make it."""

    y: str
    x: str
    factors: tuple[str, ...]  # A, B, A, B, ...
    nodes: tuple[Node, ...]  # the last is the sum


def with_native(model: bytes) -> bytes:
    """The graph with native sums wherever a branch is one pair and nothing else.

    Args:
        model: an ONNX file.

    Returns:
        The new file; the given one, where no branch is of that kind.
    """
    kept, graph = [], memoryview(b"")
    for part in fields(model):
        if part.number == _MODEL_GRAPH and part.value is not None:
            graph = part.value
        else:
            kept.append(bytes(part.whole))
    nodes, others, outputs = [], [], []
    for part in fields(graph):
        if part.number == _NODE and part.value is not None:
            nodes.append(_read(part.value))
            continue
        others.append(bytes(part.whole))
        if part.number == _OUTPUT and part.value is not None:
            outputs.append(text(part.value, 1))
    changed = _Graph(nodes, outputs).rewritten()
    if changed is None:
        return model
    whole = b"".join([*(node.encoded() for node in changed), *others])
    opset = bytes_field(1, DOMAIN) + varint_field(2, 1)
    return b"".join([*kept, bytes_field(_MODEL_OPSETS, opset), bytes_field(_MODEL_GRAPH, whole)])


def _read(data: memoryview) -> Node:
    node = Node("", [], [])
    for part in fields(data):
        content = b"" if part.value is None else bytes(part.value)
        if part.number == _INPUTS:
            node.inputs.append(content.decode())
        elif part.number == _OUTPUTS:
            node.outputs.append(content.decode())
        elif part.number == _NAME:
            node.name = content.decode()
        elif part.number == _OPERATOR:
            node.operator = content.decode()
        elif part.number == _ATTRIBUTE:
            node.attributes.append(content)
        elif part.number == _DOMAIN:
            node.domain = content.decode()
    return node


class _Graph:
    """The nodes of a graph, in their order, and who makes and reads what."""

    def __init__(self, nodes: list[Node], outputs: Sequence[str]) -> None:
        self._nodes = nodes
        self._makers = {name: node for node in nodes for name in node.outputs}
        self._outputs = outputs
        self._reads = _reads(nodes)
        self._reads.update(outputs)

    def rewritten(self) -> list[Node] | None:
        branches = {found.y: found for node in self._nodes if (found := self._branch(node))}
        if not branches:
            return None
        replaced: dict[int, list[Node]] = {}
        gone: set[int] = set()
        for node in self._nodes:
            own = [branches.get(name) for name in node.outputs]
            packed = self._packed(node, [x for x in own if x is not None])
            if packed:
                replaced[id(node)] = packed
                for branch in filter(None, own):
                    gone.update(map(id, branch.nodes))
                    del branches[branch.y]
        for branch in branches.values():
            total = branch.nodes[-1]
            replaced[id(total)] = [_sum(branch.y, total.outputs[0], [branch])]
            gone.update(map(id, branch.nodes[:-1]))
        kept: list[Node] = []
        for node in self._nodes:
            if id(node) in replaced:
                kept += replaced[id(node)]
            elif id(node) not in gone:
                kept.append(node)
        return _unsplit(kept, self._outputs)

    def _alone(self, name: str, operator: str) -> Node | None:
        """The node that makes a value, if it is of that operator and nobody else reads it."""
        node = self._makers.get(name)
        same = node is not None and (node.operator, node.domain) == (operator, "")
        return node if same and self._reads[name] == 1 else None

    def _branch(self, total: Node) -> _Branch | None:
        if (total.operator, total.domain) != ("Add", "") or self._reads[total.inputs[0]] != 1:
            return None
        y, added = total.inputs
        concat = self._alone(added, "Concat")
        if concat is not None and _axis(concat) != _LAST_AXIS:
            return None
        pairs = [self._pair(name) for name in ([added] if concat is None else concat.inputs)]
        found = [pair for pair in pairs if pair is not None]
        if len(found) < len(pairs) or len({x for x, _, _ in found}) > 1:
            return None
        nodes = [node for _, _, own in found for node in own]
        nodes += [] if concat is None else [concat]
        factors = tuple(name for _, names, _ in found for name in names)
        return _Branch(y, found[0][0], factors, (*nodes, total))

    def _pair(self, added: str) -> tuple[str, tuple[str, str], tuple[Node, Node]] | None:
        """``x``, (``A``, ``B``) and the nodes of ``x A B``."""
        up = self._alone(added, "MatMul")
        down = None if up is None else self._alone(up.inputs[0], "MatMul")
        if up is None or down is None:
            return None
        a, b = parse_lora_input(down.inputs[1]), parse_lora_input(up.inputs[1])
        if a is None or b is None or (a.part, b.part, a.path) != ("A", "B", b.path):
            return None
        return down.inputs[0], (down.inputs[1], up.inputs[1]), (down, up)

    def _packed(self, split: Node, branches: Sequence[_Branch]) -> list[Node]:
        """A node whose outputs have a branch each: one sum before it, for all of them."""
        if (split.operator, split.domain) != ("Split", "") or len(branches) < len(split.outputs):
            return []
        whole = split.inputs[0]
        maker = self._makers.get(whole)
        if _axis(split) != _LAST_AXIS or maker is None or self._reads[whole] != 1:
            return []
        if any(branch.x != maker.inputs[0] for branch in branches):
            return []
        made = _sum(whole, f"{whole}.summed", branches)
        names = [branch.nodes[-1].outputs[0] for branch in branches]
        given = [made.outputs[0], *split.inputs[1:]]
        return [made, Node("Split", given, names, split.name, "", split.attributes)]


def _axis(node: Node) -> int:
    return next((number(x, 3) for x in node.attributes if text(x, 1) == "axis"), 0)


def _sum(y: str, total: str, branches: Sequence[_Branch]) -> Node:
    pairs = [name for branch in branches for name in branch.factors]
    name = branches[0].nodes[-1].name
    return Node(OPERATOR, [y, branches[0].x, *pairs], [total], f"{name}.native", DOMAIN)


def _reads(nodes: Sequence[Node]) -> Counter[str]:
    """How often each value is read, by graphs within nodes too."""
    found = Counter(name for node in nodes for name in node.inputs)
    for node in nodes:
        for attribute in node.attributes:
            for place, graph in messages(attribute):
                if place in _GRAPHS:
                    found += _reads([_read(x) for n, x in messages(graph) if n == _NODE])
    return found


def _unsplit(nodes: list[Node], outputs: Sequence[str]) -> list[Node]:
    """Let an attention read the whole of q, k and v, where nobody else reads them."""
    reads = _reads(nodes)
    reads.update(outputs)
    splits = {tuple(node.outputs): node for node in nodes if node.operator == "Split"}
    gone = set()
    for node in nodes:
        read = tuple(node.inputs[:3])
        if node.operator == _ATTENTION and read in splits and all(reads[x] == 1 for x in read):
            split = splits[read]
            node.inputs[:3] = [split.inputs[0], "", ""]
            gone.add(id(split))
    return [node for node in nodes if id(node) not in gone]
