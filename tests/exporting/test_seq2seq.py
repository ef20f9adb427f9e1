"""Encoder-decoders on the optimum backend's two graphs."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import lora_edge
from lora_edge.bundle.onnx_adapter import read_adapter, write_adapter
from lora_edge.cli.export import command as export
from lora_edge.cli.run import command as run
from lora_edge.errors import (
    DataError,
    MissingDependencyError,
    UnsupportedAdapterError,
    UnsupportedModelError,
)
from lora_edge.parity.checks import compare
from lora_edge.parity.compare import Tolerance
from lora_edge.parity.record.golden import recorded
from lora_edge.runtime.sampling import Sampling
from lora_edge.tasks.task import Task
from tests.support.blends import asked_of
from tests.support.failing import signed
from tests.support.seq2seq import (
    ALL,
    ATTENTION,
    VOCAB,
    give_words,
    make_seq2seq,
    make_seq2seq_adapter,
    optimum,
)


class Exported:
    """A base, two adapters of unequal ranks, and a switchable bundle of both."""

    def __init__(self, family: str, root: Path) -> None:
        self.family = family
        self.base = make_seq2seq(family, root / "base")
        self.adapters = {
            "some": make_seq2seq_adapter(
                self.base, root / "some", family, 1, r=3, target_modules=ATTENTION[family]
            ),
            "every": make_seq2seq_adapter(
                self.base, root / "every", family, 2, r=5, target_modules=ALL[family]
            ),
        }
        self.output = root / "bundle"
        lora_edge.export(self.base, self.adapters, output=self.output, backend="optimum")

    def inputs(self, count: int) -> object:
        random = np.random.default_rng(5)
        if self.family == "whisper":
            return random.standard_normal((count, 16, 40)).astype(np.float32)
        return [random.integers(3, VOCAB, 4 + 3 * row).tolist() for row in range(count)]


_MADE: dict[str, Exported] = {}


@pytest.fixture(params=["t5", "t5-gated", "whisper", "bart"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    family = request.param
    if family not in _MADE:
        _MADE[family] = Exported(family, tmp_path_factory.mktemp(family))
    return _MADE[family]


class TestWithOptimum:
    pytestmark = optimum

    def test_switchable_is_proved(self, exported: Exported) -> None:
        report = lora_edge.validate(exported.output, reference=exported.base)
        assert report.passed, report.table()
        kinds = {case.name.split(",")[0].split(":")[0] for case in report.cases}
        assert {"base", "adapter some", "adapter every", "mixed row 0"} <= kinds
        blend = next(case for case in report.cases if case.name.startswith("blend"))
        assert blend.name == "blend 0.7 every + 0.3 some"
        assert blend.figures is not None
        assert blend.figures.effect_max > 0.01
        assert any(case.adapters == ("every", "some") for case in report.cases if case != blend)
        assert any("bit for bit" in case.name for case in report.cases)
        controls = [case.controls for case in report.cases if case.name == "adapter every"]
        assert controls[0] is not None
        assert {"zeroed", "replaced by some"} == set(controls[0])
        assert lora_edge.validate(exported.output).passed  # the goldens, without PyTorch

    def test_a_blend_with_another_weight_is_seen(self, exported: Exported) -> None:
        runner = lora_edge.Runner(exported.output)
        blends = (x for x in recorded(runner.bundle) if x.probe.kind == "blend")
        golden = next(x for x in blends if x.probe.name == "blend 0.7 every + 0.3 some")
        (case,) = compare(runner, golden, Tolerance())
        assert case.status == "passed", case.reason
        for wrong in ({"some": 0.7, "every": 0.3}, {"every": 0.7}, {"some": 0.29, "every": 0.7}):
            (case,) = compare(runner, asked_of(golden, wrong), Tolerance())
            assert case.status == "failed", wrong

    @pytest.mark.parametrize("name", ["some", "every"])
    def test_merged_equals_switchable(self, exported: Exported, name: str, tmp_path: Path) -> None:
        adapter = {name: exported.adapters[name]}
        lora_edge.export(exported.base, adapter, "merged", tmp_path / "out", backend="optimum")
        merged, both = lora_edge.Runner(tmp_path / "out"), lora_edge.Runner(exported.output)
        inputs, targets = exported.inputs(2), [[3, 8, 9], [3, 4]]
        ours = both.seq2seq_logits(inputs, targets, name)
        np.testing.assert_allclose(merged.seq2seq_logits(inputs, targets), ours, atol=3e-5)
        assert np.abs(both.seq2seq_logits(inputs, targets) - ours).max() > 0.01
        assert lora_edge.validate(tmp_path / "out").passed

    def test_mixed_rows_equal_their_own(self, exported: Exported) -> None:
        runner = lora_edge.Runner(exported.output)
        inputs = exported.inputs(4)
        targets = [[3, 8, 9], [3], [3, 4, 6, 7], [3, 5]]
        states = ["some", None, "every", {"some": 0.5, "every": 0.7}]
        mixed = runner.seq2seq_logits(inputs, targets, states)
        alone = []
        for row, state in enumerate(states):
            own = runner.seq2seq_logits(inputs[row : row + 1], targets[row : row + 1], state)  # type: ignore[index]
            np.testing.assert_allclose(mixed[row, : len(targets[row])], own[0], atol=2e-5)
            alone.append(own[0, 0])
        assert not mixed[1, 1:].any()
        assert all(np.abs(a - b).max() > 0.01 for a, b in itertools.pairwise(alone))

    def test_generates_what_pytorch_does(self, exported: Exported) -> None:
        import torch
        import transformers
        from peft import PeftModel

        runner = lora_edge.Runner(exported.output)
        manifest = runner.bundle.manifest
        speech, start = manifest.reads.sample, manifest.beginning.start
        loader = getattr(transformers, Task(runner.bundle.manifest.task).loader)
        inputs = exported.inputs(3)
        said = []
        for name in ("some", "every"):
            model = loader.from_pretrained(exported.base, attn_implementation="eager")
            model = PeftModel.from_pretrained(model, exported.adapters[name]).eval()
            ours = runner.generate_ids(inputs, name, 10)  # type: ignore[arg-type]
            for row, own in zip(inputs, ours, strict=True):  # type: ignore[call-overload]
                key = "input_features" if speech else "input_ids"
                with torch.inference_mode():
                    found = model.generate(
                        **{key: torch.tensor(row)[None]},
                        max_new_tokens=10,
                        do_sample=False,
                        num_beams=1,
                        forced_eos_token_id=None,  # BART's, in the last place of a full answer
                    )[0].tolist()
                # Whisper's own generate() leaves out what the decoder began with.
                theirs = found if speech else found[len(start) :]
                assert own == theirs[: len(own)], (name, own, found)
                assert len(own) == 10 or own[-1] in runner.eos_ids
            said.append(ours)
        assert said[0] != said[1]

    def test_samples_are_of_what_pytorch_says(self, exported: Exported) -> None:
        """Token by token: PEFT's eager logits, and the same random numbers."""
        import torch
        import transformers
        from peft import PeftModel

        runner = lora_edge.Runner(exported.output)
        session = runner.seq2seq
        loader = getattr(transformers, Task(runner.bundle.manifest.task).loader)
        model = loader.from_pretrained(exported.base, attn_implementation="eager")
        model = PeftModel.from_pretrained(model, exported.adapters["every"]).eval()
        inputs = exported.inputs(3)
        sampling = Sampling(temperature=0.8, top_k=9, seed=5, repetition_penalty=1.3)
        generators = sampling.generators(session.keys(inputs))
        beginning = runner.bundle.manifest.beginning
        key = "input_features" if session.encoder.sample else "input_ids"
        expected = []
        for row, generator in zip(inputs, generators, strict=True):  # type: ignore[call-overload]
            said = list(beginning.start)
            for step in range(8):
                with torch.inference_mode():
                    feeds = {
                        key: torch.tensor(row)[None],
                        "decoder_input_ids": torch.tensor([said]),
                    }
                    logits = model.base_model(**feeds).logits[0, -1].numpy()
                barred = [
                    *beginning.suppress,
                    *(beginning.begin_suppress if not step else ()),
                ]
                logits[barred] = -np.inf
                said.append(sampling.choose(logits, generator, set(said)))
                if said[-1] in runner.eos_ids:
                    break
            expected.append(said[len(beginning.start) :])
        options: Any = {
            "temperature": 0.8, "top_k": 9, "seed": 5, "repetition_penalty": 1.3,
        }  # fmt: skip
        assert runner.generate_ids(inputs, "every", 8, **options) == expected
        # A row's samples are its own, whatever its neighbours are and do.
        states = ["every", None, "every"]
        mixed = runner.generate_ids(inputs, states, 8, **options)  # type: ignore[arg-type]
        assert (mixed[0], mixed[2]) == (expected[0], expected[2])
        assert mixed[1] == runner.generate_ids(inputs[1:2], None, 8, **options)[0]  # type: ignore[index]
        assert runner.generate_ids(inputs, "every", 8) != expected

    def test_a_fault_is_found(self, exported: Exported, tmp_path: Path) -> None:
        bundle = Path(shutil.copytree(exported.output, tmp_path / "bundle"))
        file = bundle / "adapters" / "every" / "adapter.onnx_adapter"
        tensors = read_adapter(file)
        wrong = {name: x * 2 if name.endswith(".B") else x for name, x in tensors.items()}
        write_adapter(file, wrong)
        signed(bundle)
        for reference in (None, exported.base):
            report = lora_edge.validate(bundle, reference=reference)
            assert not report.passed
            assert {"every"} <= {name for case in report.failures for name in case.adapters}
            assert not report.adapter_passed("every")
            assert report.adapter_passed("some")

    def test_the_facts_are_kept(self, exported: Exported) -> None:
        manifest = lora_edge.Runner(exported.output).bundle.manifest
        assert set(manifest.parts) == {"encoder", "decoder"}
        whisper = exported.family == "whisper"
        assert manifest.task == (
            "automatic-speech-recognition" if whisper else "text2text-generation"
        )
        assert manifest.reads.sample == ((16, 40) if whisper else ())
        assert manifest.beginning is not None
        assert manifest.beginning.suppress == ((5, 9) if whisper else ())
        assert manifest.beginning.begin_suppress == ((7, 2) if whisper else ())
        assert all("encoder." in path for path in manifest.parts["encoder"].sites)
        assert not any(".encoder." in path for path in manifest.parts["decoder"].sites)
        assert all(part.sites for part in manifest.parts.values())
        assert "optimum" in manifest.versions["optimum-onnx"] or manifest.versions["optimum-onnx"]

    def test_an_adapter_added_later_is_proved(self, exported: Exported, tmp_path: Path) -> None:
        bundle = Path(shutil.copytree(exported.output, tmp_path / "bundle"))
        family = exported.family
        late = make_seq2seq_adapter(
            exported.base, tmp_path / "late", family, 7, r=2, target_modules=ALL[family][1:3]
        )
        lora_edge.add(bundle, {"late": late})
        embedding = "shared" if family.startswith("t5") else "embed_tokens"
        other = make_seq2seq_adapter(
            exported.base, tmp_path / "other", family, 7, r=2, target_modules=[embedding]
        )
        with pytest.raises(UnsupportedAdapterError, match=rf"{embedding} is a layer of kind emb"):
            lora_edge.add(bundle, {"other": other})
        assert not lora_edge.validate(bundle).passed
        assert lora_edge.validate(bundle, reference=exported.base).passed


@pytest.mark.parametrize("family", ["t5"])
class TestKindsWithOptimum:
    pytestmark = optimum

    @pytest.mark.parametrize("mode", ["switchable", "merged"])
    @pytest.mark.parametrize(
        "settings",
        [
            {"use_dora": True, "target_modules": ["q", "wo"]},
            {"bias": "lora_only", "lora_bias": True, "target_modules": ["k", "wi"]},
            {"target_modules": ["q"], "modules_to_save": ["wo"]},
            {"target_modules": ["v", "lm_head"]},
        ],
        ids=["dora", "lora_bias", "modules_to_save", "tied head"],
    )
    def test_kind(
        self, family: str, mode: str, settings: dict[str, object], tmp_path: Path
    ) -> None:
        base = make_seq2seq(family, tmp_path / "base")
        adapter = make_seq2seq_adapter(base, tmp_path / "a", family, 3, r=3, **settings)
        out = tmp_path / "out"
        lora_edge.export(base, {"a": adapter}, mode, out, backend="optimum")  # type: ignore[arg-type]
        assert lora_edge.validate(out, reference=base).passed

    @pytest.mark.parametrize("mode", ["switchable", "merged"])
    @pytest.mark.parametrize(
        ("target", "kind"),
        [("shared", "embedding"), ("relative_attention_bias", "embedding")],
    )
    def test_other_layers_are_refused(
        self, family: str, mode: str, target: str, kind: str, tmp_path: Path
    ) -> None:
        base = make_seq2seq(family, tmp_path / "base")
        adapter = make_seq2seq_adapter(base, tmp_path / "a", family, r=3, target_modules=[target])
        with pytest.raises(UnsupportedAdapterError, match=rf"{target} is a layer of kind {kind}"):
            lora_edge.export(base, {"a": adapter}, mode, tmp_path / "out", backend="optimum")  # type: ignore[arg-type]
        assert not (tmp_path / "out").exists()

    def test_text_in_and_out(self, family: str, tmp_path: Path) -> None:
        base = make_seq2seq(family, tmp_path / "base")
        give_words(base)
        adapter = make_seq2seq_adapter(base, tmp_path / "a", family, r=3, target_modules=["q"])
        out = tmp_path / "out"
        command = [str(base), "-a", f"a={adapter}", "-o", str(out)]
        done = CliRunner().invoke(export, [*command, "--backend", "optimum"])
        assert done.exit_code == 0, done.output
        runner = lora_edge.Runner(out)
        prompts = ["w5 w6 w7", "w9"]
        ids = runner.generate_ids([[5, 6, 7, 1], [9, 1]], "a", 6)
        texts = runner.generate(prompts, "a", 6)
        assert texts == [" ".join(f"w{x}" for x in row if x > 1) for row in ids]
        command = [str(out), "-a", "a", "-p", prompts[0], "--max-new-tokens", "6"]
        done = CliRunner().invoke(run, command)
        assert (done.exit_code, done.stdout.strip()) == (0, texts[0])
        assert "".join(runner.stream(prompts[0], "a", 6)) == texts[0]
        assert len(list(runner.stream(prompts[0], "a", 6))) > 1
        cut = texts[0].split()[2]
        assert runner.generate(prompts[0], "a", 6, stop=cut) == [texts[0].partition(cut)[0]]
        command += ["--temperature", "0.7", "--seed", "4"]
        sampled = runner.generate(prompts[0], "a", 6, temperature=0.7, seed=4)
        done = CliRunner().invoke(run, command)
        assert (done.exit_code, done.stdout.strip()) == (0, sampled[0].strip())
        with pytest.raises(DataError, match="chat template"):
            runner.generate(prompts, chat=True)
        with pytest.raises(lora_edge.LoraEdgeError, match="encoder and a decoder"):
            runner.logits([[1, 2]])


@pytest.mark.parametrize("mode", ["switchable", "merged"])
@pytest.mark.parametrize(
    ("family", "settings", "changed"),
    [
        ("bart", {"target_modules": ["q_proj"], "bias": "all"}, ".bias"),
        ("whisper", {"target_modules": ["v_proj"], "bias": "all"}, ".bias"),
        ("t5", {"target_modules": ["q"], "modules_to_save": ["layer_norm"]}, "layer_norm.weight"),
    ],
)
def test_norms_and_biases_of_any_layer(
    family: str, settings: dict[str, Any], changed: str, mode: str, tmp_path: Path
) -> None:
    """What an adapter replaces of norms and convolutions, in both graphs."""
    from safetensors.numpy import load_file, save_file

    base = make_seq2seq(family, tmp_path / "base")
    adapter = make_seq2seq_adapter(base, tmp_path / "a", family, 2, r=3, **settings)
    file = adapter / "adapter_model.safetensors"
    random = np.random.default_rng(1)
    tensors = {
        key: x + random.normal(0, 0.3, x.shape).astype(x.dtype) if key.endswith(changed) else x
        for key, x in load_file(file).items()
    }
    save_file(tensors, file)
    assert {"encoder" in key for key in tensors if "norm" in key} == {True, False}
    out = tmp_path / "out"
    lora_edge.export(base, {"a": adapter}, mode, out, backend="optimum")  # type: ignore[arg-type]
    report = lora_edge.validate(out, reference=base)
    assert report.passed, report.table()


def test_what_peft_cannot_run_is_refused(tmp_path: Path) -> None:
    """Whisper's encoder reads the stride of a convolution that PEFT has wrapped."""
    base = make_seq2seq("whisper", tmp_path / "base")
    adapter = make_seq2seq_adapter(base, tmp_path / "a", "whisper", r=3, target_modules=["conv1"])
    with pytest.raises(lora_edge.AdapterError, match="PEFT loads adapter a and cannot run it"):
        lora_edge.export(base, {"a": adapter}, output=tmp_path / "out", backend="optimum")
    assert not (tmp_path / "out").exists()


test_what_peft_cannot_run_is_refused.pytestmark = optimum  # type: ignore[attr-defined]
test_norms_and_biases_of_any_layer.pytestmark = [  # type: ignore[attr-defined]
    *test_norms_and_biases_of_any_layer.pytestmark,  # type: ignore[attr-defined]
    *optimum,
]


def test_bad_inputs_are_refused(exported: Exported) -> None:
    runner = lora_edge.Runner(exported.output)
    inputs = exported.inputs(2)
    with pytest.raises(DataError, match="outside the vocabulary"):
        runner.seq2seq_logits(inputs, [[3], [VOCAB]])  # type: ignore[arg-type]
    with pytest.raises(DataError, match="1 rows were given to the decoder and 2"):
        runner.seq2seq_logits(inputs, [[3]])  # type: ignore[arg-type]
    with pytest.raises(DataError, match="2 adapters were given for 1 rows"):
        runner.generate_ids(inputs[:1], ["some", None], 3)  # type: ignore[index]
    if exported.family == "whisper":
        with pytest.raises(DataError, match=r"expected \[batch, 16, 40\] float32"):
            runner.generate_ids(inputs[:, :, :-1])  # type: ignore[index,call-overload]
        with pytest.raises(DataError, match="48"):
            runner.generate_ids(inputs, None, 64)  # type: ignore[arg-type]


test_bad_inputs_are_refused.pytestmark = optimum  # type: ignore[attr-defined]


@pytest.mark.parametrize("task", [None, "text2text-generation"])
def test_the_trace_backend_refuses_with_the_way_out(task: str | None, tmp_path: Path) -> None:
    base = make_seq2seq("t5", tmp_path / "base")
    with pytest.raises(
        UnsupportedModelError, match=r"t5 models are refused by the trace"
    ) as caught:
        lora_edge.export(base, output=tmp_path / "out", task=task)
    assert "--backend optimum" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_another_task_is_refused_with_the_way_out(tmp_path: Path) -> None:
    base = make_seq2seq("t5", tmp_path / "base")
    with pytest.raises(UnsupportedModelError, match="is_encoder_decoder is True") as caught:
        lora_edge.export(base, output=tmp_path / "out", task="text-generation")
    assert "--task text2text-generation" in caught.value.hint


def test_without_optimum_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_seq2seq("t5", tmp_path / "base")
    for name in [x for x in sys.modules if x.split(".")[0] == "optimum"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "optimum", None)
    with pytest.raises(MissingDependencyError, match="optimum") as caught:
        lora_edge.export(base, output=tmp_path / "out", backend="optimum")
    assert "lora-edge[optimum]" in caught.value.hint


def test_a_decoder_only_model_has_no_seq2seq_task(tmp_path: Path) -> None:
    base = make_seq2seq("t5", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"is_encoder_decoder": False}))
    with pytest.raises(lora_edge.LoraEdgeError, match=r"needs an encoder-decoder|optimum"):
        lora_edge.export(
            base, output=tmp_path / "out", backend="optimum", task="text2text-generation"
        )
