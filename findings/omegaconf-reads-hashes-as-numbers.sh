#!/usr/bin/env bash
# A hash that PyYAML wrote as text is a number, or infinity, when OmegaConf reads the file.
#
# Expected: OmegaConf.load gives back the text that yaml.safe_dump wrote, as yaml.safe_load does.
# Happens: PyYAML leaves "12e4" and "1234e567" bare, because to YAML 1.1 a float needs a point. OmegaConf's loader
#   has a pattern for floats without one, so they become 120000.0 and inf. OmegaConf.to_yaml quotes them.
# Versions: pyyaml 6.0.3, omegaconf 2.3.1.
# Matters: ids of runs, commits and digests in a config: about one hash of eight hex digits in sixty is another
#   value after Hydra has read it, without a word.
# Do: write files for OmegaConf with OmegaConf.to_yaml, or quote every text.
#
# Seen on 2026-11-30:
#   pyyaml 6.0.3, omegaconf 2.3.1
#   12e4: written as id: 12e4, PyYAML reads '12e4', OmegaConf reads 120000.0
#   1234e567: written as id: 1234e567, PyYAML reads '1234e567', OmegaConf reads inf
#   of 10,000 hashes of eight digits, changed: 164 by OmegaConf, 0 by PyYAML, 0 if OmegaConf.to_yaml wrote them
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
pins=('pyyaml==6.0.3' 'omegaconf==2.3.1')
if command -v uv >/dev/null; then
  uv venv --quiet venv && uv pip install --quiet --python venv/bin/python "${pins[@]}"
else
  python3 -m venv venv && venv/bin/python -m pip install --quiet "${pins[@]}"
fi

venv/bin/python - <<'EOF'
import hashlib

import omegaconf
import yaml
from omegaconf import OmegaConf

print(f"pyyaml {yaml.__version__}, omegaconf {omegaconf.__version__}")
for text, number in (("12e4", 120000.0), ("1234e567", float("inf"))):
    written = yaml.safe_dump({"id": text}).strip()
    theirs, ours = OmegaConf.create(written)["id"], yaml.safe_load(written)["id"]
    print(f"{text}: written as {written}, PyYAML reads {ours!r}, OmegaConf reads {theirs!r}")
    assert (ours, theirs) == (text, number)

hashes = {f"k{i}": hashlib.sha256(str(i).encode()).hexdigest()[:8] for i in range(10_000)}
written = yaml.safe_dump(hashes)
changed = [
    sum(read[key] != text for key, text in hashes.items())
    for read in (
        OmegaConf.create(written),
        yaml.safe_load(written),
        OmegaConf.create(OmegaConf.to_yaml(OmegaConf.create(hashes))),
    )
]
print(
    f"of 10,000 hashes of eight digits, changed: {changed[0]} by OmegaConf, {changed[1]} by PyYAML,"
    f" {changed[2]} if OmegaConf.to_yaml wrote them"
)
assert changed[0] > 50 and changed[1:] == [0, 0], changed
EOF
