"""Run the tasks of a sweep as Kubernetes Jobs: create each once, follow it, keep how it ended.

Reading order:
    connect, login, request, client, errors, exec     talk to the API server, and retry
    objects, kueue                API objects reduced to the fields in use
    reasons, refusals             why a Job waits, why it was refused, how it ended
    cache, watch                  a cache of the namespace; what fills it, once or by watches
    facts, job_outcomes, ledger   what decides a state; a Job's end; the record that outlives it
    jobspec, manifest             a task's name and words; its Job
    code_bundle, project_files, secrets    the code that travels with a Job, and what must not
    create, ownership, replace, site_difference, delete_jobs    make a Job once, or replace it
    jobs                          the executor: follow Jobs, record how each ended, delete them
    run_names, find               people's names for runs; sweeps, runs and Jobs found by name
    backend, render, detach       a cluster for the verbs; Jobs without one; the loop in a pod
    submit_args, submit, pod_paths    one line of k8s/train.sh or k8s/eval.sh, parsed and sent
    doctor, access, describe, pod_logs    a namespace checked; what a person reads
    volume_pod, collect, push, push_plan    copy files from and to the volumes

`call` and `verbs` of the launcher import single names. From outside the launcher, `cli` and
`entrypoints` import `submit.send`, and `tools/image.py` imports `project_files`.
"""
