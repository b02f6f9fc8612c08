#!/usr/bin/env bash
# One would guess: a tokenizer trained on a file is the same as one trained on the file's text.
# What happens: train([file]) reads line by line, and every line is a text of its own. What spans lines is
# never counted: with a byte-level tokenizer a run of line breaks never becomes a token, while
# train_from_iterator([text]) makes one. So a blank line costs two tokens for ever, code and poems most.
# Version: tokenizers 0.23.3.
# Who is hurt: whoever compares two tokenizers, or a re-implementation with this one, on the same file.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install -q tokenizers==0.23.3
TEXT="$folder/text.txt" "$folder/bin/python" - <<'PYTHON' 2>/dev/null
import os
from pathlib import Path

import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

text = "one\n\n\ntwo\n\n\n" * 100
Path(os.environ["TEXT"]).write_text(text)
found = {}
for how in ("train([file])", "train_from_iterator([text])"):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    if "file" in how:
        tokenizer.train([os.environ["TEXT"]], trainer)
    else:
        tokenizer.train_from_iterator([text], trainer)
    found[how] = tokenizer.encode("one\n\n\ntwo").tokens
    print(f"{how}: {found[how]}")
print(f"tokenizers {tokenizers.__version__}")
by_line, whole = found.values()
assert by_line == ["one", "Ċ", "Ċ", "Ċ", "two"] and whole == ["one", "ĊĊ", "Ċ", "two"], (
    "the behaviour has changed"
)
PYTHON
