#!/usr/bin/env bash
# accelerate launch --cpu --num_processes 2 starts one process, without a word.
#
# Expected: two processes, as --num_processes says, or an error.
# Happens: without MPI around it, the script runs once, with no RANK or WORLD_SIZE. The same command with
#   --multi_gpu instead of --cpu starts two, on a machine that has no GPU.
# Versions: accelerate 1.15.0, torch 2.13.0.
# Matters: a data-parallel test on a CPU passes with one process; a run has half the batch that its config says.
# Do: use torchrun, or check accelerator.num_processes against what was asked for.
#
# Seen on 2026-11-30:
#   accelerate 1.15.0, torch 2.13.0+cu130
#   --cpu: process None of None
#   --multi_gpu: process 0 of 2
#   --multi_gpu: process 1 of 2
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
export HF_HUB_OFFLINE=1 HF_HOME="$dir/hf" CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
pins=('accelerate==1.15.0' 'torch==2.13.0' 'numpy==2.4.6')
if command -v uv >/dev/null; then
  uv venv --quiet venv && uv pip install --quiet --python venv/bin/python "${pins[@]}"
else
  python3 -m venv venv && venv/bin/python -m pip install --quiet "${pins[@]}"
fi

cat >say.py <<'EOF'
import os

print("process", os.environ.get("RANK"), "of", os.environ.get("WORLD_SIZE"), flush=True)
EOF
venv/bin/python -c "import accelerate, torch; print(f'accelerate {accelerate.__version__}, torch {torch.__version__}')"
for way in --cpu --multi_gpu; do
  venv/bin/accelerate launch $way --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no \
    --main_process_port 0 say.py >said 2>err
  sort said | sed "s/^/$way: /"
  sort said >"said$way"
  ! grep -qi "process" err || { echo "now it says something:"; cat err; exit 1; }
done
[ "$(cat said--cpu)" = "process None of None" ]
[ "$(cat said--multi_gpu)" = "process 0 of 2
process 1 of 2" ]
