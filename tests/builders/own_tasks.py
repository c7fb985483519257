"""Write lm-eval tasks as a user would write them, outside this project's own files."""

from __future__ import annotations

import json
from pathlib import Path

GEN = """\
include: _base.yaml
task: my_sums
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{number}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 7}
metric_list:
  - {metric: !function scoring.digits, aggregation: mean, higher_is_better: true}
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
CHOICE = """\
include: _base.yaml
task: my_choice
output_type: multiple_choice
doc_to_text: !function scoring.asked
doc_to_choice: ["3", "4", "5"]
doc_to_target: "{{['3', '4', '5'].index(number)}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
BASE = """\
dataset_path: json
dataset_kwargs: {data_files: {test: data/rows.jsonl}}
test_split: test
metadata: {version: 2}
"""
SCORING = '''\
def digits(references, predictions, **_):
    """The share of digits in what was written."""
    text = predictions[0]
    return sum(c.isdigit() for c in text) / max(1, len(text))


def asked(doc):
    return "How much is " + doc["question"]
'''
ROWS = [{"question": f"{a}+{b}", "number": str(a + b)} for a, b in ((1, 2), (2, 2), (4, 1), (2, 3))]


def write(folder: Path) -> Path:
    """Two tasks with one base, a file of functions and one of rows; the directory they lie in."""
    (folder / "data").mkdir(parents=True)
    (folder / "my_sums.yaml").write_text(GEN)
    (folder / "my_choice.yaml").write_text(CHOICE)
    (folder / "_base.yaml").write_text(BASE)
    (folder / "scoring.py").write_text(SCORING)
    rows = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "data" / "rows.jsonl").write_text(rows)
    return folder
