"""The definitions once more, by other means: transformers in float32 and NumPy in float64, no project code."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def draw(seed: int, axis: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The documented random stream."""
    text = f"numpy-philox-sha256-v1\x00{seed}\x00{axis}\x00{name}".encode()
    key = int.from_bytes(hashlib.sha256(text).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32)


def perturbed(policy: Path, seed: int, alpha: float, beta: float) -> Any:
    """The policy at θ + α δ + β η, per-tensor normalised, as a transformers model in float32."""
    model = AutoModelForCausalLM.from_pretrained(str(policy), dtype=torch.float32).eval()
    tied = getattr(model.config, "tie_word_embeddings", False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if tied and name == "lm_head.weight":
                continue
            theta = parameter.numpy().astype(np.float64)
            moved = theta.copy()
            for axis, coordinate in (("alpha", alpha), ("beta", beta)):
                noise = draw(seed, axis, name, theta.shape).astype(np.float64)
                norm = np.linalg.norm(noise)
                if norm:
                    moved += coordinate * noise * (np.linalg.norm(theta) / norm)
            parameter.copy_(torch.from_numpy(moved.astype(np.float32)))
    return model


def logprobs(model: Any, tokens: np.ndarray) -> np.ndarray:
    """log π(token t | before) for t = 1 …, float64."""
    with torch.no_grad():
        logits = model(torch.as_tensor(np.array(tokens, dtype=np.int64))[None]).logits[0].double()
    table = torch.log_softmax(logits[:-1], dim=-1)
    return table.gather(1, torch.as_tensor(np.array(tokens[1:], dtype=np.int64))[:, None])[:, 0].numpy()


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The greedy continuation, one full forward pass per token (no cache to be stale)."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def rendered(policy: Path, messages: list[dict[str, str]]) -> str:
    """The chat template's text, generation prompt included."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(policy))
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def config_of(policy: Path) -> dict[str, Any]:
    """config.json."""
    return json.loads((policy / "config.json").read_text())
