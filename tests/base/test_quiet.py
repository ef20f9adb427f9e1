"""Loading a model says nothing of transformers' own, and leaves its settings as they were."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import transformers
from transformers.utils import logging as settings

from lora_edge.base.checkpoint import resolve_base
from lora_edge.base.model import load_model
from lora_edge.base.quiet import quiet
from lora_edge.parity.reference import Reference
from lora_edge.tasks.task import Task
from tests.support.paths import ROOT

BASE = ROOT / "models" / "tiny-bert"
OLD = transformers.__version__.startswith("4.")
TASK = Task("text-classification", 4)


@contextmanager
def _loud() -> Iterator[io.StringIO]:
    """transformers as it comes, its log also written to what is yielded."""
    level, shown = settings.get_verbosity(), settings.is_progress_bar_enabled()
    handler = logging.StreamHandler(io.StringIO())
    settings.set_verbosity_warning()
    settings.enable_progress_bar()
    logging.getLogger("transformers").addHandler(handler)
    try:
        yield handler.stream
        assert settings.get_verbosity() == settings.WARNING
        assert settings.is_progress_bar_enabled()
    finally:
        logging.getLogger("transformers").removeHandler(handler)
        settings.set_verbosity(level)
        if not shown:
            settings.disable_progress_bar()


def _capture() -> None:
    load_model(resolve_base(BASE), None, TASK)


def _reference() -> None:
    Reference(resolve_base(BASE), TASK)


@pytest.mark.parametrize("load", [_capture, _reference])
def test_loading_a_base_without_its_head_prints_nothing(
    load: Callable[[], None], capfd: pytest.CaptureFixture[str]
) -> None:
    with _loud() as log:
        load()
        assert (log.getvalue(), *capfd.readouterr()) == ("", "", "")


def test_transformers_alone_reports_the_head_that_it_makes_up(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The control: what the test above would see."""
    with _loud() as log:
        transformers.AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=4)
        assert "classifier" in log.getvalue()
        # transformers 4 shows a bar for checkpoints of several files only.
        assert OLD or "Loading weights" in capfd.readouterr().err


def test_warnings_are_ignored_all_or_by_name_and_settings_come_back() -> None:
    known = (("known", UserWarning),)
    with warnings.catch_warnings(record=True) as seen, _loud():
        warnings.simplefilter("always")
        with quiet():
            warnings.warn("anything", RuntimeWarning, stacklevel=1)
            assert not settings.is_progress_bar_enabled()
            assert settings.get_verbosity() == settings.ERROR
        with quiet(known):
            warnings.warn("known by its name", UserWarning, stacklevel=1)
            warnings.warn("unknown", UserWarning, stacklevel=1)
            warnings.warn("known by its name", RuntimeWarning, stacklevel=1)
        with quiet(only=()):
            warnings.warn("known too", UserWarning, stacklevel=1)
        with pytest.raises(ValueError, match="inside"), quiet():
            raise ValueError("inside")
    said = [(str(one.message), one.category) for one in seen]
    assert said == [
        ("unknown", UserWarning),
        ("known by its name", RuntimeWarning),
        ("known too", UserWarning),
    ]
