"""The prime-rl plugin: the project's objectives as prime-rl's custom loss, and snapshots of the policy on the way.

    [trainer.loss]
    type = "custom"
    import_path = "rlvr_landscape_plugin.prime_rl.loss.policy_loss"

    adapter.py    objectives.py in the form of prime-rl's per-sequence loss; needs neither prime-rl nor a GPU
    snapshots.py  the hook around weight broadcast and checkpoint
    lora.py       the adapter of a LoRA run as files that PEFT loads
    versions.py   what the hook uses of prime-rl, and the check that it is there
    loss.py       what `import_path` names: reads the run's configuration, checks it, installs the hook

Inside this package `import prime_rl` is the trainer; nothing here shadows it. Importing the package itself costs
nothing. docs/prime-rl.md leads from installation to the first figure.
"""
