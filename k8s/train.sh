#!/bin/sh
# Train one point on the cluster: k8s/train.sh NAME --lmbda 0 --learning-rate 5e-6 … [--dry-run]
set -eu
here=$0
while [ -L "$here" ]; do # as often as links lead to links
  link=$(readlink "$here")
  case $link in /*) here=$link ;; *) here=$(dirname "$here")/$link ;; esac
done
python=$(CDPATH='' cd "$(dirname "$here")/.." && pwd -P)/.venv/bin/python
[ -x "$python" ] || exec stillhouse train "$@"
exec "$python" -P -m stillhouse train "$@"
