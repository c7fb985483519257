"""The launcher: plan a sweep, run its points on a backend, and show their state.

Reading order:
    asked, yaml_reader, site      a sweep file and a command line become one request
    grid, commits                 the request becomes checked points; hub revisions become commits
    roster                        a sweep's record; sweeps, runs and points found by name or id
    plan, beneath                 the state of each point, what it depends on, and the next actions
    drive                         the loop: observe, plan, act, wait
    ground, unasked               what verbs need of this machine, of a cluster, of one out of reach
    endings                       how a task of this machine ended, in its run directory
    backends/, kube/              run tasks as local processes or as Kubernetes Jobs
    call, chosen, verbs, pushing  a verb's arguments and filters; one function for each verb
    listing, progress, logs, cost, spent, verdicts    what a person reads

The rest of the package imports `verbs` (`cli`), `kube.sending.send` (`cli` and `doors`: one Job for
a line of k8s/train.sh or k8s/eval.sh, or for a preflight) and `backends.cluster.ApiError` (`cli`).
`tools/image.py` imports `kube.carried`. Nothing here needs torch.
"""
