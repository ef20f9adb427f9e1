"""A tiny decoder in three forms, its numpy reference, a byte tokenizer, and bundles of them.

The decoder: token and position embeddings, two layers of grouped-query attention and a tanh MLP, a
linear read-out. Seven of its linears are sites. ``foreign`` has a window over *slots*, so that gaps
in the mask change its results, as they do in graphs that count padding as tokens.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tokenizers
from onnx import TensorProto, helper, numpy_helper

from lora_edge.bundle.bundle import Bundle, file_entries, hash_file
from lora_edge.bundle.manifest import AdapterEntry, FileEntry, Manifest
from lora_edge.bundle.part import Cache, Part, SiteEntry
from lora_edge.maths.lora import Factors
from lora_edge.names import NUM_LOGITS_TO_KEEP, lora_input
from lora_edge.runtime import Runner, write_adapter
from lora_edge.runtime.decoder import Decoder

LAYERS, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCAB, LENGTH, WINDOW = 2, 4, 2, 8, 40, 264, 96, 4
HIDDEN, KV = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
EOS = 256
FORMS = ("fused", "portable", "foreign")


def _linears() -> dict[str, tuple[int, int]]:
    out = {}
    for n in range(LAYERS):
        at = f"model.layers.{n}"
        out |= {
            f"{at}.self_attn.q_proj": (HIDDEN, HIDDEN),
            f"{at}.self_attn.k_proj": (HIDDEN, KV),
            f"{at}.self_attn.v_proj": (HIDDEN, KV),
            f"{at}.self_attn.o_proj": (HIDDEN, HIDDEN),
            f"{at}.mlp.up_proj": (HIDDEN, INNER),
            f"{at}.mlp.down_proj": (INNER, HIDDEN),
        }
    return out | {"lm_head": (HIDDEN, VOCAB)}


LINEARS = _linears()
SITES = {
    path: SiteEntry(*size)
    for path, size in LINEARS.items()
    if path.endswith(("q_proj", "v_proj", "up_proj")) or path == "lm_head"
}


def make_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)

    def draw(*shape: int, scale: float) -> np.ndarray:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    weights = {path: draw(*size, scale=1.3 / size[0] ** 0.5) for path, size in LINEARS.items()}
    weights["lm_head"] *= np.float32(0.1)  # logits of about 2
    weights["embedding"] = draw(VOCAB, HIDDEN, scale=1.0)
    weights["positions"] = draw(LENGTH, HIDDEN, scale=0.5)
    return weights


def make_adapters() -> dict[str, dict[str, Factors]]:
    """Unequal ranks, some sites untouched, B never zero; ``readout`` is on the last linear only."""
    rng = np.random.default_rng(4)

    def factors(path: str, rank: int) -> Factors:
        i, o = LINEARS[path]
        draw = rng.standard_normal
        a, b = draw((i, rank)) / i**0.5, draw((rank, o)) * (0.05 if path == "lm_head" else 0.5)
        return Factors(a.astype(np.float32), b.astype(np.float32))

    q, v, up = "self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"
    ranks = {
        "alpha": {f"model.layers.{n}.{p}": 3 for n in range(LAYERS) for p in (q, v)},
        "beta": {f"model.layers.0.{q}": 2, f"model.layers.1.{up}": 5, "lm_head": 1},
        "readout": {"lm_head": 2},
    }
    return {name: {p: factors(p, r) for p, r in sites.items()} for name, sites in ranks.items()}


WEIGHTS = make_weights()
ADAPTERS = make_adapters()


def reference(
    ids: list[int], state: Mapping[str, float] | None = None, *, window: int | None = None
) -> np.ndarray:
    """Logits ``[len(ids), vocab] float64`` of one row under a weighted sum of adapters."""
    w = {k: v.astype(np.float64) for k, v in WEIGHTS.items()}
    for name, weight in (state or {}).items():
        for path, f in ADAPTERS[name].items():
            w[path] = w[path] + weight * (f.A.astype(np.float64) @ f.B)
    n = len(ids)
    x = w["embedding"][ids] + w["positions"][:n]
    back = np.arange(n)[:, None] - np.arange(n)
    hidden = (back < 0) if window is None else (back < 0) | (back >= window)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        q = (x @ w[f"{at}.self_attn.q_proj"]).reshape(n, HEADS, HEAD_DIM).transpose(1, 0, 2)
        k = (x @ w[f"{at}.self_attn.k_proj"]).reshape(n, KV_HEADS, HEAD_DIM).transpose(1, 0, 2)
        v = (x @ w[f"{at}.self_attn.v_proj"]).reshape(n, KV_HEADS, HEAD_DIM).transpose(1, 0, 2)
        k, v = (np.repeat(t, HEADS // KV_HEADS, 0) for t in (k, v))
        s = q @ k.transpose(0, 2, 1) / HEAD_DIM**0.5
        s = np.exp(np.where(hidden, -1e9, s - s.max(-1, keepdims=True)))
        mixed = (s / s.sum(-1, keepdims=True)) @ v
        x = x + mixed.transpose(1, 0, 2).reshape(n, HIDDEN) @ w[f"{at}.self_attn.o_proj"]
        x = x + np.tanh(x @ w[f"{at}.mlp.up_proj"]) @ w[f"{at}.mlp.down_proj"]
    return x @ w["lm_head"]


class _Graph:
    """Collects nodes, inputs and initializers."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.weights: dict[str, np.ndarray] = {}

    def op(self, kind: str, *inputs: Any, domain: str = "", outputs: int = 1, **attrs: Any) -> Any:
        names = [f"{kind}_{len(self.nodes)}_{i}" for i in range(outputs)]
        given = [i if isinstance(i, str) else self.constant(i) for i in inputs]
        self.nodes.append(helper.make_node(kind, given, names, domain=domain, **attrs))
        return names[0] if outputs == 1 else names

    def constant(self, value: np.ndarray) -> str:
        name = f"constant_{len(self.weights)}"
        self.weights[name] = value
        return name

    def add_input(self, name: str, shape: list[Any], kind: int = TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def add_output(self, value: str, name: str, shape: list[Any]) -> None:
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = [name if n == value else n for n in names]
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))


def _i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def _visible(g: _Graph, form: str, mask: str, positions: str) -> str:
    """Additive mask ``[batch, 1, seq, total]``."""
    alive = g.op("Unsqueeze", g.op("Cast", mask, to=TensorProto.BOOL), _i64(1, 2))
    if form == "portable":
        place = g.op("Sub", g.op("CumSum", mask, np.array(1, np.int64)), _i64(1))
        key, query = g.op("Unsqueeze", place, _i64(1, 2)), g.op("Unsqueeze", positions, _i64(1, 3))
    else:  # slots, wherever the padding is
        total = g.op("Gather", g.op("Shape", mask), np.array(1, np.int64))
        seq = g.op("Gather", g.op("Shape", positions), np.array(1, np.int64))
        zero, one = np.array(0, np.int64), np.array(1, np.int64)
        key = g.op("Range", zero, total, one)
        query = g.op("Unsqueeze", g.op("Range", g.op("Sub", total, seq), total, one), _i64(1))
    back = g.op("Sub", query, key)
    seen = g.op("And", g.op("GreaterOrEqual", back, _i64(0)), alive)
    if form == "foreign":
        seen = g.op("And", seen, g.op("Less", back, _i64(WINDOW)))
    return g.op("Where", seen, np.float32([0.0]), np.float32([-3e4]))


def build_graph(form: str, *, sites: bool = True, picks: bool | None = None) -> onnx.ModelProto:
    g = _Graph()
    i64 = TensorProto.INT64
    ids = g.add_input("input_ids", ["batch", "seq"], i64)
    mask = g.add_input("attention_mask", ["batch", "total"], i64)
    positions = g.add_input("position_ids", ["batch", "seq"], i64)
    g.weights |= {path if "." not in path else f"{path}.weight": w for path, w in WEIGHTS.items()}

    def linear(x: str, path: str) -> str:
        y = g.op("MatMul", x, path if path in g.weights else f"{path}.weight")
        if not sites or path not in SITES:
            return y
        i, o = LINEARS[path]
        a = g.add_input(lora_input(path, "A"), [i, f"{path}.R"])
        b = g.add_input(lora_input(path, "B"), [f"{path}.R", o])
        dims = [f"{path}.gate_batch", f"{path}.gate_seq", f"{path}.gate_rank"]
        gate = g.add_input(lora_input(path, "gate"), dims)
        return g.op("Add", y, g.op("MatMul", g.op("Mul", g.op("MatMul", x, a), gate), b))

    x = g.op("Add", g.op("Gather", "embedding", ids), g.op("Gather", "positions", positions))
    if form == "fused":
        length = g.op("Sub", g.op("ReduceSum", mask, _i64(1), keepdims=0), _i64(1))
        seqlens = g.op("Cast", length, to=TensorProto.INT32)
        total = g.op("Gather", g.op("Shape", mask), np.array(1, np.int64))
        total = g.op("Cast", total, to=TensorProto.INT32)
    else:
        additive = _visible(g, form, mask, positions)
    presents = []
    for n in range(LAYERS):
        at = f"model.layers.{n}"
        q, k, v = (linear(x, f"{at}.self_attn.{p}_proj") for p in "qkv")
        past = [
            g.add_input(f"past_key_values.{n}.{p}", ["batch", KV_HEADS, "past", HEAD_DIM])
            for p in ("key", "value")
        ]
        if form == "fused":
            mixed, *new = g.op(
                "GroupQueryAttention",
                *(q, k, v, *past, seqlens, total),
                domain="com.microsoft",
                outputs=3,
                num_heads=HEADS,
                kv_num_heads=KV_HEADS,
            )
        else:

            def heads(t: str, count: int) -> str:
                t = g.op("Reshape", t, _i64(0, 0, count, HEAD_DIM))
                return g.op("Transpose", t, perm=[0, 2, 1, 3])

            new = [
                g.op("Concat", p, heads(t, KV_HEADS), axis=2)
                for p, t in zip(past, (k, v), strict=True)
            ]
            groups = _i64(0, KV_HEADS, HEADS // KV_HEADS, -1, HEAD_DIM)
            scale = np.float32([HEAD_DIM**-0.5])
            q5 = g.op("Reshape", g.op("Mul", heads(q, HEADS), scale), groups)
            k5, v5 = (g.op("Unsqueeze", t, _i64(2)) for t in new)
            scores = g.op("MatMul", q5, g.op("Transpose", k5, perm=[0, 1, 2, 4, 3]))
            scores = g.op("Add", scores, g.op("Unsqueeze", additive, _i64(1)))
            mixed = g.op("MatMul", g.op("Softmax", scores, axis=-1), v5)
            mixed = g.op("Reshape", mixed, _i64(0, HEADS, -1, HEAD_DIM))
            mixed = g.op("Transpose", mixed, perm=[0, 2, 1, 3])
            mixed = g.op("Reshape", mixed, _i64(0, 0, HIDDEN))
        presents.append(new)
        x = g.op("Add", x, linear(mixed, f"{at}.self_attn.o_proj"))
        inner = g.op("Tanh", linear(x, f"{at}.mlp.up_proj"))
        x = g.op("Add", x, linear(inner, f"{at}.mlp.down_proj"))
    kept = None
    if picks:  # as graphs of earlier releases have it
        kept = g.add_input("logits_positions", ["batch", "kept"], i64)
    elif picks is None and form == "fused":
        keep = g.add_input(NUM_LOGITS_TO_KEEP, [], i64)
        every = g.op("Equal", keep, np.array(0, np.int64))
        width = g.op("Gather", g.op("Shape", ids), np.array(1, np.int64))
        count = g.op("Where", every, width, keep)
        back = g.op("Range", g.op("Neg", count), np.array(0, np.int64), np.array(1, np.int64))
        ends = g.op("Min", g.op("ReduceSum", mask, _i64(1), keepdims=1), width)
        ends = g.op("Where", every, width, ends)
        kept = g.op("Max", g.op("Add", ends, back), np.array(0, np.int64))
    if kept is not None:
        x = g.op("GatherND", x, g.op("Unsqueeze", kept, _i64(2)), batch_dims=1)
    g.add_output(linear(x, "lm_head"), "logits", ["batch", "kept", VOCAB])
    for n, new in enumerate(presents):
        for part, value in zip(("key", "value"), new, strict=True):
            g.add_output(value, f"present.{n}.{part}", ["batch", KV_HEADS, None, HEAD_DIM])
    graph = helper.make_graph(
        g.nodes,
        form,
        g.inputs,
        g.outputs,
        [numpy_helper.from_array(np.asarray(w), name) for name, w in g.weights.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def make_part(form: str, *, sites: bool = True) -> Part:
    return Part(
        file="onnx/model.onnx",
        form=form,
        backend="trace",
        inputs=("input_ids", "attention_mask"),
        output="logits",
        padding={"fused": "right", "portable": "either", "foreign": "left"}[form],
        vocab_size=VOCAB,
        max_length=LENGTH,
        cache=Cache(
            kind="shared" if form == "fused" else "concatenated",
            layers=LAYERS,
            kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
        ),
        sites=SITES if sites else {},
    )


def open_decoder(path: Path, form: str, *, sites: bool = True, **options: Any) -> Decoder:
    """A session on a graph of this form; options of the part are changed, others are its own."""
    fields = {x: options.pop(x) for x in list(options) if x in Part.__dataclass_fields__}
    part = replace(make_part(form, sites=sites), file=path.name, **fields)
    return Decoder(path.parent, {"decoder": part}, **options)


def make_tokenizer() -> tokenizers.Tokenizer:
    """One token per byte; id 256 is the end, 257 the beginning that the tokenizer puts first."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>", "<bos>", "<user>", "<assistant>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return tokenizer


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('no system role') }}{% endif %}<{{ m.role }}>"
    "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def adapter_tensors(factors: Mapping[str, Factors]) -> dict[str, np.ndarray]:
    """An adapter file's content: all sites, rank 0 where the adapter does nothing."""
    tensors = {}
    for path, site in SITES.items():
        pair = factors.get(path)
        shapes = (site.in_features, 0), (0, site.out_features)
        tensors[lora_input(path, "A")] = pair.A if pair else np.zeros(shapes[0], np.float32)
        tensors[lora_input(path, "B")] = pair.B if pair else np.zeros(shapes[1], np.float32)
        tensors[lora_input(path, "gate")] = np.ones((1, 1, 1), np.float32)
    return tensors


def make_bundle(directory: Path, form: str, *, mode: str = "switchable") -> Bundle:
    switchable = mode == "switchable"
    (directory / "onnx").mkdir(parents=True)
    onnx.save(build_graph(form, sites=switchable), directory / "onnx" / "model.onnx")
    make_tokenizer().save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    (directory / "tokenizer_config.json").write_text(
        '{"bos_token": {"content": "<bos>"}, "eos_token": "<eos>"}'
    )
    (directory / "generation_config.json").write_text(f'{{"eos_token_id": [{EOS}]}}')
    entries = {}
    for name, factors in ADAPTERS.items() if switchable else [("alpha", ADAPTERS["alpha"])]:
        file = f"adapters/{name}/adapter.onnx_adapter" if switchable else ""
        if switchable:
            (directory / file).parent.mkdir(parents=True)
            write_adapter(directory / file, adapter_tensors(factors))
        ranks = {path: pair.rank for path, pair in factors.items()}
        entries[name] = AdapterEntry(name, file, "LoRA", ranks, "d", "base-1", True)
    manifest = Manifest(
        mode=mode,
        task="text-generation",
        precision="fp32",
        parts={"decoder": make_part(form, sites=switchable)},
        base={"name_or_path": "tiny", "model_type": "tiny", "fingerprint": "base-1"},
        kinds=("lora",),
        adapters=entries,
        base_check={},
        versions={},
        files=file_entries(directory),
    )
    return Bundle(directory, manifest).write_manifest(manifest)


def rehash(bundle: Bundle, *relative: str) -> Bundle:
    """The bundle with the hashes of changed files made right again."""
    files = dict(bundle.manifest.files)
    for name in relative:
        path = bundle.directory / name
        files[name] = FileEntry(hash_file(path), path.stat().st_size)
    return bundle.write_manifest(replace(bundle.manifest, files=files))


class Tiny:
    """Everything above, for the tests."""

    forms = FORMS
    sites = SITES
    adapters = ADAPTERS
    eos = EOS
    vocab = VOCAB
    length = LENGTH
    part = staticmethod(make_part)
    decoder = staticmethod(open_decoder)
    graph = staticmethod(build_graph)
    bundle = staticmethod(make_bundle)
    rehash = staticmethod(rehash)
    tensors = staticmethod(adapter_tensors)

    @staticmethod
    def reference(
        form: str, ids: list[int], state: Mapping[str, float] | None = None
    ) -> np.ndarray:
        return reference(ids, state, window=WINDOW if form == "foreign" else None)

    @staticmethod
    def rows(*lengths: int, seed: int = 0) -> list[list[int]]:
        """Rows of random token ids, none of them the end."""
        rng = np.random.default_rng(seed)
        return [rng.integers(0, 256, n).tolist() for n in lengths]


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    return Tiny()


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """A switchable bundle in every form, and a merged one; read only."""
    root = tmp_path_factory.mktemp("bundles")
    made = {form: make_bundle(root / form, form) for form in FORMS}
    return made | {"merged": make_bundle(root / "merged", "fused", mode="merged")}


@pytest.fixture(scope="module")
def runners(bundles: dict[str, Bundle]) -> dict[str, Runner]:
    return {form: Runner(bundle, threads=1) for form, bundle in bundles.items()}


@pytest.fixture
def bundle(tiny: Tiny, tmp_path: Path) -> Bundle:
    """One to damage."""
    return tiny.bundle(tmp_path / "bundle", "fused")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, None, None]:
    return (yield from _without_transformers())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    return (yield from _without_transformers())


def _without_transformers() -> Generator[None, None, None]:
    """In an environment of the runtime alone (ci/oldest) nothing is compared with transformers."""
    try:
        return (yield)
    except ModuleNotFoundError as error:
        if error.name in ("torch", "transformers"):
            pytest.skip(f"compares with {error.name}, which is not installed")
        raise
