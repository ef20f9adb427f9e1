"""Every refusal and failure of lora-edge.

::

    LoraEdgeError                     exit code 2
    ├── AdapterError                  a PEFT directory that cannot be read, or is not what it claims
    │   └── UnsupportedAdapterError   readable, but refused by name: exporting it would be wrong
    ├── BaseModelError                a base model that cannot be read
    │   └── UnsupportedModelError     readable, but refused by name
    ├── CaptureError                  the base graph could not be made, or differs from PyTorch
    ├── GraphError                    a graph pass cannot do what was asked of it
    ├── BundleError                   a bundle (or its folder) that is missing, damaged, in the way
    ├── AdapterNotFoundError          a name that the bundle does not have
    ├── ProviderError                 an execution provider that is missing or would fall back
    ├── DataError                     training data, prompts or token ids that cannot be used
    ├── OptionError                   an argument of a wrong type, or outside its values
    ├── MissingDependencyError        an optional extra that is not installed
    ├── OutOfMemoryError              a training step that does not fit in the device's memory
    ├── InterruptedRunError           exit code 130: training was told to stop; a checkpoint is kept
    └── ParityError                   exit code 1: the numbers differ, or prove nothing

The message says what was found and what was expected; ``hint`` says what to do next. The command
line prints both on one line each and exits with ``exit_code``.
"""

from __future__ import annotations

from typing import ClassVar


class LoraEdgeError(Exception):
    """Base of every error that lora-edge raises on purpose.

    Attributes:
        hint: what to do next, one sentence; may be empty.
        exit_code: exit status of the command line (1 parity, 2 everything else).
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class AdapterError(LoraEdgeError):
    """A PEFT directory that cannot be read, or is not what it claims to be."""


class UnsupportedAdapterError(AdapterError):
    """An adapter that is refused by name, because exporting it would give wrong results."""


class BaseModelError(LoraEdgeError):
    """A base model that cannot be read."""


class UnsupportedModelError(BaseModelError):
    """A base model whose architecture is refused by name."""


class CaptureError(LoraEdgeError):
    """The base graph could not be made, or its outputs differ from PyTorch's."""


class GraphError(LoraEdgeError):
    """A graph pass cannot do what was asked of it."""


class BundleError(LoraEdgeError):
    """A bundle, or the folder meant for one, that is missing, damaged or in the way."""


class AdapterNotFoundError(LoraEdgeError):
    """An adapter name that the bundle does not have."""


class ProviderError(LoraEdgeError):
    """An execution provider that is not available, or would silently fall back."""


class DataError(LoraEdgeError):
    """Training data, prompts or token ids that cannot be used."""


class OptionError(LoraEdgeError):
    """An option or argument that has a wrong type, or a value that it cannot have."""


class MissingDependencyError(LoraEdgeError):
    """An optional dependency that is not installed; the hint names the extra."""

    @staticmethod
    def of_export(error: ImportError) -> MissingDependencyError:
        """Exporting needs what could not be imported."""
        return MissingDependencyError(
            f"exporting needs {error.name}, which is not installed",
            "Install it with: pip install 'lora-edge[export]'",
        )


class OutOfMemoryError(LoraEdgeError):
    """A training step that does not fit in the device's memory."""


class InterruptedRunError(LoraEdgeError):
    """A training run that was told to stop, and that can go on from a checkpoint."""

    exit_code: ClassVar[int] = 130


class ParityError(LoraEdgeError):
    """The exported adapter does not do what it did in PyTorch, or the check proves nothing."""

    exit_code: ClassVar[int] = 1
