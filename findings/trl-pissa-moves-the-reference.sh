#!/usr/bin/env bash
# One would guess: DPO with adapters needs no second model, since the reference is the model with its adapters
# switched off. So the first loss is log 2, whichever way the adapters are initialised: policy and reference
# are one.
# What happens: PiSSA and OLoRA move part of each pretrained weight into the adapter, and leave the rest as
# the base. The policy starts as the pretrained model, but the reference is what is left without that part:
# its answers have other probabilities, margins aren't 0 at the first step, and all training is held near
# it. And if the model is given with its adapters on, the trainer adds a second one to keep as reference,
# which takes its part from the base weights once more: the policy is no longer the model that was given,
# and the loss is log 2.
# Version: PEFT 0.21.2 with TRL 1.16.0. No warning.
# Who is hurt: whoever takes PiSSA or OLoRA, made to learn faster than LoRA, for DPO, or for any trainer whose
# KL is to the model without adapters.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install -q torch==2.13.0 numpy==2.4.4 transformers==5.24.0 accelerate==1.15.0 \
    datasets==5.2.0 trl==1.16.0 peft==0.21.2
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error FOLDER="$folder" "$folder/bin/python" - <<'PYTHON' 2>/dev/null
import math
import os

import peft
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers

vocab = {token: i for i, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<end>", "<pad>"])}
plain = Tokenizer(models.BPE(vocab=vocab, merges=[]))
plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", pad_token="<pad>")
pair = {"prompt": "Say it.", "chosen": " Yes, with pleasure.", "rejected": " No."}
ids = tokenizer(pair["prompt"] + pair["chosen"], return_tensors="pt")["input_ids"]


@torch.no_grad()
def log_probs(model):
    return model(ids).logits.log_softmax(-1)


def first_step(init, given):
    """How far policy and reference are from the pretrained model (nats), and the trainer's first loss.

    Either the trainer puts the adapters on, or the model is `given` with them.
    """
    transformers.set_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(vocab), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=64, initializer_range=0.1,
        )
    )  # fmt: skip
    pretrained = log_probs(model)
    how = trl.DPOConfig(
        os.environ["FOLDER"] + "/out", beta=0.1, max_steps=1, per_device_train_batch_size=2, learning_rate=0,
        save_strategy="no", logging_steps=1, report_to=[], bf16=False, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    adapters = peft.LoraConfig(
        r=8, lora_alpha=8, init_lora_weights=init, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    trainer = trl.DPOTrainer(
        model=peft.get_peft_model(model, adapters) if given else model,
        args=how,
        train_dataset=Dataset.from_list([pair] * 2),
        processing_class=tokenizer,
        peft_config=None if given else adapters,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    policy = log_probs(trainer.model)
    if given:
        trainer.model.set_adapter("ref")
        reference = log_probs(trainer.model)
        trainer.model.set_adapter("default")
    else:
        with trainer.model.disable_adapter():
            reference = log_probs(trainer.model)
    trainer.train()
    loss = next(line["loss"] for line in trainer.state.log_history if "loss" in line)
    return (policy - pretrained).abs().max().item(), (reference - pretrained).abs().max().item(), loss


found = {
    (init, given): first_step(init, given) for given in (False, True) for init in (True, "pissa", "olora")
}
print("adapters              policy from the pretrained model, at most  reference  first loss (log 2: 0.693)")
for (init, given), (policy, reference, loss) in found.items():
    how = "given" if given else "the trainer's"
    print(f"{init!s:6} {how:14}  {policy:35.5f} nats  {reference:7.3f} nats  {loss:7.3f}")
print(f"peft {peft.__version__}, trl {trl.__version__}, torch {torch.__version__}")
for (init, given), (policy, reference, loss) in found.items():
    moved = init is not True
    expected = (moved and given, moved, not moved or given)
    seen = (policy > 1, reference > 1, abs(loss - math.log(2)) < 1e-3)
    assert seen == expected and (policy > 1 or policy < 1e-3), "the behaviour has changed"
PYTHON
