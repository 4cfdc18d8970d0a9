#!/usr/bin/env bash
# Train with two objectives, measure the landscapes of one run, write figures and tables.
#   scripts/reproduce.sh PYTHON [RESULTS]
# Every step continues where it was killed. What is worth keeping is copied to RESULTS (default outputs/laptop_results).
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
results=${2:-outputs/laptop_results}
mkdir -p "$results/figures" "$results/tables" "$results/datasets"
begin=$SECONDS
step() { local started=$SECONDS; "$python" -m "$@"; echo "$((SECONDS - started)) s  python -m $*" | tee -a "$results/wall_time.txt"; }

step rlvr_landscape_plugin.trl @ configs/train/laptop.toml
step rlvr_landscape_plugin.trl @ configs/train/laptop.toml --output outputs/laptop_grpo_n --objective.name grpo_n
step rlvr_landscape_plugin.sweep @ configs/sweep/laptop.toml
step rlvr_landscape_analysis outputs/laptop_landscape --threshold 0.5
step rlvr_landscape_analysis.trainer_log outputs/laptop outputs/laptop_grpo_n --out outputs/laptop_landscape/training

report=outputs/laptop_landscape/report
cp "$report"/figures/{panels,controlled,training,scatter_step000040_slice0}.png "$report/figures/landscape.gif" "$results/figures/"
cp outputs/laptop_landscape/training/* "$results/"
cp "$report"/tables/* "$results/tables/"
cp outputs/laptop_landscape/landscape_*.nc "$results/datasets/"
for run in laptop laptop_grpo_n; do
    for journal in metrics evaluations; do cp "outputs/$run/$journal.jsonl" "$results/$run.$journal.jsonl"; done
done
echo "$((SECONDS - begin)) s  together, on $(nproc) cores" | tee -a "$results/wall_time.txt"
du -sh "$results"
