#!/usr/bin/env bash
# One would guess: GPT2Backbone.from_preset(a GPT-2 directory) computes what its config.json says.
# What happens: "activation_function" is not read. A network with the exact GELU ("gelu") is computed with
# the tanh approximation ("gelu_new"), which is right for GPT-2 itself: hidden states differ by some 1e-4,
# without a word.
# Version: keras-hub 0.32.0 with keras 3.15.1 and the torch backend.
# Who is hurt: whoever moves a GPT-2 of their own there and takes the difference for rounding.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install -q torch==2.13.0 numpy==2.4.4 transformers==5.24.0 keras==3.15.1 keras-hub==0.32.0
HF_HUB_OFFLINE=1 KERAS_BACKEND=torch TF_CPP_MIN_LOG_LEVEL=3 FOLDER="$folder" \
    "$folder/bin/python" - <<'PYTHON' 2>/dev/null
import json
import os
from pathlib import Path

import keras_hub
import numpy as np
import torch
import transformers
from tokenizers import pre_tokenizers

ids, far = torch.arange(5, 15)[None], {}
for activation in ("gelu_new", "gelu"):
    path = Path(os.environ["FOLDER"], "model-" + activation)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=257, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=256, eos_token_id=256,
        activation_function=activation, initializer_range=0.5,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(path)
    vocab = {
        token: i for i, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"])
    }
    (path / "vocab.json").write_text(json.dumps(vocab))
    (path / "merges.txt").write_text("#version: 0.2\n")
    here = keras_hub.models.GPT2Backbone.from_preset(str(path))
    with torch.no_grad():
        found = here({"token_ids": ids.numpy(), "padding_mask": np.ones((1, 10))}).numpy(force=True)
        far[activation] = np.abs(found - theirs.transformer(ids).last_hidden_state.numpy()).max()
    print(f"{activation}: the largest difference of a hidden state is {far[activation]:.1e}")
print(
    f"keras-hub {keras_hub.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
)
assert far["gelu_new"] < 1e-5 < 1e-4 < far["gelu"], "the behaviour has changed"
PYTHON
