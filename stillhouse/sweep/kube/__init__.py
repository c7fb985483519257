"""Points as Kubernetes Jobs: describe a Job, read the state of a point, and keep how it ended.

Reading order:
    views, workload                 API objects reduced to the fields in use
    reasons, refusals               why a Job waits, why it was refused, how it ended
    scene, sight                    a cache of the namespace; what fills it, once or by watches
    facts, settle, ledger           a point's state; a Job's end; the record that outlives the Job
    steps, manifest, yaml_text      a task's name and words; its Job; the bytes that are sent
    bundle, carried, secrets        the code that travels with a Job, and what must not
    named, names, finding           compare what exists; people's names for runs; find by name
    renewing, asking, mending       replace a Job, compare two sites, delete Jobs
    away, rendering, detach         a cluster for the verbs; Jobs without one; the loop in a pod
    line, sending, paths            one line of k8s/train.sh or k8s/eval.sh, parsed and sent
    checks, access, particulars, pod_logs    a namespace checked; what a person reads
    holder, collect, push           copy files from and to the volumes
    checklist, evidence             what every Job manifest must have; only tests use them

`call` imports `away` and `paths`; `verbs`, `pushing`, `cost`, `spent` and `chosen` import single
names. `backends/` builds its Job backend on this package. From outside of the launcher, `cli` and
`doors` import `sending.send`, and `tools/image.py` imports `carried`.
"""
