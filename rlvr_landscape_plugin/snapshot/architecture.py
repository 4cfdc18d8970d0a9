"""Whether a snapshot has the tensors of the architecture in its config.json, asked of transformers without weights."""

from __future__ import annotations

from rlvr_landscape_plugin.snapshot.snapshot import Snapshot, compare_tensors


def check_architecture(snapshot: Snapshot) -> str | None:
    """Raise `SnapshotError` unless the tensors on disk are those that config.json asks for, by name and shape.

    Returns None, or the reason why it cannot be checked: there is no torch here (the extra `sweep` needs none),
    transformers does not know the architecture, or config.json is not one of a model. Takes no memory for weights.
    """
    try:
        import torch
    except ModuleNotFoundError:
        return "torch is not installed here"
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(snapshot.model), local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for tied in set(getattr(model, "_tied_weights_keys", None) or ()) - set(snapshot.tensors):
        if getattr(config, "tie_word_embeddings", False):
            expected.pop(tied, None)
    compare_tensors(expected, snapshot, f"the architecture in its config.json ({config.architectures})")
    return None
