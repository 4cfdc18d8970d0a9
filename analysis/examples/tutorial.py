"""From a run's netCDF files to a figure and a sentence, in seven steps. Paste it, or run it on a run of your own:

    python analysis/examples/tutorial.py [RUN_DIR]

Without RUN_DIR it writes and analyses a synthetic run, whose truth is known.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import rlvr_landscape_analysis as rla
import xarray as xr
from rlvr_landscape_analysis import figures

# In a notebook, the arguments are those of its kernel.
arguments = [] if "ipykernel" in sys.modules else sys.argv[1:]
if arguments:
    run = Path(arguments[0])
else:
    from rlvr_landscape_analysis import synthetic

    run = Path(tempfile.mkdtemp()) / "synthetic"
    shapes = {0: "tilt", 1: "mixed", 10: "kl", 50: "kl"}
    synthetic.write_run(run, steps=tuple(shapes), shape=shapes, prompts=128)

# 1. A dataset is plain xarray; `ds.landscape` adds what a landscape needs.
path = sorted(run.glob("landscape_step*_slice*.nc"))[-1]
ds = xr.open_dataset(path)
print(ds["reward"].dims, dict(ds.sizes))

# 2. Means with standard errors; prompts are the independent units.
reward = ds.landscape.mean("reward")
at_origin = reward.sel(alpha=0, beta=0)
print(f"reward of the checkpoint: {at_origin['mean']:.3f} ± {at_origin['standard_error']:.3f}")

# 3. Everything else comes as labelled arrays too.
k = ds.sizes["rollout"]
print(f"pass@{k} of the checkpoint: {ds.landscape.pass_at_k(k)['mean'].sel(alpha=0, beta=0):.3f}")
print("along a ray:", ds.landscape.kl()["mean"].pipe(rla.ray, np.pi / 4).round(2).values)

# 4. Is it KL, or only distance? Plain, corrected for noise, and what is left beyond the radius.
table = ds.landscape.correlations(bootstrap=rla.Bootstrap(resamples=1000)).sel(pair="kl_reward")
for control in ("none", "shell", "radial"):
    row = table.sel(control=control)
    low, high = row["contribution_interval"].values
    print(f"{control:7s} contributes {row['contribution']:+.2f} [{low:+.2f}, {high:+.2f}]", row["reason"].item())

# 5. The best neighbour, without the winner's curse.
best = ds.landscape.best_point()
low, high = best["gain_interval"].values
print(f"measured gain {best['naive_gain']:+.3f}, honest gain {best['gain']:+.3f} [{low:+.3f}, {high:+.3f}]")

# 6. A whole run: all statistics and the claims as sentences.
analysis = rla.analyse_run(run, bootstrap=rla.Bootstrap(resamples=1000))
for claim in analysis.claims:
    print(f"{claim.name}: {claim.verdict}. {claim.sentence}")

# 7. Figures take `ax` and return what they drew.
figure, ax = figures.new_figure()
figures.reward_landscape(ds, ax)
print("figure:", *figures.save_figure(figure, run / "figures" / "tutorial"))
