"""What a row of the tables holds: a place where ONNX Runtime runs, and what it takes.

A field says what is known from a run, or from ONNX Runtime's tools, documentation or source.
Where nothing is known, it is ``None``.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Form = Literal["fused", "portable"]

SUFFIX = "ExecutionProvider"


class Package(NamedTuple):
    """What brings a target.

    Attributes:
        name: as its installer takes it.
        installer: what installs it.
        beside: of pip's: it goes beside a wheel of ONNX Runtime; else it is such a wheel.
        systems: where it has the target, as :func:`platform.system` names them; None: not known.
    """

    name: str
    installer: Literal["pip", "npm", "Maven", "CocoaPods"] = "pip"
    beside: bool = False
    systems: tuple[str, ...] | None = None


ANDROID = Package("com.microsoft.onnxruntime:onnxruntime-android", "Maven", systems=("Android",))
IOS = Package("onnxruntime-objc", "CocoaPods", systems=("iOS",))


class Target(NamedTuple):
    """A place where ONNX Runtime runs: an execution provider, or a client that runs bundles.

    Attributes:
        name: short name, e.g. ``cpu``, ``cuda``, ``genai``.
        runs: what runs there, in a few words.
        ort_name: ONNX Runtime's name of the provider; empty: a client.
        packages: what brings it, the best first; empty: nothing that is known.
        device: how its device is found.
        memory: where lora-edge places tensors for it, as ``OrtValue`` names it.
        forms: the forms of a text generator that it takes, the best first.
        dynamic_shapes: it takes graphs with symbolic dimensions.
        zero_size: it takes tensors with a zero-size dimension, so that "no adapter" costs nothing.
        runtime_weights: it multiplies by weights that are inputs, as those of adapters are; if not,
            a merged bundle leaves less to the CPU.
        dtypes: floats that it was seen to compute in.
        quantization: how weights of few bits may be written: ``MatMulNBits``, ``QDQ``,
            ``dynamic int8``.
        adapter_api: it has a call that loads and activates ``.onnx_adapter`` files.
        io_binding: it reads and writes tensors where they are.
        mixed_rows: rows of one batch may have different adapters.
        tasks: those that it runs; empty: any.
        defaults: options of its own that lora-edge sets unless they are given.
        options: names of options of its own; not all of them.
        seen: what was run or checked; None: nothing yet.
        notes: what else is known.
    """

    name: str
    runs: str
    ort_name: str = ""
    packages: tuple[Package, ...] = ()
    device: str | None = None
    memory: Literal["cpu", "cuda"] = "cpu"
    forms: tuple[Form, ...] | None = None
    dynamic_shapes: bool | None = None
    zero_size: bool | None = None
    runtime_weights: bool | None = None
    dtypes: tuple[str, ...] | None = None
    quantization: tuple[str, ...] | None = None
    adapter_api: bool | None = None
    io_binding: bool | None = None
    mixed_rows: bool | None = None
    tasks: tuple[str, ...] = ()
    defaults: tuple[tuple[str, str], ...] = ()
    options: tuple[str, ...] = ()
    seen: str | None = None
    notes: tuple[str, ...] = ()

    def called(self, name: str) -> bool:
        """Whether this is its short name, or ONNX Runtime's own, in any case."""
        return name != "" and name.lower() in (self.name, self.ort_name.lower())

    def does(self, task: str) -> bool:
        """Whether it runs a task."""
        return not self.tasks or task in self.tasks

    @property
    def form(self) -> Form | None:
        """The form of a text generator to export for it; None where that is not known."""
        return self.forms[0] if self.forms else None
