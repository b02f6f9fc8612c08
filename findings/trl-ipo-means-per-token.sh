#!/usr/bin/env bash
# One would guess: DPOConfig(loss_type="ipo", beta=0.1) is equation 17 of the paper (Azar et al. 2023): the
# difference of the answers' log-ratios, each summed over its tokens, is drawn to 1 / (2 beta) = 5 nats.
# What happens: each log-ratio is divided by the number of the answer's tokens first. So 5 nats *per token*
# are asked for: with answers of twenty tokens twenty times as much, and answers of different lengths have
# different aims.
# Version: TRL 1.16.0.
# Who is hurt: whoever takes beta from the paper, or compares it with an implementation that sums.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install -q torch==2.13.0 numpy==2.4.4 transformers==5.24.0 accelerate==1.15.0 \
    datasets==5.2.0 trl==1.16.0
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error FOLDER="$folder" "$folder/bin/python" - <<'PYTHON' 2>/dev/null
import os

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers

BETA = 0.1
vocab = {token: i for i, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<end>", "<pad>"])}
plain = Tokenizer(models.BPE(vocab=vocab, merges=[]))
plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", pad_token="<pad>")
pair = {"prompt": "Say it.", "chosen": " Yes, with pleasure.", "rejected": " No."}
config = transformers.GPT2Config(
    vocab_size=len(vocab), n_positions=64, n_embd=32, n_layer=1, n_head=2, initializer_range=0.3,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
)  # fmt: skip
transformers.set_seed(0)
policy, reference = transformers.GPT2LMHeadModel(config).eval(), transformers.GPT2LMHeadModel(config).eval()


def log_ratio(answer):
    """log π − log π_ref of an answer with its end, and its tokens."""
    begin, ids = len(tokenizer(pair["prompt"])["input_ids"]), tokenizer(pair["prompt"] + answer)["input_ids"]
    ids = torch.tensor([[*ids, tokenizer.eos_token_id]])
    with torch.no_grad():
        logs = [
            m(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[begin - 1 :, 0]
            for m in (policy, reference)
        ]
    return (logs[0] - logs[1]).sum().item(), len(logs[0])


(chosen, n), (rejected, m) = log_ratio(pair["chosen"]), log_ratio(pair["rejected"])
by_sums = (chosen - rejected - 1 / (2 * BETA)) ** 2
by_means = (chosen / n - rejected / m - 1 / (2 * BETA)) ** 2
how = trl.DPOConfig(
    os.environ["FOLDER"] + "/out", loss_type=["ipo"], beta=BETA, max_steps=1, per_device_train_batch_size=2,
    save_strategy="no", logging_steps=1, report_to=[], bf16=False, use_cpu=True, disable_tqdm=True,
)  # fmt: skip
trainer = trl.DPOTrainer(
    model=policy,
    ref_model=reference,
    args=how,
    train_dataset=Dataset.from_list([pair] * 2),
    processing_class=tokenizer,
)
trainer.remove_callback(transformers.PrinterCallback)
trainer.train()
theirs = next(line["loss"] for line in trainer.state.log_history if "loss" in line)
print(f"log-ratios: chosen {chosen:.3f} over {n} tokens, rejected {rejected:.3f} over {m}")
print(
    f"eq. 17 with sums: {by_sums:.3f}; with means over tokens: {by_means:.3f}; "
    f"the trainer's loss: {theirs:.3f}"
)
print(f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
assert abs(theirs - by_means) < 0.02 * by_means and abs(theirs - by_sums) > 1, "the behaviour has changed"
PYTHON
