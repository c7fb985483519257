#!/usr/bin/env bash
# On an AMD CPU, MKL ignores MKL_CBWR=SSE4_2 and AVX2, and MKL_ENABLE_INSTRUCTIONS, without a word.
#
# Expected: MKL_CBWR=SSE4_2 or AVX2, or MKL_ENABLE_INSTRUCTIONS, picks that code path, or complains.
# Happens: on a CPU that is not Intel's the product keeps the bits of no setting at all. COMPATIBLE changes them.
# Versions: torch 2.13.0 with the MKL inside its wheel for x86-64.
# Matters: who pins MKL_CBWR=AVX2 to get one set of bits on a mixed cluster may get two, and is not told.
# Do: MKL_CBWR=COMPATIBLE where bits must agree (it is slower), or compare digests of one product per node.
#
# Seen on 2026-11-30:
#   CPU: AuthenticAMD
#   torch 2.13.0+cu130 with BLAS_INFO=mkl
#   no setting: 07bfe0b6b923
#   MKL_CBWR=SSE4_2: 07bfe0b6b923
#   MKL_CBWR=AVX2: 07bfe0b6b923
#   MKL_ENABLE_INSTRUCTIONS=SSE4_2: 07bfe0b6b923
#   MKL_CBWR=COMPATIBLE: 24052f2c2635
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
export HF_HUB_OFFLINE=1 HF_HOME="$dir/hf" CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
pins=('torch==2.13.0' 'numpy==2.4.6')
if command -v uv >/dev/null; then
  uv venv --quiet venv && uv pip install --quiet --python venv/bin/python "${pins[@]}"
else
  python3 -m venv venv && venv/bin/python -m pip install --quiet "${pins[@]}"
fi

maker=$(grep -m1 '^vendor_id' /proc/cpuinfo | sed 's/.*: //')
echo "CPU: $maker"
if [ "$maker" != AuthenticAMD ]; then
  echo "this script shows something on an AMD CPU only"
  exit 0
fi
cat >product.py <<'EOF'
import hashlib

import torch

torch.set_num_threads(1)
draw = torch.Generator().manual_seed(0)
a, b = torch.randn(2, 384, 384, generator=draw)
assert torch.backends.mkl.is_available()
print(hashlib.sha256((a @ b).numpy().tobytes()).hexdigest()[:12])
EOF
venv/bin/python -c 'import torch; print("torch", torch.__version__, "with", torch.__config__.show().split("settings: ")[1][:13])'
plain=$(venv/bin/python product.py)
echo "no setting: $plain"
for setting in MKL_CBWR=SSE4_2 MKL_CBWR=AVX2 MKL_ENABLE_INSTRUCTIONS=SSE4_2 MKL_CBWR=COMPATIBLE; do
  bits=$(env "$setting" venv/bin/python product.py 2>&1)
  echo "$setting: $bits"
  if [ "$setting" = MKL_CBWR=COMPATIBLE ]; then [ "$bits" != "$plain" ]; else [ "$bits" = "$plain" ]; fi
done
