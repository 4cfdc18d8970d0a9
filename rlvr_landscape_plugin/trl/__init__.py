"""Training on one machine: TRL's GRPOTrainer between the project's own episodes and its own vLLM server.

    python -m rlvr_landscape_plugin.trl @ configs/train/laptop.toml

TRL owns the loop (batches of groups, gradient, optimizer, checkpoints); everything that defines the experiment comes
from here, so that a landscape is measured around a policy that was trained by the same verifier, the same sampler and
the same objective:

    server.py     the vLLM server that samples, and how new weights get there
    batch.py      episodes → the columns that TRL's rollout function returns
    trainer.py    the GRPOTrainer with the objective of objectives.py, metrics per step, states and snapshots
    optimizer.py  Muon for matrices, AdamW for the rest, as one optimizer
    run.py        the run directory: identity, journals, resume

Inside this package `import trl` is the library; nothing here shadows it. Importing the package itself costs nothing.
"""
