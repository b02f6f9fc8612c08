#!/usr/bin/env bash
# One would guess: DPOConfig(label_smoothing=0.3) trains conservative DPO (Mitchell 2023), as its
# documentation of earlier versions said: of 30% of the pairs the label is taken for flipped.
# What happens: the default loss, "sigmoid", does not look at it. Loss and weights are those of
# label_smoothing=0, bit for bit, without a warning; "robust", "aot" and "exo_pair" do look.
# Version: TRL 1.16.0.
# Who is hurt: whoever moves a recipe for noisy labels to this version. It still runs, without protection.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install -q torch==2.13.0 numpy==2.4.4 transformers==5.24.0 accelerate==1.15.0 \
    datasets==5.2.0 trl==1.16.0
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error FOLDER="$folder" "$folder/bin/python" - <<'PYTHON' 2>/dev/null
import copy
import os

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers

vocab = {token: i for i, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<end>", "<pad>"])}
plain = Tokenizer(models.BPE(vocab=vocab, merges=[]))
plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", pad_token="<pad>")
pairs = Dataset.from_list([{"prompt": f"Say {i}.", "chosen": " Yes.", "rejected": " No."} for i in range(8)])
config = transformers.GPT2Config(vocab_size=len(vocab), n_positions=64, n_embd=32, n_layer=1, n_head=2)


def train(loss, smoothing):
    transformers.set_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    how = trl.DPOConfig(
        os.environ["FOLDER"] + "/out",
        loss_type=[loss],
        label_smoothing=smoothing,
        max_steps=3,
        learning_rate=1e-2,
        per_device_train_batch_size=8,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    more = {"ref_model": copy.deepcopy(model), "train_dataset": pairs, "processing_class": tokenizer}
    trainer = trl.DPOTrainer(model=model, args=how, **more)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


found = {(loss, x): train(loss, x) for loss in ("sigmoid", "robust") for x in (0.0, 0.3)}
for (loss, smoothing), losses in found.items():
    print(f"{loss}, label_smoothing={smoothing}: losses {losses}")
print(f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
ignored = found["sigmoid", 0.0] == found["sigmoid", 0.3]
assert ignored and found["robust", 0.0] != found["robust", 0.3], "the behaviour has changed"
PYTHON
