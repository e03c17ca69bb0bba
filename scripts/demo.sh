#!/usr/bin/env bash
# The whole flow on real images, in a few minutes on two cores: supernet, training, search, export, benchmark, report.
# Usage: bash scripts/demo.sh [options of 'nasq run']
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" "."
out=${NASQ_DEMO_OUT:-runs/demo}
resume=()
if [ -e "$out/config.yaml" ]; then
    resume=(--resume) # a demo that was interrupted goes on; a finished one shows its result again
fi
exec nasq run --preset digits --out "$out" "${resume[@]}" "$@"
