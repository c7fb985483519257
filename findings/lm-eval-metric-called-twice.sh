#!/usr/bin/env bash
# lm-eval calls a metric that raises a TypeError again, with other arguments, and ends with the second error.
#
# Expected: a `!function` metric is called once per row, and what it raises is what one sees.
# Happens: any TypeError inside it counts as "has the other signature": it is called as metric([gold, result]), and
#   the second call's TypeError, about missing arguments, comes last.
# Versions: lm_eval 0.4.13, datasets 5.2.0.
# Matters: one bad row reads as a wrong signature, and sends its author to rewrite what was right.
# Do: read the first error of the two; in a metric, turn a TypeError of your own into a ValueError.
#
# Seen on 2026-11-30:
#   lm_eval 0.4.13 datasets 5.2.0
#   last error:  distance() missing 1 required positional argument: 'predictions'
#   first error: unsupported operand type(s) for -: 'str' and 'str'
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
export HF_HUB_OFFLINE=1 HF_HOME="$dir/hf" CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
pins=('lm_eval==0.4.13' 'datasets==5.2.0')
if command -v uv >/dev/null; then
  uv venv --quiet venv && uv pip install --quiet --python venv/bin/python "${pins[@]}"
else
  python3 -m venv venv && venv/bin/python -m pip install --quiet "${pins[@]}"
fi

mkdir task
cat >task/task.yaml <<'EOF'
task: own_metric
dataset_path: json
dataset_kwargs:
  data_files:
    test: task/rows.jsonl
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: !function own.distance
    aggregation: mean
    higher_is_better: false
EOF
cat >task/own.py <<'EOF'
def distance(references, predictions):
    return abs(references[0] - predictions[0])  # text minus text: the mistake
EOF
echo '{"question": "1 + 1 =", "answer": "2"}' >task/rows.jsonl
venv/bin/python - <<'EOF' 2>stderr || { cat stderr; exit 1; }
import importlib.metadata as meta
import logging

from lm_eval.tasks import TaskManager

logging.disable(logging.CRITICAL)
print("lm_eval", meta.version("lm_eval"), "datasets", meta.version("datasets"))
task = TaskManager(include_path="task", include_defaults=False).load(["own_metric"])["tasks"]["own_metric"]
row = next(iter(task.test_docs()))
try:
    task.process_results(row, ["3"])
except TypeError as error:
    last, first = error, error.__context__
print("last error: ", last)
print("first error:", first)
assert "missing 1 required positional argument" in str(last), last
assert "unsupported operand type" in str(first), first
EOF
