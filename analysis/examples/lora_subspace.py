"""Is the landscape inside the subspace of a LoRA adapter another one than outside? Two censuses, one figure, one table.

python -m rlvr_landscape_plugin.trl @ configs/train/lora.toml
python -m rlvr_landscape_plugin.sweep @ configs/sweep/lora_inside.toml
python -m rlvr_landscape_plugin.sweep @ configs/sweep/lora_outside.toml
python analysis/examples/lora_subspace.py outputs/census_lora_inside outputs/census_lora_outside outputs/lora
"""

from __future__ import annotations

import sys
from pathlib import Path

import rlvr_landscape_analysis as rla
from rlvr_landscape_analysis import figures
from rlvr_landscape_analysis.evidence import open_evidence
from rlvr_landscape_analysis.statistics.census import census


def main(inside: str, outside: str, target: str) -> None:
    """Draw the figure into `target` and print one line per distance."""
    found = {}
    for name, folder in (("inside", inside), ("outside", outside)):
        censuses = open_evidence(folder).censuses
        if len(censuses) != 1:
            raise rla.AnalysisError(f"{folder} holds censuses of {len(censuses)} snapshots; this example compares one")
        found[name] = census(next(iter(censuses.values())))
    drawn = figures.compare_censuses(found)
    figures.save_figure(drawn["axes"]["change"].figure, Path(target))
    print("space    distance  reward change [95 % interval]    KL, nat per completion")
    for name, data in found.items():
        for one in data["radius"].values:
            row = data.sel(radius=one)
            low, high = row["change_interval"].values
            print(
                f"{name:8} {float(row['radius']):8.3g}  {float(row['change']):+.4f} [{low:+.4f}, {high:+.4f}]    "
                f"{float(row['kl']):.4g}"
            )


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
