#!/usr/bin/env bash
# data_files in an lm-eval task is looked up from the working directory, not from the task's YAML.
#
# Expected: a path in task.yaml is relative to task.yaml, as its `include:` and `!function` are.
# Happens: it goes to datasets.load_dataset as it is, so the same task loads from one directory, fails from another,
#   and reads another file where that directory happens to have one of that name.
# Versions: lm_eval 0.4.13, datasets 5.2.0.
# Matters: a score can be of other rows than those beside the task, and the results file does not say so.
# Do: run from the task's folder, or write absolute paths; record a digest of the rows with the score.
#
# Seen on 2026-11-30:
#   lm_eval 0.4.13 datasets 5.2.0
#   from task/: beside the task
#   from elsewhere/: of somebody else
#   from nowhere/: FileNotFoundError
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

mkdir task elsewhere nowhere
cat >task/task.yaml <<'EOF'
task: from_a_file
dataset_path: json
dataset_kwargs:
  data_files:
    test: rows.jsonl
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
EOF
echo '{"question": "beside the task", "answer": "1"}' >task/rows.jsonl
echo '{"question": "of somebody else", "answer": "2"}' >elsewhere/rows.jsonl
cat >read.py <<'EOF'
import logging
import sys

from lm_eval.tasks import TaskManager

logging.disable(logging.CRITICAL)
try:
    task = TaskManager(include_path=sys.argv[1], include_defaults=False).load(["from_a_file"])["tasks"]["from_a_file"]
    print(next(iter(task.test_docs()))["question"])
except FileNotFoundError:
    print("FileNotFoundError")
EOF
venv/bin/python -c 'import datasets, importlib.metadata as m; print("lm_eval", m.version("lm_eval"), "datasets", datasets.__version__)'
for place in task elsewhere nowhere; do
  said=$(cd $place && ../venv/bin/python ../read.py "$dir/task" 2>"$dir/stderr") || { cat stderr; exit 1; }
  echo "from $place/: $said"
  case $place in
    task) [ "$said" = "beside the task" ] ;;
    elsewhere) [ "$said" = "of somebody else" ] ;;
    nowhere) [ "$said" = FileNotFoundError ] ;;
  esac
done
