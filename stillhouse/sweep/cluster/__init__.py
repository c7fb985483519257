"""Run the tasks of a sweep as Kubernetes Jobs: create each once, follow it, keep how it ended.

Reading order:
    connect, login, client, errors, exec    talk to the API server, and retry
    objects, kueue                API objects reduced to the fields in use
    reasons, refusals             why a Job waits, why it was refused, how it ended
    cache, watch                  a cache of the namespace; what fills it, once or by watches
    facts, job_outcomes, ledger   what decides a state; a Job's end; the record that outlives it
    jobspec, manifest             a task's name and spec; its Job
    code_bundle, project_files, secrets    the code that travels with a Job, and what must not
    create, ownership, replace    make a Job once, or replace it
    jobs                          the executor: follow Jobs, record how each ended, delete them
    find                          sweeps, runs and Jobs found by what people call them
    backend                       a cluster for the verbs
    submit_args, submit           one Job: a line of k8s/train.sh or k8s/eval.sh, or a driver
    doctor, describe, pod_logs    a namespace checked; what a person reads
    volume_pod, collect, push     copy files from and to the volumes

`call` and `verbs` of the launcher import single names. From outside the launcher, `cli` and
`entrypoints` import `submit.send`, and `tools/image.py` imports `project_files`.
"""
