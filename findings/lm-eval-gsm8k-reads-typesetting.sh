#!/usr/bin/env bash
# lm-eval's gsm8k scores a right answer 0 or 1 by how it is typeset, in both of its filters.
#
# Expected: flexible-extract finds the last number of an answer, so a right answer scores 1 however it is set.
# Happens: its pattern takes "$", "." and "," for digits, and only "$", "," and one last "." are removed
#   afterwards. A boxed answer in inline mathematics ends in "$" or "$.", which is then the last "number".
#   strict-match wants "#### ".
# Versions: lm_eval 0.4.13 (gsm8k, version 3.0).
# Matters: a student that takes over its teacher's way of writing gains or loses the whole score.
# Do: show a plain numeric reading of the last number beside both filters.
#
# Seen on 2026-11-30, all answers right (18): strict-match, flexible-extract
#   #### 18                        1 1
#   The answer is 18.              0 1
#   The answer is **18**           0 1
#   The answer is $18.00           0 0
#   The answer is $$\boxed{18}$$   0 0
#   The answer is $\boxed{18}$.    0 0
#   The answer is 18...            0 0
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
echo '{"question": "How much is 9 + 9?", "answer": "9 + 9 = 18\n#### 18"}' >task/rows.jsonl
venv/bin/python - <<'EOF' 2>stderr || { cat stderr; exit 1; }
import importlib.metadata as meta
import logging
from pathlib import Path

import lm_eval
import yaml
from lm_eval.tasks import TaskManager

logging.disable(logging.CRITICAL)
print("lm_eval", meta.version("lm_eval"))
packaged = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks/gsm8k/gsm8k.yaml").read_text())
ours = packaged | {"task": "gsm8k_rows", "dataset_path": "json", "num_fewshot": 0, "test_split": "test"}
ours |= {"dataset_kwargs": {"data_files": {"test": "task/rows.jsonl"}}}
for key in ("tag", "dataset_name", "training_split", "fewshot_split"):
    ours.pop(key)
Path("task/task.yaml").write_text(yaml.safe_dump(ours))
manager = TaskManager(include_path="task", include_defaults=False)
wanted = {
    "#### 18": (1, 1),
    "The answer is 18.": (0, 1),
    "The answer is **18**": (0, 1),
    "The answer is $18.00": (0, 0),
    "The answer is $$\\boxed{18}$$": (0, 0),
    "The answer is $\\boxed{18}$.": (0, 0),
    "The answer is 18...": (0, 0),
}
for answer, scores in wanted.items():
    task = manager.load(["gsm8k_rows"])["tasks"]["gsm8k_rows"]
    task.build_all_requests(rank=0, world_size=1)
    (request,) = task.instances
    request.resps = [answer]
    task.apply_filters()
    found = tuple(
        int(task.process_results(request.doc, [request.filtered_resps[name]])["exact_match"])
        for name in ("strict-match", "flexible-extract")
    )
    print(f"{answer:<31}", *found)
    assert found == scores, (answer, found, scores)
EOF
