"""Run the tasks of a sweep as processes of this machine.

Reading order:
    backend      this machine for the verbs, from the files of its runs; logs
    workers      one process per task of the driver, forked from a server with the imports done
    teachers     the servers of teachers that points share
    preload      what that server computes last
    outcomes     how a task ended, written into its run directories

`call` of the launcher uses it; it does not know `cluster/`.
"""
