"""The two backends that run tasks, and the client of the Kubernetes API that the cluster one uses.

Reading order:
    local, warm          tasks as processes of this machine, forked from a server with warm imports
    cluster, login       log in to a cluster, and renew the token
    asks, api, answers   a request, its attempts, and the server's errors and streams
    commands             run a command in a pod (exec)
    making               create each Job once
    jobs                 tasks as Jobs: follow them, record how each ended, delete them

`local.LocalBackend` and `jobs.JobsBackend` implement the protocol `drive.Backend`; `ground` and
`kube.away` create them. `making` and `jobs` are built on `kube/`, which itself uses the API client:
`kube/` and `pushing` import `cluster` (`connect`, `Cluster`, `ApiError`, `CommandFailed`, `Gone`).
Outside of the launcher, `cli` imports `cluster.ApiError`.
"""
