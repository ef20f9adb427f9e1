"""``lora-edge train``: a base and a jsonl file -> a PEFT adapter."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from lora_edge.training.loop import Progress

_NUMBER = re.compile(r"\d+(\.\d+)?")
_REGEX_SIGNS = re.compile(r"[\\^$*+?()\[\]{}|]")


def _pattern(text: str) -> tuple[str, str]:
    key, separator, number = text.rpartition("=")
    if not (key and separator and _NUMBER.fullmatch(number)):
        raise click.BadParameter(f"{text!r} is not KEY=NUMBER, such as q_proj=4")
    return key, number


@click.command()
@click.argument("base")
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="The adapter's folder."
)
@click.option("--rank", default=8, show_default=True, help="r of every adapted module.")
@click.option("--alpha", default=16.0, show_default=True, help="The scaling is alpha / rank.")
@click.option(
    "--target-modules",
    help="Module names with commas between (q_proj,v_proj), or a regex over whole module paths. "
    "[default: every linear layer but the output head]",
)
@click.option("--rslora", is_flag=True, help="Scale by alpha / sqrt(rank).")
@click.option(
    "--rank-pattern",
    "rank_patterns",
    multiple=True,
    type=_pattern,
    metavar="KEY=RANK",
    help="Another rank for the modules of this name or regex. Repeatable; the first match wins.",
)
@click.option(
    "--alpha-pattern",
    "alpha_patterns",
    multiple=True,
    type=_pattern,
    metavar="KEY=ALPHA",
    help="Another alpha for the modules of this name or regex. Repeatable; the first match wins.",
)
@click.option("--dropout", default=0.0, show_default=True, help="On the input of lora_A.")
@click.option("--epochs", default=3.0, show_default=True, help="Passes over the data.")
@click.option("--lr", default=2e-4, show_default=True, help="Peak learning rate.")
@click.option(
    "--weight-decay",
    default=0.0,
    show_default=True,
    help="AdamW's; keeps the adapter's change to the base small.",
)
@click.option("--batch-size", default=8, show_default=True, help="Examples per step.")
@click.option(
    "--max-length",
    type=int,
    help="Tokens per example. [default: 1024, or fewer where the base has fewer positions]",
)
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same bytes.")
@click.option("--force", is_flag=True, help="Replace an adapter that is already in the folder.")
def command(
    base: str,
    data: Path,
    output: Path,
    *,
    rank: int,
    alpha: float,
    target_modules: str | None,
    rslora: bool,
    rank_patterns: tuple[tuple[str, str], ...],
    alpha_patterns: tuple[tuple[str, str], ...],
    dropout: float,
    epochs: float,
    lr: float,
    weight_decay: float,
    batch_size: int,
    max_length: int | None,
    seed: int,
    force: bool,
) -> None:
    """Train a LoRA adapter for BASE (a folder or hub id) on DATA.

    DATA is a jsonl file; each line is {"prompt": "...", "completion": "..."}: the loss is on the
    completion and the end token after it. Or each line is {"text": "...", "label": "..."}: a
    classifier with its head. Prints the adapter's folder.
    """
    from lora_edge.training import train

    shown = _Bar() if sys.stderr.isatty() else _Lines()
    try:
        path = train(
            base,
            data,
            output,
            rank=rank,
            alpha=alpha,
            target_modules=split_targets(target_modules),
            rslora=rslora,
            rank_pattern={key: _whole(number) for key, number in rank_patterns},
            alpha_pattern={key: float(number) for key, number in alpha_patterns},
            dropout=dropout,
            epochs=epochs,
            lr=lr,
            weight_decay=weight_decay,
            batch_size=batch_size,
            max_length=max_length,
            seed=seed,
            force=force,
            progress=shown,
            notify=lambda line: click.echo(line, err=True),
        )
    finally:
        shown.close()
    click.echo(path)


def split_targets(text: str | None) -> str | list[str] | None:
    """``a,b`` -> names; a text with regex signs, or ``all-linear``, stays one text."""
    if text is None or text == "all-linear" or _REGEX_SIGNS.search(text):
        return text
    return [name.strip() for name in text.split(",") if name.strip()]


def _whole(number: str) -> int:
    if not number.isdecimal():
        raise click.BadParameter(f"--rank-pattern: {number} is not a whole number")
    return int(number)


class _Lines:
    """A line for every tenth of the run."""

    def __init__(self) -> None:
        self._tenths = 0

    def __call__(self, at: Progress) -> None:
        tenths = 10 * at.step // at.steps
        if tenths > self._tenths:
            self._tenths = tenths
            click.echo(f"step {at.step}/{at.steps}  {_figures(at)}", err=True)

    def close(self) -> None:
        """Nothing is open."""


class _Bar:
    """A progress bar with loss, tokens/s and the time left."""

    def __init__(self) -> None:
        self._opened: click._termui_impl.ProgressBar[Progress] | None = None
        self._done = 0

    def __call__(self, at: Progress) -> None:
        if self._opened is None:
            self._opened = click.progressbar(
                length=at.steps,
                file=sys.stderr,
                show_pos=True,
                item_show_func=lambda item: None if item is None else _figures(item),
            )
            self._opened.render_progress()
        self._opened.update(at.step - self._done, at)
        self._done = at.step

    def close(self) -> None:
        """Leave the last state on its own line."""
        if self._opened is not None:
            self._opened.render_finish()


def _figures(at: Progress) -> str:
    return f"loss {at.loss:.4f}  {at.tokens_per_second:,.0f} tokens/s"
