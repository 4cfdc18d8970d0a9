"""Make the policy that ships with the package: `tiny-sorter`, a Qwen2 of 1.9 M parameters that half knows how to sort.

A fixed seed, the built-in names, a tokenizer trained on the environment's own text, and supervised warm-up on the true
answers of two-turn tasks, stopped while there is room to learn. It writes a Hugging Face directory; the numbers of the
model card come from `vf-eval`, see the card.

The tokenizer decides what a landscape costs: it keeps every part of a name apart from the rest, and lets everything
between two names ("\\n", " // new name!\\n", half a sentence of the prompt) merge into single tokens. An episode of
the environment's default size is about 110 tokens so, a third of what one that splits at spaces needs.

    python scripts/make_tiny_sorter.py --out rlvr_landscape_plugin/policies/tiny_sorter
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VOCABULARY = 2048
STEPS = 1000
BATCH = 32
"""Episodes per optimizer step."""
POOL = 8
"""Batches that are drawn together and cut by length, so that little is padded."""
MUON_LR, ADAM_LR = 0.02, 3e-3
"""Peak learning rates: Muon for the matrices of the layers, Adam for embeddings, norms and biases. After 200 steps the
reward with 1 to 3 names was 0.17 so, and 0.05 with Adam alone."""
WARM_UP = 50
"""Steps over which the learning rates rise; then they fall as a cosine."""
INITIAL_STD = 0.06
"""Standard deviation of the initial weights: about 1 / sqrt(hidden size), three times what large models use."""
EASY, DEFAULT, LONG = (1, 3), (1, 5), (4, 10)
"""Fewest and most names per turn. Batches of default and of long tasks alternate (the long ones teach more comparisons
per token); the quick looks are at easy and default ones."""
TRAIN_SEED, EVAL_SEED = 1, 3
"""Task seeds; measurements use others (12345 for landscapes, 2001 for evaluation)."""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Episode = tuple[list[int], list[bool]]
"""Token ids of a whole conversation, and which of them the policy should have said."""


def conversations(seed: int, names: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """An endless stream of two-turn conversations; `names`: fewest and most names per turn."""
    from rlvr_alphabet_sort.taskset import AlphabetSortConfig, AlphabetSortTaskset

    options: dict[str, Any] = {"min_turns": 2, "max_turns": 2, "seed": seed}
    options |= {"min_names_per_turn": names[0], "max_names_per_turn": names[1]}
    config = AlphabetSortConfig(id="rlvr-alphabet-sort", **options)
    return (task.data.info for task in AlphabetSortTaskset(config))


def answers(info: dict[str, Any]) -> list[str]:
    """The true answer of every turn."""
    from rlvr_alphabet_sort.rules import tag_of

    return [
        f"<{tag_of(turn)}>\n" + "\n".join(names) + f"\n</{tag_of(turn)}>"
        for turn, names in enumerate(info["ground_truths"])
    ]


def make_tokenizer() -> Any:
    """Byte-level BPE over the template's role lines, parts of names, digits, and whatever stands between those.

    A role line never merges with the text behind it, so the tokens of a conversation extend the tokens of its prompt.

    Loaders of a Qwen2 model put Qwen2's own pre-tokenizer in the place of any other, silently. So tokens that cross its
    boundaries (they hold several words) become added tokens, which are found before it; all others are parts of words,
    on which the two agree. The ids stay those of the trained vocabulary.
    """
    from transformers import AddedToken, Qwen2Tokenizer

    trained = train_bpe()
    text_of = {
        token: trained.decode([index], skip_special_tokens=False) for token, index in trained.get_vocab().items()
    }
    qwen2 = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    sample = itertools.islice(conversations(TRAIN_SEED, DEFAULT), 4000)
    texts = [text for info in sample for text in [*info["user_turns"], *answers(info)]]
    used = {token for row in trained.encode_batch([*texts, *roles()]) for token in row.tokens}
    phrases = sorted(token for token in used - set(SPECIAL) if len(qwen2.pre_tokenize_str(text_of[token])) > 1)

    model = json.loads(trained.to_str())["model"]
    # Its annotations know merges as text only; pairs are what it hands on.
    make: Any = Qwen2Tokenizer
    tokenizer = make(
        vocab={text_of[token] if token in phrases else token: index for token, index in model["vocab"].items()},
        merges=[tuple(pair) for pair in model["merges"] if not {*pair, "".join(pair)} & set(phrases)],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=2048,
    )
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken(text_of[token], special=False, normalized=False) for token in phrases])
    tokenizer.chat_template = CHAT_TEMPLATE
    for text in texts:
        if tokenizer.encode(text) != trained.encode(text).ids:
            raise AssertionError(f"the tokenizer differs from the trained one on {text!r}")
    return tokenizer


def train_bpe() -> Any:
    """The vocabulary and its merges, as a plain `tokenizers` object."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"(?:system|user|assistant)\n|[A-Z][a-z]+|[A-Z]+|[0-9]|[^A-Z0-9]+"), behavior="isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = itertools.islice(conversations(TRAIN_SEED, DEFAULT), 4000)
    texts = (text for info in sample for text in [*info["user_turns"], *answers(info), *roles()])
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def roles() -> tuple[str, ...]:
    """What the chat template writes between its special tokens."""
    return "system\n", "user\n", "assistant\n", "\n"


def make_model(tokenizer: Any, seed: int) -> Any:
    """A fresh Qwen2, float32, tied embeddings."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        initializer_range=INITIAL_STD,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config).float()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = None
    return model


def render(tokenizer: Any, info: dict[str, Any]) -> Episode:
    """One conversation as the chat template writes it, tokenised piece by piece as a sampler extends it."""
    ids: list[int] = []
    said: list[bool] = []
    for message, answer in zip(info["user_turns"], answers(info), strict=True):
        lead = "\n" if ids else ""
        prompt = tokenizer.encode(f"{lead}<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n")
        reply = tokenizer.encode(f"{answer}<|im_end|>")
        ids += prompt + reply
        said += [False] * len(prompt) + [True] * len(reply)
    return ids, said


def batches(tokenizer: Any, names: tuple[int, int]) -> Iterator[list[Episode]]:
    """An endless stream of training batches of similar lengths, in random order."""
    stream = conversations(TRAIN_SEED, names)
    rng = random.Random(TRAIN_SEED)
    while True:
        pool = [render(tokenizer, next(stream)) for _ in range(BATCH * POOL)]
        pool.sort(key=lambda episode: len(episode[0]))
        cuts = [pool[i : i + BATCH] for i in range(0, len(pool), BATCH)]
        rng.shuffle(cuts)
        yield from cuts


def loss_of(model: Any, batch: list[Episode], pad: int) -> Any:
    """Mean cross-entropy over the answers' tokens, nat per token."""
    import torch

    width = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([row + [pad] * (width - len(row)) for row, _ in batch])
    said = torch.tensor([row + [False] * (width - len(row)) for _, row in batch])
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    chosen = said[:, 1:]
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[chosen]), ids[:, 1:][chosen])


def mean_reward(model: Any, tokenizer: Any, names: tuple[int, int], count: int) -> float:
    """Mean reward at temperature 1 on `count` two-turn tasks, a quick look during training."""
    import torch
    from rlvr_alphabet_sort.rules import episode_reward

    tokenizer.padding_side = "left"
    tasks = list(itertools.islice(conversations(EVAL_SEED, names), count))
    texts, replies = [""] * count, [[] for _ in range(count)]
    torch.manual_seed(0)
    for turn in range(2):
        texts = [
            f"{text}<|im_start|>user\n{info['user_turns'][turn]}<|im_end|>\n<|im_start|>assistant\n"
            for text, info in zip(texts, tasks, strict=True)
        ]
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        with torch.no_grad():
            out = model.generate(**batch, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=96)
        for i, row in enumerate(out[:, batch["input_ids"].shape[1] :]):
            replies[i].append(tokenizer.decode(row, skip_special_tokens=True))
            texts[i] += replies[i][-1] + "<|im_end|>\n"
    rewards = [episode_reward(r, info["ground_truths"], 4, True) for r, info in zip(replies, tasks, strict=True)]
    return sum(rewards) / count


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """Write the Hugging Face directory; a model card in it stays as it is."""
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)


def make_optimizers(model: Any) -> list[Any]:
    """Muon for the layers' matrices, Adam for everything else, at their peak learning rates."""
    import torch

    named = list(model.named_parameters())
    matrices = [weight for name, weight in named if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in named if weight.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.0, momentum=0.95, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(model: Any, tokenizer: Any, steps: int, look_every: int, out: Path) -> None:
    """The warm-up; saves at every look and at the end."""
    import torch

    optimizers = make_optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: learning_rate(done + 1, steps))
        for optimizer in optimizers
    ]
    default, long = batches(tokenizer, DEFAULT), batches(tokenizer, LONG)
    started = time.monotonic()
    for step in range(1, steps + 1):
        loss = loss_of(model, next(long if step % 2 else default), tokenizer.pad_token_id)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if step % look_every == 0 or step == steps:
            rewards = {
                f"reward with {names[0]} to {names[1]} names": round(mean_reward(model, tokenizer, names, 128), 4)
                for names in (EASY, DEFAULT)
            }
            seconds = round(time.monotonic() - started)
            print(json.dumps({"step": step, "loss": round(loss.item(), 4), "seconds": seconds, **rewards}), flush=True)
            save(model, tokenizer, out)


def learning_rate(step: int, steps: int) -> float:
    """Share of the peak learning rate in a step (1-based)."""
    progress = max(0.0, (step - WARM_UP) / max(1, steps - WARM_UP))
    return min(step / WARM_UP, 0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--look-every", type=int, default=200, help="steps between quick looks (default: %(default)s)")
    args = parser.parse_args()
    if min(args.steps, args.threads, args.look_every) < 1:
        parser.error("--steps, --threads and --look-every must be at least 1")

    import torch
    import transformers

    torch.set_num_threads(args.threads)
    transformers.logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, args.seed)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(tokenizer)} tokens", flush=True)
    train(model, tokenizer, args.steps, args.look_every, args.out)


if __name__ == "__main__":
    main()
