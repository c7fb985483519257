"""The launcher: plan a sweep, run its points on a backend, and show their state.

Reading order:
    sweep_file, site                 a sweep file and a command line become one request
    points                           a Sweep, its Points and Baselines, as data
    grid, commits                    the request becomes checked points; revisions become commits
    registry                         a sweep's record; sweeps, runs and points found by name or id
    state                            what new, done, failed, stopped, drifted and unreadable mean;
                                     how a task ended, as a ledger keeps it
    snapshot, dependencies           one look at a sweep: run directories, and what they rest on
    plan                             the next actions that follow from the states
    backend                          what verbs and loop ask of this machine or of a cluster
    driver                           the loop: observe, plan, act, wait
    local/, cluster/                 run tasks as processes of this machine, or as Kubernetes Jobs
    call, filters, verbs             a verb's arguments and filters; one function for each verb
    show, progress, cost, spending   what a person reads

The rest of the package imports `verbs` (`cli`), `cluster.submit.send` (`cli` and `entrypoints`: one
Job for a line of k8s/train.sh or k8s/eval.sh, or for a preflight) and `cluster.connect.ApiError`
(`cli`). `tools/image.py` imports `cluster.project_files`. Nothing here needs torch.
"""
