"""Load the user's own lm-eval tasks, with the Python functions that they name.

A task's functions are the user's code. They are imported from the suite's include_path and from
nowhere else. An error that they raise is reported in one sentence that names them, because a retry
would raise it again.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval.tasks
from jinja2 import TemplateError
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from stillhouse.errors import ConfigError, StillhouseError
from stillhouse.spec import SuiteSpec, TaskSpec
from stillhouse.tasks import chosen, with_data

_NAMED = re.compile(rb"^(?:task|group):[ \t]*[\"']?([\w.-]+)[\"']?[ \t]*$", re.M)


def own_task(suite: SuiteSpec, spec: TaskSpec, ours: tuple[str, ...]) -> Any:
    """The task as lm-eval loads it, with its data. `ours`: names that this project has taken.

    Raises:
        ConfigError: a name that is taken, files that changed, a function or data that is missing
            or fails.
    """
    if spec.asks in ours or spec.asks in _names_of_lm_eval():
        whose = "this project" if spec.asks in ours else "lm-eval"
        raise ConfigError(
            f"task {spec.asks}: {whose} has one of this name, too, and a score must say which was"
            f" asked; rename the one in {suite.include_path}"
        )
    own = chosen(suite, "suite")[spec.asks]
    try:
        config = with_data(load_yaml(own.yaml), own.yaml)
        return TaskManager(include_defaults=False).load([config])["tasks"][spec.asks]
    except (StillhouseError, MemoryError):
        raise
    except Exception as error:  # the user's files, functions and data can raise anything
        if is_unreachable(error):
            raise  # and that says nothing about the task
        raise ConfigError(f"task {spec.asks} ({own.yaml}): {_said(error)}") from error


@contextlib.contextmanager
def blamed(suite: SuiteSpec, spec: TaskSpec) -> Iterator[None]:
    """Turn errors from a user's task functions or templates into a ConfigError that names them."""
    try:
        yield
    except (StillhouseError, MemoryError):
        raise
    except Exception as error:
        if spec.content is None:
            raise
        # lm-eval calls a metric that raised TypeError again, in another way, and raises that.
        raised: list[BaseException | None] = [error, error.__context__]
        for one in filter(None, raised):
            where = _frame(one, suite.include_path)
            if where is not None:
                raise ConfigError(f"task {spec.asks}: {_said(one)} in {where}") from error
        if isinstance(error, TemplateError):
            raise ConfigError(f"task {spec.asks}: {_said(error)}") from error
        raise


def _frame(error: BaseException, include_path: str | None) -> str | None:
    """The innermost place below include_path that an error passed through."""
    root = Path(include_path or "").expanduser().resolve()
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f for f in frames if Path(f.filename).resolve().is_relative_to(root)]
    return f"{inside[-1].filename}, line {inside[-1].lineno}" if inside and include_path else None


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no words'}"


@functools.cache
def _names_of_lm_eval() -> frozenset[str]:
    """The names of lm-eval's own tasks and groups, read as text: its index takes much longer."""
    folder = Path(lm_eval.tasks.__file__).parent
    names = (_NAMED.findall(file.read_bytes()) for file in folder.rglob("*.yaml"))
    return frozenset(name.decode() for found in names for name in found)


def is_unreachable(error: BaseException | None) -> bool:
    """Whether the hub may be used and did not answer; datasets reports that as a missing file."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    if vars(sys.modules["datasets.config"])["HF_HUB_OFFLINE"]:
        return False
    while error is not None:
        if isinstance(error, ConnectionError | LocalEntryNotFoundError):
            return True
        error = error.__cause__ or error.__context__
    return False
