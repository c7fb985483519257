"""Send the Job of a line of k8s/train.sh or k8s/eval.sh, or report the state of one sent before.

the same content was sent before     its state is reported, nothing is sent
… under another name                 the name becomes one more of that run
the name means something else        refused, with the difference
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from stillhouse.errors import DONE, SOME_FAILED, ConfigError
from stillhouse.sweep.cluster import doctor
from stillhouse.sweep.cluster.cache import NamespaceCache
from stillhouse.sweep.cluster.code_bundle import bundle, sweep_file
from stillhouse.sweep.cluster.connect import Cluster, connect
from stillhouse.sweep.cluster.create import JobCreator
from stillhouse.sweep.cluster.describe import how_to_follow
from stillhouse.sweep.cluster.find import Names
from stillhouse.sweep.cluster.jobspec import RUNS, drive_step
from stillhouse.sweep.cluster.manifest import image_problem, to_yaml
from stillhouse.sweep.cluster.objects import JobView
from stillhouse.sweep.cluster.ownership import have_config_map, refuse_drift
from stillhouse.sweep.cluster.refusals import differing, why_not_made
from stillhouse.sweep.cluster.replace import of_other_site
from stillhouse.sweep.cluster.submit_args import Kind, Line, read
from stillhouse.sweep.cluster.watch import Watcher
from stillhouse.sweep.points import Sweep, point_of
from stillhouse.sweep.show import as_json
from stillhouse.sweep.site import away_words
from stillhouse.sweep.state import FAILED, Observation
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
    manifest = line.manifest  # whatever cannot be right in it is said before anybody is asked
    problem = image_problem(line.site)
    of_line = Sweep(line.name, Path("runs"), (point_of(line.step.name, line.name),))
    if is_dry_run:
        text = to_yaml(manifest)
        said = as_json(of_line, {line.step.id: Observation("new")})
        print(json.dumps(said | {"manifests": [text]}) if is_json else text, end="")
        if problem:
            show(f"not to be sent as it is: {problem}", sys.stderr)
        more = [f"ConfigMap stillhouse-code-{line.code.key} (the code)"]
        more += ["the name, in ConfigMap stillhouse-names"] if line.kind == "train" else []
        print(f"would be sent too, where it is not there yet: {', '.join(more)}", file=sys.stderr)
        return DONE
    if problem:
        raise ConfigError(problem)
    say: Say = lambda said: show(said, sys.stderr if is_json else sys.stdout)  # noqa: E731
    for said in line.about():
        say(said)
    was_sent, seen = _Sender(line, say).send()
    if is_json:
        said = as_json(of_line, {line.step.id: seen})
        print(json.dumps(said | {"job": line.step.name, "sent": was_sent}))
    return SOME_FAILED if seen.state in FAILED else DONE


class _Sender:
    """One line, and the namespace that it goes to."""

    def __init__(self, line: Line, say: Say) -> None:
        self.line, self.step, self.site, self.say = line, line.step, line.site, say
        self.cluster = connect(self.site.kube_context, self.site.namespace)
        self.names = Names(self.cluster)
        self.watcher = Watcher(self.cluster, self.site.runs_claim)
        self.cache = self.watcher.cache

    def send(self) -> tuple[bool, Observation]:
        """Send the Job, or report one sent before; whether it was sent now, and its state."""
        known = self.names.read()
        self._refuse_other_meaning(known)
        self.watcher.refresh()
        self._say_of_adapters(known)
        job, seen = self._look()
        is_wanted = job is None and seen.state in ("new", "waiting")
        if is_wanted:
            found = doctor.findings(self.cluster, self.site)
            jobs = self.cache.jobs()
            owner = self.site.owner
            doctor.refuse([*found, *doctor.job_findings(self.cluster, jobs, [self.step], owner)])
        if self.line.kind == "train":
            self.names.claim(self.line.name, self.step.name)
        if is_wanted and self._create():
            self.say(f"sent: Job {self.step.name} in namespace {self.cluster.namespace}")
            self._how_to_go_on()
            return True, self._look()[1]
        job, seen = self._look()
        self._say_what_became(job, seen, known)
        return False, seen

    def _create(self) -> bool:
        """Make the Job; False where somebody else was quicker."""
        creator = JobCreator(self.site, self.cluster, self.watcher.ledger, self.line.code)
        creator.send_code()
        keys = self.step.points if self.line.kind == "train" else ()
        made = creator.make(creator.order(self.step, keys))
        if made.job is not None:
            self.cache.learn("jobs", made.job)
        elif made.blocked_by is not None:
            raise ConfigError(f"the cluster says no: {why_not_made(made.blocked_by)}")
        return made.is_new

    def _look(self) -> tuple[JobView | None, Observation]:
        """This line's Job, if there is one, and the state of what it is to do.

        Raises:
            ContractError: a Job of this name is about something else.
        """
        job = self.cache.job(self.step.name)
        if job is not None:
            refuse_drift(job, self.step)
        return job, self._observe(self.step.name)

    def _observe(self, directory: str) -> Observation:
        one = point_of(directory)
        return self.watcher.observe_points([one], None)[one.id]

    def _refuse_other_meaning(self, known: dict[str, str]) -> None:
        there = known.get(self.line.name)
        if self.line.kind != "train" or there in (None, self.step.name):
            return
        job = self.cluster.read("jobs", there)
        notes: dict[str, str] = job["metadata"].get("annotations") or {} if job else {}
        words = shlex.join(self.step.typed)
        how = differing(notes.get("stillhouse/words"), words, unset="not set")
        how = how or "another configuration, whose Job is gone"
        raise ConfigError(
            f'k8s/train.sh: the name "{self.line.name}" means {there} already, and this is'
            f" {self.step.name}: {how}. Choose another name"
        )

    def _say_of_adapters(self, known: dict[str, str]) -> None:
        """How the runs stand that an evaluation names."""
        for path in self.line.adapters:
            directory = known.get(Path(path).name)
            if directory is None:
                self.say(f"  {path}: no run of that name is known; the pod looks on the volume")
                continue
            seen = self._observe(directory)
            is_there = seen.is_trained or seen.state == "done"
            state = "trained" if is_there else seen.state
            self.say(f"  {path}: {directory}, {state}{f': {seen.cause}' if seen.cause else ''}")
            if not is_there:
                self.say("    not trained yet: the pod exits with 42 if it finds no adapter")

    def _say_what_became(
        self, job: JobView | None, seen: Observation, known: dict[str, str]
    ) -> None:
        name, target = self.line.name, f"{self._target} {away_words(self.site)}"
        others = [n for n, directory in known.items() if directory == self.step.name and n != name]
        if self.line.kind == "train" and name not in known:
            other = f" {others[0]}" if others else " one that was sent before"
            self.say(f"{name} is the same configuration as{other}: now a name of it, too")
        cause = f": {seen.cause}" if seen.cause else ""
        self.say(f"nothing was sent: {self.step.name} is there already, {seen.state}{cause}")
        other = of_other_site(job, self.site) if job and job.state == "live" else ""
        if other:
            again = f"`stillhouse cancel {target}`, then the same line, sends it anew"
            self.say(f"  it was sent from another site: {other}; {again}")
        if job is not None and job.is_deleting:
            self.say("  its Job is being deleted; the same line sends it again once it is gone")
        elif seen.state in FAILED:
            self.say(f"  `stillhouse retry {target}`, then the same line, tries again")
        else:
            self._how_to_go_on()

    @property
    def _target(self) -> str:
        return self.line.name if self.line.kind == "train" else self.step.name

    def _how_to_go_on(self) -> None:
        is_run = self.line.kind == "train"
        if is_run:
            self.say(f"run directory: {RUNS}/{self.step.name} of volume {self.site.runs_claim}")
        for said in how_to_follow(self._target, self._target, self.site, is_collected=is_run):
            self.say(said)


# --------------------------------------------------------------------------------------- a driver


def detach(
    cluster: Cluster, cache: NamespaceCache, sweep: Sweep, options: Sequence[str]
) -> list[str]:
    """Send the driver of a sweep, or find the one that is at work; what there is to say about it.

    Raises:
        ConfigError: the sweep's file cannot travel, something else has a name that is needed, or
            there is no room for a Job.
        ContractError: the Job there is about something else.
    """
    content = Path(sweep.file).read_bytes() if sweep.file else None
    step = drive_step(sweep, content, options)
    there = cache.job(step.name)
    if there is not None:
        refuse_drift(there, step)
    said = "is at work already"
    if there is None or there.state != "live" or there.is_deleting:
        creator = JobCreator(sweep.site, cluster, cache.ledger, bundle(sweep.suite))
        creator.send_code()
        if content is not None and step.sweep_file is not None and sweep.file is not None:
            file = sweep_file(step.sweep_file, sweep.name, Path(sweep.file).name, content)
            have_config_map(cluster, file)
        order = creator.order(step)
        made = creator.make(order)
        if made.blocked_by is not None:
            raise ConfigError(f"driver {step.name}: {why_not_made(made.blocked_by)}; run it again")
        for job in order.replaced.values():
            said = f"sent again (the last one ended: {job.state})"
        if made.is_new and not order.replaced:
            said = "sent"
    return [
        f"driver {step.name}: {said}; this machine is not needed any more",
        *how_to_follow(step.name, sweep.name, sweep.site),
    ]
