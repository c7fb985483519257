"""The launcher: plan a sweep, run its points on a backend, and show their state.

Reading order:
    sweep_file, yaml_reader, site    a sweep file and a command line become one request
    grid, commits                    the request becomes checked points; revisions become commits
    registry                         a sweep's record; sweeps, runs and points found by name or id
    plan, dependencies, outcome      each point's state, what it depends on; the next actions
    snapshot                         what one look at a sweep found, as plain data
    backend                          what verbs and loop ask of this machine or of a cluster
    driver                           the loop: observe, plan, act, wait
    local/, cluster/                 run tasks as processes of this machine, or as Kubernetes Jobs
    call, filters, verbs             a verb's arguments and filters; one function for each verb
    show, progress, cost, spending, preflight_lines    what a person reads

The rest of the package imports `verbs` (`cli`), `cluster.submit.send` (`cli` and `entrypoints`: one
Job for a line of k8s/train.sh or k8s/eval.sh, or for a preflight) and `cluster.connect.ApiError`
(`cli`). `tools/image.py` imports `cluster.project_files`. Nothing here needs torch.
"""
