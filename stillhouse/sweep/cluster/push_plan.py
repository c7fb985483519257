"""Implement `stillhouse push PATH`: say what is sent, send it, and say how pods refer to it."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from stillhouse.compose import Overrides, compose
from stillhouse.errors import DONE, ConfigError
from stillhouse.local_models import SUFFIXES
from stillhouse.receive import name_of
from stillhouse.spec import TrainSpec
from stillhouse.sweep.cluster import push as pushed
from stillhouse.sweep.cluster.collect import size
from stillhouse.sweep.cluster.connect import connect
from stillhouse.sweep.cluster.manifest import image_problem
from stillhouse.sweep.cluster.push import PUSHED, Load
from stillhouse.text import say

if TYPE_CHECKING:
    from stillhouse.sweep.call import Call


def push(call: Call) -> int:
    """Bring weights, rows or tasks to the cache volume of a cluster."""
    if call.target is None:
        raise ConfigError("push what? `stillhouse push PATH`: a model's directory, or rows")
    if not call.is_cluster:
        raise ConfigError("that is done in a cluster: say --backend cluster")
    try:
        return _push(call, pushed.load(Path(call.target).expanduser()))
    except OSError as error:  # what this machine does not let us read
        raise ConfigError(f"{error.filename or call.target}: {error.strerror or error}") from error


def _push(call: Call, load: Load) -> int:
    site = call.only_site
    with contextlib.redirect_stdout(sys.stderr if call.is_json else sys.stdout):
        _print(load.lines())
        if not call.is_sure:
            pushed.refuse_large(load)
        problem = image_problem(site)
        if problem:
            raise ConfigError(problem)
        pushed.refuse_keys(load)
        with contextlib.closing(connect(site.kube_context, site.namespace)) as cluster:
            memory = Path(compose(Overrides({}, {}), TrainSpec).place.cache_dir).expanduser()
            files = pushed.list_of(load, memory)
            sent = pushed.push(cluster, site, load, files, _say)
    there = f"{PUSHED}/{name_of(load.label, files)}"
    if load.path.is_file():
        there = f"{there}/{load.path.name}"
    words, more = words_for(load, there)
    if call.is_json:
        said = {"path": there, "words": words, "files": len(files), "bytes": load.bytes}
        print(json.dumps(said | {"sent": sent}))
        return DONE
    say(f"{size(sent)} were sent; pods find it at {there}" if sent else f"{there} was there")
    say(f"  {words}{f'   ({more})' if more else ''}")
    return DONE


def words_for(load: Load, there: str) -> tuple[str, str]:
    """How a pushed path is said on a command line, and what else it may be."""
    if load.path.is_file():
        return f"data=local data_path={there}", "or rescue's other_file="
    if "adapter_config.json" in load.files:
        return f"lora_paths=[{there}]", "of k8s/eval.sh"
    if "config.json" in load.files:
        return f"student={there}", f"or teacher={there}"
    if any(name.endswith(SUFFIXES) for name in load.files):
        return f"data=local data_path={there}", "data_split=train"
    if any(name.endswith((".yaml", ".yml")) for name in load.files):
        here = shlex.quote(str(load.path))
        return f"include_path={here}", "tasks travel with a sweep as they are, also without a push"
    return there, ""


def _print(lines: list[str]) -> None:
    for line in lines:
        say(line)


def _say(text: str) -> None:
    say(text, file=sys.stderr, flush=True)
