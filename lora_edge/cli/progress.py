"""How a training run shows where it is: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from lora_edge.training.callbacks import Progress


class Lines:
    """A line for every tenth of the run."""

    def __init__(self) -> None:
        self._tenths = 0

    def __call__(self, at: Progress) -> None:
        tenths = 10 * at.step // at.steps
        if tenths > self._tenths:
            self._tenths = tenths
            click.echo(
                f"step {at.step}/{at.steps}  {_figures(at)}  {_clock(at.seconds_left)} left",
                err=True,
            )

    def close(self) -> None:
        """Nothing is open."""


class Bar:
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
                show_eta=False,  # it would count a resumed run's first steps as done in no time
                item_show_func=lambda item: (
                    None if item is None else f"{_figures(item)}  {_clock(item.seconds_left)} left"
                ),
            )
            self._opened.render_progress()
        self._opened.update(at.step - self._done, at)
        self._done = at.step

    def close(self) -> None:
        """Leave the last state on its own line."""
        if self._opened is not None:
            self._opened.render_finish()


def _figures(at: Progress) -> str:
    judged = "" if at.eval_loss is None else f"  eval {at.eval_loss:.4f}"
    return f"loss {at.loss:.4f}{judged}  {at.tokens_per_second:,.0f} tokens/s"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
