"""How bundles, adapters, graphs and runtimes are broken. Each makes one mistake and no other."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import safetensors.numpy as st
from onnx import helper, numpy_helper

import lora_edge
from lora_edge.adapter.load import load_adapter
from lora_edge.bundle.bundle import load_bundle
from lora_edge.bundle.onnx_adapter import read_adapter, write_adapter
from lora_edge.names import lora_input
from lora_edge.runtime.adapters.binding import Binding, Tensors, TokenGates
from lora_edge.runtime.adapters.snapshot import Snapshot
from lora_edge.runtime.caches import ConcatenatedCache, SharedCache
from lora_edge.runtime.decoding import Decoding
from lora_edge.runtime.encoder import Encoder

Arrays = dict[str, np.ndarray]
Injection = Callable[[Path], None]
"""Breaks a bundle's folder."""

Patch = Callable[[], AbstractContextManager[Any]]
"""Breaks the runtime for as long as it is entered."""


# Adapter files.


def of_file(adapter: str, edit: Callable[[Arrays], Arrays]) -> Injection:
    """Rewrite an adapter's tensors."""

    def inject(directory: Path) -> None:
        path = adapter_file(directory, adapter)
        with np.errstate(over="ignore"):
            write_adapter(path, edit(read_adapter(path)))

    return inject


def adapter_file(directory: Path, adapter: str) -> Path:
    return directory / "adapters" / adapter / "adapter.onnx_adapter"


def times(factor: float, pattern: str = r"\.B$") -> Callable[[Arrays], Arrays]:
    """Multiply the tensors whose names match."""
    return lambda own: {
        key: value * np.float32(factor) if re.search(pattern, key) else value
        for key, value in own.items()
    }


def each(change: Callable[[np.ndarray], np.ndarray], pattern: str) -> Callable[[Arrays], Arrays]:
    """Change the tensors that match and do something."""
    return lambda own: {
        key: change(value) if re.search(pattern, key) and value.any() else value
        for key, value in own.items()
    }


def rooted_scaling(own: Arrays) -> Arrays:
    """alpha / sqrt(r) at each site."""
    return {k: v * np.float32(len(v) ** 0.5) if k.endswith(".B") and v.size else v
            for k, v in own.items()}  # fmt: skip


def plain_scaling(own: Arrays) -> Arrays:
    """alpha / r at each site."""
    return {k: v / np.float32(len(v) ** 0.5) if k.endswith(".B") and v.size else v
            for k, v in own.items()}  # fmt: skip


def swapped_factors(own: Arrays) -> Arrays:
    """Bᵀ for A and Aᵀ for B, which square layers do not notice."""
    changed = dict(own)
    for key in own:
        twin = f"{key[:-1]}B"
        if key.endswith(".A") and own[key].shape == own[twin].T.shape and own[twin].any():
            changed[key], changed[twin] = own[twin].T, own[key].T
    return changed


def not_transposed(value: np.ndarray) -> np.ndarray:
    """PEFT's bytes under the graph's shape."""
    return np.ascontiguousarray(value.T).reshape(value.shape)


def exchanged(one: str, other: str) -> Callable[[Arrays], Arrays]:
    """The factors of two layers, found in names as given, exchanged."""

    def edit(own: Arrays) -> Arrays:
        turned = {}
        for key in own:
            there = key.replace(one, "\0").replace(other, one).replace("\0", other)
            turned[key] = own[there] if key.endswith((".A", ".B", ".G", ".bias")) else own[key]
        return turned

    return edit


def copied(one: str, other: str) -> Callable[[Arrays], Arrays]:
    """The factors of ``one`` at ``other`` too."""
    return lambda own: {
        key: own[key.replace(other, one)] if key.endswith((".A", ".B")) else own[key] for key in own
    }


def overflowed(own: Arrays) -> Arrays:
    """A large and B small, with the same product, in half precision."""
    return {
        key: (value * np.float32({"A": 1e6, "B": 1e-6}.get(key[-1], 1)))
        .astype(np.float16)
        .astype(np.float32)
        if key.endswith((".A", ".B"))
        else value
        for key, value in own.items()
    }


def half(own: Arrays) -> Arrays:
    return {key: value.astype(np.float16).astype(np.float32) for key, value in own.items()}


def other_file(adapter: str, other: str, back: bool = False) -> Injection:
    """Another adapter's file in its place; ``back``: and its own in the other's."""

    def inject(directory: Path) -> None:
        paths = adapter_file(directory, adapter), adapter_file(directory, other)
        own, theirs = (read_adapter(path) for path in paths)
        write_adapter(paths[0], theirs)
        if back:
            write_adapter(paths[1], own)

    return inject


def other_head(adapter: str, other: str) -> Injection:
    """Another adapter's task head."""

    def inject(directory: Path) -> None:
        path = adapter_file(directory, adapter)
        theirs = read_adapter(adapter_file(directory, other))
        heads = {key: value for key, value in theirs.items() if key.endswith((".W", ".c"))}
        write_adapter(path, {**read_adapter(path), **heads})

    return inject


def foreign(adapter: str) -> Injection:
    """The file that an adapter of another base with the same shapes would have had."""

    def inject(directory: Path) -> None:
        path = adapter_file(directory, adapter)
        tensors = read_adapter(path)
        for site, pair in load_adapter(_beside_base(directory) / "foreign").modules.items():
            factors = pair.factors()
            tensors[lora_input(site, "A")], tensors[lora_input(site, "B")] = factors.A, factors.B
        write_adapter(path, tensors)

    return inject


def _beside_base(directory: Path) -> Path:
    """The folder of a bundle's world."""
    return Path(load_bundle(directory).manifest.base["name_or_path"]).parent


def dead(like: str, size: float) -> Injection:
    """An adapter like another one, of that size, added to the bundle."""

    def inject(directory: Path) -> None:
        peft = directory / "adapters" / like / "peft"
        with TemporaryDirectory() as folder:
            source = Path(shutil.copytree(peft, folder, dirs_exist_ok=True))
            file = source / "adapter_model.safetensors"
            tensors = st.load_file(file)
            scaled = {k: v * np.float32(size if "lora_B" in k else 1) for k, v in tensors.items()}
            st.save_file(scaled, file)
            lora_edge.add(directory, {"dead": source})

    return inject


# Graphs.


def of_graph(edit: Callable[[onnx.ModelProto], None]) -> Injection:
    """Rewrite the graph; its weights move into it, and the data file stays for its twin."""
    return _of_file("model.onnx", edit)


def base_graph(edit: Callable[[onnx.ModelProto], None]) -> Injection:
    """Rewrite the graph without branches, which pinned sessions run on."""
    return _of_file("base.onnx", edit)


def _of_file(name: str, edit: Callable[[onnx.ModelProto], None]) -> Injection:
    def inject(directory: Path) -> None:
        path = directory / "onnx" / name
        model = onnx.load(path)
        edit(model)
        onnx.save(model, path)

    return inject


def weight(pattern: str, change: Callable[[np.ndarray], np.ndarray]) -> Injection:
    """Change an initializer of the graph."""

    def edit(model: onnx.ModelProto) -> None:
        found = [x for x in model.graph.initializer if re.search(pattern, x.name)]
        assert found, pattern
        for tensor in found:
            changed = change(numpy_helper.to_array(tensor)).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))

    return of_graph(edit)


def constant(pattern: str, change: Callable[[np.ndarray], np.ndarray]) -> Injection:
    """Change the constants made by nodes whose names match."""

    return of_graph(constants(pattern, change))


def constants(
    pattern: str, change: Callable[[np.ndarray], np.ndarray]
) -> Callable[[onnx.ModelProto], None]:
    """The same, of a graph."""

    def edit(model: onnx.ModelProto) -> None:
        nodes = [
            x for x in model.graph.node if x.op_type == "Constant" and re.search(pattern, x.name)
        ]
        assert nodes, pattern
        for node in nodes:
            (value,) = node.attribute
            old = numpy_helper.to_array(value.t)
            value.t.CopyFrom(numpy_helper.from_array(change(old).astype(old.dtype)))

    return edit


def mask_of_ones(model: onnx.ModelProto) -> None:
    """Whatever the caller says, every position is visible."""
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == "attention_mask":
                node.input[index] = "all_visible"
    new = [
        helper.make_node("Sub", ["attention_mask", "attention_mask"], ["none_visible"]),
        helper.make_node("Constant", [], ["one"], value_int=1),
        helper.make_node("Add", ["none_visible", "one"], ["all_visible"]),
    ]
    nodes = [*new, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _consumers(model: onnx.ModelProto, name: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if name in node.input]


def rewired(path: str, source: str) -> Injection:
    """A site's branch reads another tensor; what stands in ``source`` names its node."""

    def edit(model: onnx.ModelProto) -> None:
        (product,) = _consumers(model, f"lora.{path}.A")
        (other,) = [node for node in model.graph.node if node.name == source]
        product.input[list(product.input).index(f"lora.{path}.A") ^ 1] = other.output[0]

    return of_graph(edit)


def branch_cut(path: str) -> Injection:
    """A site's branch is computed and not added."""

    def edit(model: onnx.ModelProto) -> None:
        (product,) = _consumers(model, f"lora.{path}.B")
        (total,) = _consumers(model, product.output[0])
        kept = [x for x in total.input if x != product.output[0]]
        total.op_type = "Identity"
        del total.input[:]
        total.input.extend(kept)

    return of_graph(edit)


def gates_cut(model: onnx.ModelProto) -> None:
    """The gates are not multiplied by."""
    for node in model.graph.node:
        gates = [x for x in node.input if x.endswith(".gate")]
        if gates:
            kept = [x for x in node.input if x not in gates]
            node.op_type = "Identity"
            del node.input[:]
            node.input.extend(kept)
    # Graph inputs that nothing reads are inputs all the same.


def earlier_positions(model: onnx.ModelProto) -> None:
    """The head reads the position before the one that was asked for."""
    made = {name: node for node in model.graph.node for name in node.output}
    (node,) = [x for x in model.graph.node if x.op_type == "GatherND"]
    (taken,) = [x for x in model.graph.node if x.output[0] == node.input[1]]  # Unsqueeze
    positions = taken.input[0]
    assert made[positions].op_type == "Max"
    taken.input[0] = "earlier_positions"
    new = [
        helper.make_node("Constant", [], ["one_back"], value_int=1),
        helper.make_node("Constant", [], ["zeroth"], value_int=0),
        helper.make_node("Sub", [positions, "one_back"], ["unclipped"]),
        helper.make_node("Max", ["unclipped", "zeroth"], ["earlier_positions"]),
    ]
    nodes = list(model.graph.node)
    at = nodes.index(taken)
    nodes[at:at] = new
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def heads_rolled(size: int) -> Callable[[np.ndarray], np.ndarray]:
    """A projection's outputs ``[in, heads * size]`` with its heads in another order."""
    return lambda w: np.roll(w, size, axis=1)


def _attention(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    nodes = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    assert nodes
    return nodes


def rotary_table_from(position: int) -> Injection:
    """From a position on, the attention's table of cosines is that of other positions."""

    def edit(model: onnx.ModelProto) -> None:
        names = {node.input[7] for node in _attention(model)}
        tables = [tensor for tensor in model.graph.initializer if tensor.name in names]
        assert len(tables) == len(names)
        for tensor in tables:
            table = np.array(numpy_helper.to_array(tensor))
            table[position:] = table[position:][::-1].copy()
            tensor.CopyFrom(numpy_helper.from_array(table, tensor.name))

    return of_graph(edit)


def window_of(tokens: int) -> Injection:
    """A window of attention that the model does not have."""

    def edit(model: onnx.ModelProto) -> None:
        for node in _attention(model):
            (window,) = [x for x in node.attribute if x.name == "local_window_size"]
            window.i = tokens

    return of_graph(edit)


def merged(change: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Injection:
    """Weights of a merged bundle, made of the base's and of what the adapter added to them."""

    def inject(directory: Path) -> None:
        base = st.load_file(_beside_base(directory) / "base" / "model.safetensors")

        def edit(model: onnx.ModelProto) -> None:
            for tensor in model.graph.initializer:
                if tensor.name.endswith("_proj.weight"):
                    own = numpy_helper.to_array(tensor)
                    new = change(base[tensor.name].T, own - base[tensor.name].T).astype(np.float32)
                    tensor.CopyFrom(numpy_helper.from_array(new, tensor.name))

        of_graph(edit)(directory)

    return inject


def coarse(step: float) -> Callable[[np.ndarray], np.ndarray]:
    """Rounded to a grid."""
    return lambda w: np.round(w / step) * step


# Runtimes.


@contextmanager
def replaced(owner: type, name: str, around: Callable[..., Any]) -> Iterator[None]:
    """A method of a class, given its original first."""
    original = getattr(owner, name)
    with patch.object(owner, name, lambda self, *a, **k: around(original, self, *a, **k)):
        yield


@contextmanager
def _chunks(around: Callable[..., Any]) -> Iterator[None]:
    """What is fed at every run, those included that are written in place."""
    with (
        replaced(SharedCache, "_chunk", around),
        replaced(SharedCache, "_step", lambda real, self, tokens: None),  # noqa: ARG005
    ):
        yield


def gates_turned() -> AbstractContextManager[Any]:
    """Each row of a mixed batch gets the gates of the row above it."""

    def turn(real: Any, self: Any, ranks: Any, weights: np.ndarray) -> Any:
        return real(self, ranks, np.roll(weights, 1, axis=0))

    return replaced(Tensors, "row_weights", turn)


def gates_leaking() -> AbstractContextManager[Any]:
    """Each row of a mixed batch gets a fifth of what its neighbour has."""

    def leak(real: Any, self: Any, ranks: Any, weights: np.ndarray) -> Any:
        return real(self, ranks, weights + np.float32(0.2) * np.roll(weights, 1, axis=0))

    return replaced(Tensors, "row_weights", leak)


def weights_ignored() -> AbstractContextManager[Any]:
    """A blend adds up its adapters at weight 1."""
    return replaced(
        Snapshot, "_blend", lambda real, self, parts: real(self, [(n, 1.0) for n, _ in parts])
    )


def switch_ignored() -> AbstractContextManager[Any]:
    """Once an adapter is bound, it stays bound, whichever is asked for alone."""
    bound: dict[int, Any] = {}

    def alike(real: Any, self: Any, state: Any) -> Binding:
        if not state or len(state) > 1:
            return real(self, state)
        return bound.setdefault(id(self.tensors), real(self, state))

    return replaced(Snapshot, "_alike", alike)


def stale_cache() -> AbstractContextManager[Any]:
    """A prompt that was seen before gets the keys and values that it had then."""
    seen: dict[Any, list[np.ndarray]] = {}

    def extend_all(real: Any, self: Any, rows: Any) -> Any:
        logits = real(self, rows)
        key = tuple(map(tuple, rows)), *self.cache[0].shape()
        if key in seen:
            for value, old in zip(self.cache, seen[key], strict=True):
                value.update_inplace(old)
        else:
            seen[key] = [np.array(value.numpy()) for value in self.cache]
        return logits

    return replaced(Decoding, "extend_all", extend_all)


def cache_rows_turned() -> AbstractContextManager[Any]:
    """After the prompt, the rows of a batch find each other's keys and values."""

    def extend_all(real: Any, self: Any, rows: Any) -> Any:
        logits = real(self, rows)
        for value in self.cache:
            value.update_inplace(np.ascontiguousarray(np.array(value.numpy())[::-1]))
        return logits

    return replaced(Decoding, "extend_all", extend_all)


def cache_layers_turned() -> AbstractContextManager[Any]:
    """Each layer's cache is handed to the other layer."""

    def advance(real: Any, self: Any, rows: Any, start: Any, every: bool) -> Any:
        self._past = [*self._past[2:], *self._past[:2]]
        return real(self, rows, start, every)

    return replaced(ConcatenatedCache, "_advance", advance)


def _moved_on(decoding: Decoding, chunk: Any) -> Any:
    last = decoding.decoder.part.max_length - 1
    return chunk._replace(positions=np.minimum(chunk.positions + 1, last))


def decode_shifted() -> AbstractContextManager[Any]:
    """Tokens after the prompt get the position of the one behind them."""

    def chunk(real: Any, self: Any, rows: Any, history: Any) -> Any:
        made = real(self, rows, history)
        return _moved_on(self, made) if any(history) else made

    return _chunks(chunk)


def positions_shifted() -> AbstractContextManager[Any]:
    """Every token gets the position of the one behind it."""

    def chunk(real: Any, self: Any, rows: Any, history: Any) -> Any:
        return _moved_on(self, real(self, rows, history))

    return _chunks(chunk)


def encoder_unmasked() -> AbstractContextManager[Any]:
    """Padding is as visible as what it fills up."""

    def feeds(real: Any, self: Any, *args: Any) -> Any:
        arrays = real(self, *args)
        return {**arrays, "attention_mask": np.ones_like(arrays["attention_mask"])}

    return replaced(Encoder, "feeds", feeds)


def prompts_cut(tokens: int) -> Patch:
    """What a prompt has beyond so many tokens is read as the token 0."""

    def chunk(real: Any, self: Any, rows: Any, history: Any) -> Any:
        made = real(self, rows, history)
        made.ids[:, tokens:] = 0
        return made

    return lambda: _chunks(chunk)


def rows_lost(most: int) -> Patch:
    """In a batch of more rows than that, the later ones are fed other tokens."""

    def chunk(real: Any, self: Any, rows: Any, history: Any) -> Any:
        made = real(self, rows, history)
        made.ids[most:] = (made.ids[most:] + 1) % self.decoder.part.vocab_size
        return made

    return lambda: _chunks(chunk)


def resting_overwritten() -> AbstractContextManager[Any]:
    """A row that rests writes another token into its place."""

    def chunk(real: Any, self: Any, rows: Any, history: Any) -> Any:
        made = real(self, rows, history)
        made.ids[[index for index, row in enumerate(rows) if not row]] = 0
        return made

    return _chunks(chunk)


def neighbours_of_resting() -> AbstractContextManager[Any]:
    """Where a row rests, the others are fed the token 0."""

    def chunk(real: Any, self: Any, rows: Any, history: Any) -> Any:
        made = real(self, rows, history)
        if not all(rows):
            made.ids[[index for index, row in enumerate(rows) if row]] = 0
        return made

    return _chunks(chunk)


def third_dropped() -> AbstractContextManager[Any]:
    """A blend holds its first two adapters."""

    def blend(real: Any, self: Any, parts: Any) -> Any:
        return real(self, parts[:2] if any(weight != 1 for _, weight in parts) else parts)

    return replaced(Snapshot, "_blend", blend)


def signs_dropped() -> AbstractContextManager[Any]:
    """A blend adds what it should take away."""
    return replaced(
        Snapshot,
        "_blend",
        lambda real, self, parts: real(self, [(name, abs(weight)) for name, weight in parts]),
    )


def signs_of_rows_dropped() -> AbstractContextManager[Any]:
    """The same in a mixed batch."""
    return replaced(
        Tensors,
        "row_weights",
        lambda real, self, ranks, weights: real(self, ranks, np.abs(weights)),
    )


def stale_after_mixed() -> AbstractContextManager[Any]:
    """After a mixed batch, the next one without an adapter has that of its first row."""
    left: dict[int, Any] = {}

    def rows(real: Any, self: Any, states: Any) -> Any:
        left[id(self.tensors)] = states[0]
        return real(self, states)

    def alike(real: Any, self: Any, state: Any) -> Any:
        return real(self, state if state else left.pop(id(self.tensors), state))

    stack = ExitStack()
    stack.enter_context(replaced(Snapshot, "_rows", rows))
    stack.enter_context(replaced(Snapshot, "_alike", alike))
    return stack


def invoked(shift: int | None) -> Patch:
    """An aLoRA begins so many tokens later than its invocation; None: at the first token."""

    def starts(real: Any, self: Any, prompts: Any) -> Any:
        found = real(self, prompts)
        if shift is None:
            return np.zeros_like(found)
        never = found == np.iinfo(np.int64).max
        return np.where(never | (found == 0), found, found + shift)

    return lambda: replaced(TokenGates, "starts", starts)


# Integrity: no number is wrong yet, and nothing may run.


def cut_off(relative: str) -> Injection:
    def inject(directory: Path) -> None:
        path = directory / relative
        path.write_bytes(path.read_bytes()[:-7])

    return inject


def overwritten(relative: str, content: bytes) -> Injection:
    return lambda directory: (directory / relative).write_bytes(content) and None


def missing(relative: str) -> Injection:
    return lambda directory: (directory / relative).unlink()


def of_manifest(edit: Callable[[dict[str, Any]], None]) -> Injection:
    def inject(directory: Path) -> None:
        path = directory / "lora_edge.json"
        data = json.loads(path.read_text(encoding="utf-8"))
        edit(data)
        path.write_text(json.dumps(data), encoding="utf-8")

    return inject


def golden_changed(directory: Path) -> None:
    golden = min((directory / "parity").glob("adapter-*.npz"))
    golden.write_bytes(golden.read_bytes()[:-1])


def other_hash(manifest: dict[str, Any]) -> None:
    manifest["files"]["onnx/model.onnx"]["sha256"] = "0" * 64


def other_format(manifest: dict[str, Any]) -> None:
    manifest["format_version"] += 1


def other_fingerprint(adapter: str) -> Callable[[dict[str, Any]], None]:
    def edit(manifest: dict[str, Any]) -> None:
        manifest["adapters"][adapter]["base_fingerprint"] = "0" * 64

    return edit


def entry_of(adapter: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    """An adapter's entry says something else."""

    def edit(manifest: dict[str, Any]) -> None:
        manifest["adapters"][adapter].update(changes)

    return edit


def file_of(adapter: str, other: str) -> Callable[[dict[str, Any]], None]:
    """An adapter's entry points at another's file."""

    def edit(manifest: dict[str, Any]) -> None:
        manifest["adapters"][adapter]["file"] = manifest["adapters"][other]["file"]

    return edit


# What lies around the graph.


def of_json(relative: str, edit: Callable[[Any], Any]) -> Injection:
    """Rewrite a JSON file of the bundle; what ``edit`` returns, if anything, takes its place."""

    def inject(directory: Path) -> None:
        path = directory / relative
        data = json.loads(path.read_text(encoding="utf-8"))
        changed = edit(data)
        text = json.dumps(data if changed is None else changed)
        path.write_text(text, encoding="utf-8")

    return inject


def of_text(relative: str, old: str, new: str) -> Injection:
    """Put other words into a text file."""

    def inject(directory: Path) -> None:
        path = directory / relative
        text = path.read_text(encoding="utf-8")
        assert old in text, text
        path.write_text(text.replace(old, new), encoding="utf-8")

    return inject


def letters_exchanged(tokenizer: dict[str, Any]) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["q"], vocabulary["z"] = vocabulary["z"], vocabulary["q"]


def nothing_put_around(tokenizer: dict[str, Any]) -> None:
    tokenizer["post_processor"] = None


def labels_reversed(adapter: str) -> Callable[[dict[str, Any]], None]:
    def edit(manifest: dict[str, Any]) -> None:
        manifest["adapters"][adapter]["labels"].reverse()

    return edit


def config_labels_exchanged(config: dict[str, Any]) -> None:
    names = config["id2label"]
    names["0"], names["1"] = names["1"], names["0"]


def field_of(field: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Another value for a field; dots lead into objects."""

    def edit(data: dict[str, Any]) -> None:
        *way, last = field.split(".")
        for part in way:
            data = data[part]
        assert data[last] != value
        data[last] = value

    return edit


def unread_row(directory: Path) -> None:
    """Another value in a row of the embedding whose token no golden case holds."""
    from lora_edge.parity.record.golden import recorded

    read = {
        token
        for golden in recorded(load_bundle(directory))
        for row in (*golden.probe.rows, *golden.tails)
        for token in row
    }
    path = directory / "onnx" / "model.onnx"
    model = onnx.load(path)
    (table,) = [x for x in model.graph.initializer if x.name == "model.embed_tokens.weight"]
    values = numpy_helper.to_array(table).copy()
    row = max(set(range(len(values))) - read)
    values[row, 3] += 0.01
    table.CopyFrom(numpy_helper.from_array(values, table.name))
    onnx.save(model, path)


def far_positions(first: int) -> Callable[[np.ndarray], np.ndarray]:
    """The rotary table is another one from a position on."""

    def change(table: np.ndarray) -> np.ndarray:
        changed = table.copy()
        changed[first:] = table[first - 1]
        return changed

    return change


def tables(change: Callable[[np.ndarray], np.ndarray], rows: int) -> Callable[[Any], None]:
    """Change every float constant of so many rows."""

    def edit(model: onnx.ModelProto) -> None:
        held = [x for x in model.graph.initializer if x.dims[:1] == [rows]]
        held += [
            node.attribute[0].t
            for node in model.graph.node
            if node.op_type == "Constant" and node.attribute[0].t.dims[:1] == [rows]
        ]
        found = [x for x in held if x.data_type == onnx.TensorProto.FLOAT]
        assert found
        for tensor in found:
            values = change(numpy_helper.to_array(tensor))
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    return edit


def one_number(pattern: str) -> Callable[[onnx.ModelProto], None]:
    """One number of an initializer is another one."""

    def edit(model: onnx.ModelProto) -> None:
        tensor = next(x for x in model.graph.initializer if re.search(pattern, x.name))
        values = numpy_helper.to_array(tensor).copy()
        values[-1, -1] += np.float32(1e-3)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    return edit
