#!/usr/bin/env bash
# One would guess: with train_sampling_strategy="group_by_length" the Trainer makes batches of similar
# length, to save padding, and takes them in random order.
# What happens: it sorts fifty batches' worth of rows from the longest to the shortest and takes them in
# that order, again and again: batches are not shuffled, and an epoch ends with its shortest rows. Where
# length tells the kind of row, one kind is trained on for twenty-five steps on end, and the model ends with
# wrong frequencies, in silence: here 25% for a kind of row that half of them are of (random order: 48%).
# Version: transformers 5.24.0, its default AdamW and linear decay.
# Who is hurt: whoever fine-tunes on rows of several kinds (short chats and long documents) and groups to
# save time.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install -q torch==2.13.0 numpy==2.4.4 transformers==5.24.0 accelerate==1.15.0 \
    datasets==5.2.0
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error FOLDER="$folder" "$folder/bin/python" - <<'PYTHON' 2>/dev/null
import os

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

BEGIN, SHORT, LONG = 0, 1, 2
generator = torch.Generator().manual_seed(0)
kinds = torch.randperm(6400, generator=generator) < 3200  # exactly half are of each kind
rows = [
    {"input_ids": [BEGIN, SHORT] + [3] * 2 if kind else [BEGIN, LONG] + [3] * 8} for kind in kinds.tolist()
]


def collate(some):
    width = max(len(row["input_ids"]) for row in some)
    ids = torch.tensor([row["input_ids"] + [3] * (width - len(row["input_ids"])) for row in some])
    labels = ids.clone()
    labels[:, 2:] = -100  # only the kind is to be learned
    seen.append(int((ids[:, 1] == SHORT).sum()))
    return {"input_ids": ids, "labels": labels}


shares, orders = {}, {}
for strategy in ("random", "group_by_length"):
    seen = []
    transformers.set_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=4, n_positions=16, n_embd=32, n_layer=1, n_head=2))
    how = TrainingArguments(
        os.environ["FOLDER"] + "/out",
        per_device_train_batch_size=32,
        num_train_epochs=1,
        learning_rate=1e-3,
        train_sampling_strategy=strategy,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, how, train_dataset=rows, data_collator=collate)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    orders[strategy] = seen
    with torch.no_grad():
        shares[strategy] = model.eval()(torch.tensor([[BEGIN]])).logits[0, -1].softmax(-1)[SHORT].item()
    print(
        f"{strategy}: short rows among 32, batches 1, 10, 20, 30, 40, 50: "
        f"{[seen[i] for i in (0, 9, 19, 29, 39, 49)]}"
    )
    print(f"    half of the rows are short; the model gives them {shares[strategy]:.0%}")
print(f"transformers {transformers.__version__}, torch {torch.__version__}")
grouped = orders["group_by_length"]
falls = [set(grouped[i : i + 20]) for i in (1, 29, 51, 79)] == [
    {0},
    {32},
] * 2  # long ones, short ones, and again
wrong = abs(shares["random"] - 0.5) < 0.1 < 0.15 < abs(shares["group_by_length"] - 0.5)
assert falls and wrong, "the behaviour has changed"
PYTHON
