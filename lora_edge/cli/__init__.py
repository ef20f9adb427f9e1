"""The command ``lora-edge``: one file for each verb, loaded when it is called.

Data goes to stdout; progress, hints and errors go to stderr. Exit codes: 0 passed; 1 parity failed
or unproved; 2 usage, environment or export error; 130 interrupted.
"""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType

import click

from lora_edge import __version__
from lora_edge.cli.streams import unheard
from lora_edge.errors import LoraEdgeError

_VERBS = {
    "train": "Train a LoRA adapter on texts, chats, labels or images.",
    "export": "Export a base model and adapters to one ONNX bundle.",
    "add": "Add adapters to an existing bundle.",
    "remove": "Remove adapters from a bundle.",
    "run": "Generate text, or label texts and images, with a bundle.",
    "bench": "Measure how fast a bundle is, beside itself and beside others.",
    "validate": "Check a bundle against PyTorch, or against its own golden cases.",
    "golden": "Keep your own prompts in a bundle as golden cases.",
    "native": "Build an optional library that makes adapters cost less.",
    "kit": "Write a small project that runs a bundle: a web page, for Node, in Python.",
    "package": "Write bundles as a model package of ONNX Runtime, or check one.",
    "inspect": "Show what an adapter or a bundle holds.",
    "targets": "Show where bundles run, and what this machine can run.",
}


class _LazyGroup(click.Group):
    """A group that imports a verb's module only to run it or to show its own help."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _VERBS:
            return None
        command: click.Command = importlib.import_module(f"lora_edge.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(_VERBS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lora-edge")
def cli() -> None:
    """LoRA adapters from PyTorch to ONNX Runtime: exact, switchable, proved.

    \b
    Exit codes: 0 passed, 1 parity failed or unproved, 2 any other error.
    LORA_EDGE_DEBUG=1 shows tracebacks.
    """


def main(arguments: Sequence[str] | None = None, *, restore: bool = False) -> None:
    """Run the command line and exit with its exit code.

    Args:
        arguments: those of the command line; ``None``: the process's own.
        restore: let Ctrl-C unwind the stack from now on (see :mod:`lora_edge.__main__`).
    """
    # A polite kill must unwind the stack, so that half-written folders are removed.
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(_run(arguments, restore))


def _terminate(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    raise KeyboardInterrupt


def _run(arguments: Sequence[str] | None, restore: bool) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    # What a verb is called for is done though nobody reads along; `run` has nothing else to do.
    with unheard(goes_on=given[:1] != ["run"]):
        return _code(given, restore)


def _code(arguments: Sequence[str], restore: bool) -> int:
    try:
        if restore:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        # Without standalone mode click returns the code of ctx.exit() instead of exiting with it.
        code = cli.main(arguments, prog_name="lora-edge", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()  # what fails here is told as an error
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return 2
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; nothing was left behind", err=True)
        return 130
    except LoraEdgeError as error:
        _complain(str(error), error.hint)
        return error.exit_code
    except OSError as error:
        hints = {
            errno.ENOSPC: "The disk is full; free some space, nothing half-written was left.",
            errno.EFBIG: "The file is larger than this system allows; nothing was left.",
            errno.EACCES: "Check the permissions of the folder.",
            # numpy and others write short without an error number.
            None: "Is the disk full? Free some space; nothing half-written was left.",
        }
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        if error.errno is None:
            what = f"a file could not be written or read whole: {error}"
        _complain(what, hints.get(error.errno, "Check the path, its folder and the disk."))
        return 2
    except Exception as error:  # noqa: BLE001  an uncaught exception would exit with 1, "parity failed"
        _complain(
            f"unexpected {type(error).__name__}: {error}",
            "This is a fault of lora-edge; run again with LORA_EDGE_DEBUG=1 and report it.",
        )
        return 2


def _complain(message: str, hint: str) -> None:
    if os.environ.get("LORA_EDGE_DEBUG") == "1":
        traceback.print_exc()
    click.echo(f"error: {' '.join(message.split())}", err=True)
    if hint:
        click.echo(f"hint: {' '.join(hint.split())}", err=True)
