#!/bin/sh
# Score runs on the cluster: k8s/eval.sh LABEL --lora-paths dump/NAME … [--dry-run]
set -eu
here=$0
while [ -L "$here" ]; do # as often as links lead to links
  link=$(readlink "$here")
  case $link in /*) here=$link ;; *) here=$(dirname "$here")/$link ;; esac
done
python=$(CDPATH='' cd "$(dirname "$here")/.." && pwd -P)/.venv/bin/python
[ -x "$python" ] || exec stillhouse eval "$@"
exec "$python" -P -m stillhouse eval "$@"
