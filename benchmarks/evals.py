"""Measure scoring many adapters on one suite against lm-eval's own command, once per adapter.

    python -m benchmarks.evals [--write]    prints Markdown; into docs/benchmarks.md; ten minutes

Adapters of the tiny pair, its student not quantized, on its 256 problems as tasks of a user: free
generation and choice among worked answers. Processor time of the whole processes, imports included,
one thread. lm-eval's command takes the same time for every adapter, so it is run for MEASURED.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.run import put
from stillhouse.compose import compose, from_command_line
from stillhouse.distill.pairs import prepare
from stillhouse.distill.run import train_run
from stillhouse.rundir import RunDir, Runs, read_json
from stillhouse.spec import TrainSpec
from stillhouse.stop import StopFlag

ADAPTERS, MEASURED, BATCH = 8, 2, 32
LIMIT = 0.12  # of lm-eval's time
BASE = """\
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
doc_to_text: "{{question}}"
target_delimiter: ""
metadata: {version: 1}
"""
TASKS = {
    "words_gen": """\
include: _base.yaml
task: words_gen
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 44, do_sample: false}
filter_list:
  - name: answer
    filter: [{function: regex, regex_pattern: "#### (-?\\\\d+)"}, {function: take_first}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "words_mc": """\
include: _base.yaml
task: words_mc
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
}


def suite(directory: Path, problems: Path) -> Path:
    """The two tasks as a user would write them, and where they lie."""
    directory.mkdir()
    (directory / "_base.yaml").write_text(BASE.replace("rows.jsonl", str(directory / "rows.jsonl")))
    (directory / "rows.jsonl").write_bytes(problems.read_bytes())
    for name, text in TASKS.items():
        (directory / f"{name}.yaml").write_text(text)
    return directory


def trained(runs: Path) -> tuple[list[RunDir], str, Path]:
    """Runs of two steps each, the student's weights, and the problems to be asked."""
    made = list[RunDir]()
    for seed in range(ADAPTERS):
        line = [
            "pair=tiny",
            "quant=none",
            "threads=1",
            "max_steps=2",
            f"seed={seed}",
            f"runs={runs}",
        ]
        spec = compose(from_command_line(line, TrainSpec), TrainSpec)
        made.append(Runs(runs).of(spec))
        with contextlib.redirect_stdout(io.StringIO()):
            train_run(spec, made[-1], StopFlag())
            prepared = prepare(spec.pair, spec.quant, Path(spec.place.cache_dir))
    assert prepared.data_dir is not None, "the tiny pair brings its problems"
    return made, prepared.student, prepared.data_dir / "test.jsonl"


def seconds(*command: str | Path) -> float:
    """Processor seconds of a command and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *command], text=True, capture_output=True)
    if done.returncode:
        sys.exit(
            f"{command} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def ours(runs: list[RunDir], tasks: Path) -> tuple[float, list[dict[str, float]]]:
    paths = ",".join(str(run.path) for run in runs)
    took = seconds(
        "eval.py", "pair=tiny", "quant=none", f"include_path={tasks}", f"lora_paths=[{paths}]",
        "eval_teacher=false", "eval_student=false", "eval_ptq=false", f"eval_batch_size={BATCH}",
        "max_gen_toks=44", "threads=1", f"runs={runs[0].path.parent}",
    )  # fmt: skip
    scores = [{name: read_json(run.eval_file(name)) or {} for name in TASKS} for run in runs]
    return took, [{name: score[name]["value"] for name in TASKS} for score in scores]


def theirs(run: RunDir, student: str, tasks: Path, out: Path) -> tuple[float, dict[str, float]]:
    took = seconds(
        "-m", "lm_eval", "run", "--model", "hf", "--model_args",
        f"pretrained={student},peft={run.adapter},dtype=float32", "--tasks", ",".join(TASKS),
        "--include_path", tasks, "--device", "cpu", "--batch_size", str(BATCH),
        "--apply_chat_template", "--output_path", out,
    )  # fmt: skip
    found = json.loads(next(out.rglob("results*.json")).read_text())["results"]
    return took, {
        "words_gen": found["words_gen"]["exact_match,answer"],
        "words_mc": found["words_mc"]["acc,none"],
    }


def main() -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        runs, student, problems = trained(home / "runs")
        tasks = suite(home / "tasks", problems)
        once = [theirs(runs[i], student, tasks, home / f"theirs{i}") for i in range(MEASURED)]
        took, scores = ours(runs, tasks)
    whole = sum(each for each, _ in once) / MEASURED * ADAPTERS
    same = all(a == b for (_, a), b in zip(once, scores, strict=False))
    said = (
        f"{ADAPTERS} adapters of the tiny pair over the student in full precision, 256 problems as"
        " tasks of a user, generation and choices, batches of"
        f" {BATCH}, one thread; processor time of whole processes. lm-eval's command was run for"
        f" {MEASURED} adapters.\n\n"
        "| | processor s | share | limit | scores |\n|---|---|---|---|---|\n"
        f"| `lm_eval run`, once per adapter | {whole:.0f} | 1 | | |\n"
        f"| `eval.py`, all at once | {took:.0f} | {took / whole:.2f} | {LIMIT} |"
        f" {'the same' if same else 'DIFFERENT'} |"
    )
    print(said)
    if sys.argv[1:] == ["--write"]:
        put("evals", said, "Scoring: eight adapters against lm-eval's command")


if __name__ == "__main__":
    main()
