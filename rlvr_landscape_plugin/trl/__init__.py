"""Training on one machine: TRL's GRPOTrainer between the project's own episodes and its own vLLM server.

    python -m rlvr_landscape_plugin.trl @ configs/train/laptop.toml

TRL owns the loop (batches of groups, gradient, optimizer, checkpoints); everything that defines the experiment comes
from here, so that a landscape is measured around a policy that was trained by the same verifier, the same sampler and
the same objective:

    train.py          a command's share of a run: start, continue, evaluate, keep snapshots
    run_directory.py  identity, journals, snapshots, resume
    states.py         training states, whole only with their marker
    server.py         the vLLM server that samples, and how new weights get there
    batch.py          episodes → the columns that TRL's rollout function returns, and metrics
    trainer.py        the GRPOTrainer with the objective of objectives.py, metrics per step
    logprobs.py       log-probabilities of sampled tokens, and KL divergences
    reference.py      the KL reference and its resets
    lora.py           the adapter of [lora], by PEFT
    optimizer.py      Muon for matrices, AdamW for the rest, as one optimizer

Inside this package `import trl` is the library; nothing here shadows it. Importing the package itself costs nothing.
"""
