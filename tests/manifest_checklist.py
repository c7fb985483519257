"""List what every Job manifest must have, and what went wrong with Jobs that lacked it.

The list is applied to a rendered manifest, whoever made it: `k8s/job.yaml`, a golden file or one
that a person wrote by hand. A test removes each line of `k8s/job.yaml`, one at a time, and requires
that this list notices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stillhouse.rundir import Json
from stillhouse.sweep.cluster.manifest import LABEL, PINNED
from tests import manifest_evidence
from tests.manifest_evidence import Job

DAY_S = 86_400


@dataclass(frozen=True)
class Line:
    """One thing that a Job must have."""

    what: str
    why: str
    holds: Callable[[Job], bool]


def check(manifest: Json) -> list[str]:
    """What a Job lacks, and why it matters; empty where it has everything."""
    job = Job(manifest)
    return [f"{line.what}: {line.why}" for line in LINES if not _holds(line, job)]


def _holds(line: Line, job: Job) -> bool:
    try:
        return line.holds(job)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return False  # what it asks about is not there, or is something else


LINES: tuple[Line, ...] = (
    Line(
        "apiVersion batch/v1, kind Job",
        "nothing else is a Job",
        lambda job: (job.whole["apiVersion"], job.whole["kind"]) == ("batch/v1", "Job"),
    ),
    Line(
        "a name of at most 52 characters that ends in the hash of the content",
        "pods add to it, 63 is the limit; random or cut names make twins or collide",
        manifest_evidence.is_named_by_content,
    ),
    Line(
        "labels name, part-of, managed-by, component, kind and owner",
        "one selector must find all that is ours, and tell whose it is",
        manifest_evidence.is_labelled,
    ),
    Line(
        "label values of at most 63 legal characters",
        "the API server refuses the Job otherwise; floats and paths belong into annotations",
        lambda job: all(LABEL.fullmatch(value) is not None for value in job.labels.values()),
    ),
    Line(
        "the point as a label of a training, equal to --id",
        "the pod refuses another's configuration only if it is told whose it is",
        manifest_evidence.names_its_point,
    ),
    Line(
        "the code as a label, as --code and in the bundle's name",
        "a pod that starts late must run what was submitted, not what is there by then",
        manifest_evidence.names_its_code,
    ),
    Line(
        "the same labels and points on the pods",
        "pods are listed by them; without them a pod belongs to nobody",
        manifest_evidence.labels_its_pods,
    ),
    Line(
        "the spec of --id as the last argument; annotation stillhouse/words, which compose to it",
        "a pod does what its name says, and a person reads, and can type, the same",
        manifest_evidence.says_its_words,
    ),
    Line(
        "annotation stillhouse/devices, equal to --processes and to the GPUs asked for",
        "hours and money are counted by it; GPUs that are asked for and idle cost the same",
        manifest_evidence.counts_its_devices,
    ),
    Line(
        "backoffLimit, 0 to 100",
        "the default retries six times, and billions of times with an index",
        lambda job: job.spec["backoffLimit"] in range(101),
    ),
    Line(
        "activeDeadlineSeconds",
        "a Job that hangs holds its GPUs until somebody looks",
        lambda job: manifest_evidence.is_positive(job.spec["activeDeadlineSeconds"]),
    ),
    Line(
        "ttlSecondsAfterFinished of a day to a month",
        "too short takes the only log; without it finished Jobs fill etcd",
        lambda job: job.spec["ttlSecondsAfterFinished"] in range(DAY_S, 31 * DAY_S),
    ),
    Line(
        "podReplacementPolicy Failed",
        "otherwise a new pod starts while the old one still writes checkpoints",
        lambda job: job.spec["podReplacementPolicy"] == "Failed",
    ),
    Line(
        "podFailurePolicy for disruptions, 85, and 42 43 44 46",
        "disruptions would use up the attempts of healthy runs, and poison would be retried",
        manifest_evidence.knows_whose_fault_it_is,
    ),
    Line(
        "suspend exactly where a queue is named",
        "a queue decides nothing for a Job that runs already; without one nobody resumes it",
        manifest_evidence.is_suspended_for_a_queue,
    ),
    Line(
        "restartPolicy Never",
        "the failure policy needs it, and a restart in place hides the first death",
        lambda job: job.pod["restartPolicy"] == "Never",
    ),
    Line(
        "terminationGracePeriodSeconds",
        "the default of 30 s is shorter than many a save",
        lambda job: manifest_evidence.is_positive(job.pod["terminationGracePeriodSeconds"]),
    ),
    Line(
        "its own service account, the token mounted for a driver only",
        "a mounted token lets what is trained act as the launcher",
        manifest_evidence.has_the_right_identity,
    ),
    Line(
        "enableServiceLinks false",
        "each Service of the namespace adds seven variables, some named like ours",
        lambda job: job.pod["enableServiceLinks"] is False,
    ),
    Line(
        "Pod Security restricted: a fixed user, no escalation, no capabilities, seccomp, no host",
        "a namespace that enforces it refuses the pods, and only an event says so",
        manifest_evidence.is_restricted,
    ),
    Line(
        "fsGroupChangePolicy OnRootMismatch",
        "otherwise each start of a pod walks over every file of the volume",
        lambda job: job.pod["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch",
    ),
    Line(
        "readOnlyRootFilesystem",
        "what is written beside the volumes is lost, and should fail where it is seen",
        lambda job: job.main["securityContext"]["readOnlyRootFilesystem"] is True,
    ),
    Line(
        "one container, named main",
        "the failure policy names it, and a second one holds the GPU after the run",
        lambda job: job.main["name"] == "main",
    ),
    Line(
        "an image pinned by digest, pulled IfNotPresent",
        "a tag moves in mid-sweep, and Always asks the registry at every start",
        lambda job: (
            PINNED.fullmatch(job.main["image"]) is not None
            and job.main["imagePullPolicy"] == "IfNotPresent"
        ),
    ),
    Line(
        "pod.py as process 1, in exec form, with its kind",
        "a shell as process 1 swallows SIGTERM, and nothing is saved",
        lambda job: (
            job.main["command"] in (manifest_evidence.ON_ITS_OWN, manifest_evidence.BUNDLED)
            and job.main["args"][len(job.options) : len(job.options) + 2] == [job.kind, "--"]
        ),
    ),
    Line(
        "--log below /runs",
        "when the pod is gone, the volume has the only log",
        lambda job: job.kind in ("collect", "push") or job.options["log"].startswith("/runs/"),
    ),
    Line(
        "terminationMessagePolicy FallbackToLogsOnError",
        "a process that is killed writes no last words",
        lambda job: job.main["terminationMessagePolicy"] == "FallbackToLogsOnError",
    ),
    Line(
        "secrets by reference only, and not optional",
        "whatever a Job holds is read by everybody who may list Jobs",
        manifest_evidence.holds_no_secret,
    ),
    Line(
        "cores asked for, memory limited",
        "without them pods share a node until one is killed",
        lambda job: (
            bool(job.main["resources"]["requests"]["cpu"])
            and manifest_evidence.bytes_of(job.main["resources"]["limits"]["memory"]) > 0
        ),
    ),
    Line(
        "volumes on the node's disk limited",
        "a cache that grows evicts every pod of the node, its own and those of others",
        manifest_evidence.has_a_share_of_the_disk,
    ),
    Line(
        "threads no more than cores",
        "as many threads as the node has cores make all its pods slow",
        manifest_evidence.has_threads_of_its_own,
    ),
    Line(
        "its volumes, each mounted where the code looks for it",
        "a read-only image has no other place to write to",
        manifest_evidence.has_its_volumes,
    ),
    Line(
        "claims for what outlives the pod",
        "results in an emptyDir go with the pod",
        manifest_evidence.has_its_claims,
    ),
    Line(
        "/dev/shm in memory, below the memory limit",
        "64 MiB by default; it counts in the limit, so as large as it is no limit at all",
        manifest_evidence.has_shared_memory,
    ),
    Line(
        "USER, HOME and every cache on a volume",
        "libraries die without a user's name and write to homes that are not there",
        manifest_evidence.has_writable_places,
    ),
    Line(
        "offline, or told to fetch",
        "workers that ask the hub share one address and are refused by the hundred",
        manifest_evidence.knows_whether_to_download,
    ),
    Line(
        "STILLHOUSE_JOB, the uid of its Job",
        "attempts without progress are counted by Job: who retries would meet the old count",
        lambda job: any(
            entry == {"name": "STILLHOUSE_JOB", "valueFrom": manifest_evidence.JOB_UID}
            for entry in job.main["env"]
        ),
    ),
    Line(
        "STILLHOUSE_IMAGE, the image again",
        "a run cannot say which libraries it ran with",
        lambda job: job.env["STILLHOUSE_IMAGE"] == job.main["image"],
    ),
    Line(
        "PYTHONUNBUFFERED",
        "the last lines before a kill stay in a buffer",
        lambda job: job.env["PYTHONUNBUFFERED"] == "1",
    ),
)
