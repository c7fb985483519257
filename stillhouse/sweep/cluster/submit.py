"""Send the Job of a line of k8s/train.sh or k8s/eval.sh, or report the state of one sent before.

the same content was sent before     its state is reported, nothing is sent
… under another name                 the name becomes one more of that run
the name means something else        refused, with the difference
"""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from stillhouse.compose import compose, from_command_line
from stillhouse.errors import DONE, ConfigError
from stillhouse.rundir import Json, RunDir
from stillhouse.spec import TrainSpec, versioned
from stillhouse.sweep.cluster import doctor
from stillhouse.sweep.cluster.cache import NamespaceCache
from stillhouse.sweep.cluster.connect import ApiError, Cluster, connect
from stillhouse.sweep.cluster.facts import JobFacts, observed
from stillhouse.sweep.cluster.jobspec import RUNS
from stillhouse.sweep.cluster.kueue import OF_JOBS, queue_view
from stillhouse.sweep.cluster.ledger import Ledger
from stillhouse.sweep.cluster.manifest import HASH_DIGITS, image_problem, to_yaml
from stillhouse.sweep.cluster.objects import OURS, PART_OF, JobView, job_view, viewed
from stillhouse.sweep.cluster.ownership import have_config_map, have_job
from stillhouse.sweep.cluster.pod_logs import pods
from stillhouse.sweep.cluster.replace import of_other_site
from stillhouse.sweep.cluster.run_names import Names
from stillhouse.sweep.cluster.submit_args import Kind, Line, read
from stillhouse.sweep.driver import SOME_FAILED
from stillhouse.sweep.registry import Roster, Row
from stillhouse.sweep.show import as_json
from stillhouse.sweep.site import away_words
from stillhouse.sweep.state import FAILED, Observation
from stillhouse.sweep.sweep_file import text
from stillhouse.text import say as show

Say = Callable[[str], None]


def send(
    kind: Kind, words: list[str], is_dry_run: bool, is_json: bool, options: Sequence[str] = ()
) -> int:
    """Send the Job of a line; the exit code: 0, or 1 where a Job sent before has failed.

    `options` are those of the entry point in the pod.

    Raises:
        ConfigError: a mistake in the line, or something that the cluster lacks.
    """
    line = read(kind, words[0] if words else None, words[1:], options)
    if is_dry_run:
        return _dry_run(line)
    problem = image_problem(line.site)
    if problem:
        raise ConfigError(problem)
    manifest = line.manifest  # whatever cannot be right in it is said before anybody is asked
    say: Say = lambda said: show(said, sys.stderr if is_json else sys.stdout)  # noqa: E731
    for said in line.about():
        say(said)
    sender = _Sender(line, connect(line.site.kube_context, line.site.namespace), say)
    was_sent = sender.send(manifest)
    seen = sender.look()
    if is_json:
        row = Row(line.step.id, line.step.name.rpartition("-")[0], line.name, {})
        said = as_json(Roster(line.name, Path("runs"), (row,), None, ()), {row.id: seen})
        print(json.dumps(said | {"job": line.step.name, "sent": was_sent}))
    return SOME_FAILED if seen.state in FAILED else DONE


def _dry_run(line: Line) -> int:
    sys.stdout.write(to_yaml(line.manifest))
    problem = image_problem(line.site)
    if problem:
        show(f"not to be sent as it is: {problem}", sys.stderr)
    more = [f"ConfigMap stillhouse-code-{line.code.key} (the code)"]
    more += ["the name, in ConfigMap stillhouse-names"] if line.kind == "train" else []
    print(f"would be sent too, where it is not there yet: {', '.join(more)}", file=sys.stderr)
    return DONE


class _Sender:
    """One line, and the cluster that it goes to."""

    def __init__(self, line: Line, cluster: Cluster, say: Say) -> None:
        self.line, self.cluster, self.say = line, cluster, say
        self.step, self.site = line.step, line.site
        self.names = Names(cluster)
        self.ledger = Ledger(cluster, self.site.runs_claim)

    def send(self, manifest: Json) -> bool:
        """Send the Job, or report the state of one sent before; whether it was sent now."""
        known = self.names.read()
        if self.line.kind == "train":
            self._refuse_other_meaning(known)
        self._say_of_adapters(known)
        seen = self.look()
        if self.job is None and seen.state in ("new", "waiting"):
            doctor.require(self.cluster, self.site)
            self._claim()
            have_config_map(self.cluster, self.line.code.manifest)
            if have_job(self.cluster, self.step, manifest):
                self.say(f"sent: Job {self.step.name} in namespace {self.cluster.namespace}")
                self._how_to_go_on()
                return True
            seen = self.look()  # somebody was quicker
        else:
            self._claim()
        self._say_what_became(seen, known)
        return False

    # ---------------------------------------------------------------------------- looking

    def look(self) -> Observation:
        """The state of this line's Job, from that Job alone; sets `job`.

        Raises:
            ConfigError: a Job of this name is about something else.
        """
        self.job, seen = self._look_at(self.step.name, self.step.id)
        return seen

    def _look_at(self, name: str, id_: str) -> tuple[JobView | None, Observation]:
        self.ledger.refresh([id_], 0.0)
        cache = NamespaceCache(self.ledger)
        found = self.cluster.read("jobs", name)
        if found is None:
            for pod in pods(self.cluster, name):
                cache.learn("pods", pod)  # one whose Job is gone may still write where this would
            return None, cache.look(id_, None)
        labels: dict[str, str] = found["metadata"].get("labels") or {}
        job = viewed(job_view, found)
        if labels.get(PART_OF) != OURS or (
            name == self.step.name and job.hash != self.step.hash[:HASH_DIGITS]
        ):
            raise ConfigError(
                f"Job {name} in namespace {self.cluster.namespace} is not of this content (it has"
                f" hash {job.hash or 'none'}): somebody else's of the same name. Nothing was sent;"
                " look at it (kubectl describe job) and have it removed or renamed"
            )
        cache.learn("jobs", found)
        about = {name, job.uid}
        for pod in pods(self.cluster, name):
            about.add(pod["metadata"]["name"])
            cache.learn("pods", pod)
        if job.state == "live":
            self._learn_reasons(cache, job, about)
        if job.kind == "train":
            return job, cache.look(id_, None)
        is_live = job.state == "live"
        facts = JobFacts(
            is_done=job.state == "complete",
            live=job if is_live else None,
            waits=cache.why(job) if is_live else None,
            failed=cache.how(job) if job.state == "failed" else None,
        )
        return job, observed(facts)

    def _learn_reasons(self, cache: NamespaceCache, job: JobView, about: set[str]) -> None:
        """What events and the queue say of a Job that may wait, where they may be read."""
        if job.is_suspended:
            try:
                of_it = f"{OF_JOBS}={job.uid}"
                pages = self.cluster.pages("workloads", of_it) if self.cluster.kueue() else ()
                views = [cache.viewed(queue_view, item) for items, _ in pages for item in items]
            except ApiError:
                views, cache.may_read_queue = [], False
            cache.replace_queue([view for view in views if view], [job.uid])
            return
        with contextlib.suppress(ApiError):
            for items, _ in self.cluster.pages("events", fields="type=Warning"):
                for item in items:
                    if item.get("involvedObject", {}).get("name") in about:
                        cache.learn("events", item)

    # ------------------------------------------------------------------------------ names

    def _claim(self) -> None:
        if self.line.kind == "train":
            self.names.claim(self.line.name, self.step.name)

    def _refuse_other_meaning(self, known: dict[str, str]) -> None:
        there = known.get(self.line.name)
        if there is None or there == self.step.name:
            return
        raise ConfigError(
            f'k8s/train.sh: the name "{self.line.name}" means {there} already, and this is'
            f" {self.step.name}: {self._difference(there)}. Choose another name"
        )

    def _difference(self, there: str) -> str:
        """Which knobs tell the run that has the name from this one."""
        job = self.cluster.read("jobs", there)
        notes: dict[str, str] = job["metadata"].get("annotations") or {} if job else {}
        words = shlex.split(notes.get("stillhouse/words", ""))
        record = RunDir(Path("runs") / there).record()  # where it was collected
        if words:
            before = versioned(compose(from_command_line(words, TrainSpec), TrainSpec))
        elif record is not None:
            before = record["versioned"]
        else:
            return "another configuration, whose Job is gone"
        assert isinstance(self.line.spec, TrainSpec)
        after = versioned(self.line.spec)
        differ = [
            f"{leaf} is {text(before[section].get(leaf))} there and {text(value)} here"
            for section, leaves in after.items()
            for leaf, value in leaves.items()
            if before[section].get(leaf) != value
        ]
        return ", ".join(differ)

    def _say_of_adapters(self, known: dict[str, str]) -> None:
        """How the runs stand that an evaluation names."""
        for path in self.line.adapters:
            name = Path(path).name
            directory = known.get(name)
            if directory is None:
                self.say(f"  {path}: no run of that name is known; the pod looks on the volume")
                continue
            _, seen = self._look_at(directory, directory.rpartition("-")[2])
            is_there = seen.is_trained or seen.state == "done"
            state = "trained" if is_there else seen.state
            self.say(f"  {path}: {directory}, {state}{f': {seen.cause}' if seen.cause else ''}")
            if not is_there:
                self.say("    not trained yet: the pod exits with 42 if it finds no adapter")

    # ------------------------------------------------------------------------------ telling

    def _say_what_became(self, seen: Observation, known: dict[str, str]) -> None:
        name, there = self.line.name, self._there
        others = [n for n, directory in known.items() if directory == self.step.name and n != name]
        if self.line.kind == "train" and name not in known:
            other = f" {others[0]}" if others else " one that was sent before"
            self.say(f"{name} is the same configuration as{other}: now a name of it, too")
        cause = f": {seen.cause}" if seen.cause else ""
        self.say(f"nothing was sent: {self.step.name} is there already, {seen.state}{cause}")
        other = of_other_site(self.job, self.site) if self.job and self.job.state == "live" else ""
        if other:
            again = f"`stillhouse cancel {self._target} {there}`, then the same line, sends it anew"
            self.say(f"  it was sent from another site: {other}; {again}")
        if self.job is not None and self.job.is_deleting:
            self.say("  its Job is being deleted; the same line sends it again once it is gone")
        elif seen.state in FAILED:
            self.say(
                f"  `stillhouse retry {self._target} {there}`, then the same line, tries again"
            )
        else:
            self._how_to_go_on()

    @property
    def _there(self) -> str:
        return away_words(self.site)

    @property
    def _target(self) -> str:
        return self.line.name if self.line.kind == "train" else self.step.name

    def _how_to_go_on(self) -> None:
        target, there = self._target, self._there
        if self.line.kind == "train":
            self.say(f"run directory: {RUNS}/{self.step.name} of volume {self.site.runs_claim}")
        self.say(f"  follow  stillhouse logs {target} -f {there}")
        self.say(f"  read    stillhouse status {target} {there}")
        if self.line.kind == "train":
            self.say(f"          stillhouse collect {target} {there}")
        self.say(f"  cancel  stillhouse cancel {target} {there}")
