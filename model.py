"""Everything that knows token ids: GPT-2, sampling, log-probabilities, optimizers, checkpoints, runs.

1. The model: GPT-2 (Radford et al. 2019), and the same network with a scalar head.
2. Log-probabilities of given tokens, and sampling of new ones with a key-value cache.
3. Optimizers: Muon for the matrices, AdamW for the rest.
4. Checkpoints: a directory that is a Hugging Face GPT-2 directory.
5. Around every run: options, devices, several processes, and `Run`: progress, metrics, resuming.

Shapes: B rows of a batch, T tokens of a row, C channels (`n_embd`), V vocabulary, H heads, D = C / H.
"""

import argparse
import hashlib
import io
import json
import math
import os
import signal
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import MAX_ANSWER_TOKENS, BadInput, ask_volunteers, documents, write_files, write_records

# ----------------------------------------------------------------------------------------------------
# 1. The model


@dataclass
class Config:
    """Sizes of a GPT-2, under the names that Hugging Face's `config.json` has for them."""

    vocab_size: int
    n_positions: int = 128  # the context: the longest text it can read, in tokens
    n_embd: int = 128
    n_layer: int = 2
    n_head: int = 4
    activation_function: str = "gelu"  # GPT-2 itself has "gelu_new", an approximation that takes longer here

    def __post_init__(self):
        if min(self.vocab_size, self.n_positions, self.n_embd, self.n_layer, self.n_head) < 1:
            raise BadInput("one of the sizes is below 1")
        if self.n_embd % self.n_head:
            raise BadInput(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.activation_function not in ("gelu", "gelu_new"):
            raise BadInput(f"activation_function is {self.activation_function!r}, not 'gelu' or 'gelu_new'")


class Attention(nn.Module):
    """Each position attends to itself and all earlier positions and averages their values."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, past=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in (q, k, v))  # (B, H, T, D)
        if past is not None:
            k, v = past.append(k, v)  # (B, H, S, D): of all S tokens so far, these T included
        S = k.shape[2]
        # Query t is token S − T + t. All of them attend to everything before: one needs no mask.
        mask = None if T in (1, S) else torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=T == S)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.approximate = "tanh" if config.activation_function == "gelu_new" else "none"

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, past=None):
        x = x + self.attn(self.ln_1(x), past)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Token ids (B, T) to hidden states (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        # GPT-2's initialization: N(0, 0.02), and what is added to the residual stream smaller with depth.
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if "c_proj" in name else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens, cache=None):
        """With a `Cache`, `tokens` go on where the cached ones end, and are added to them."""
        start = cache.length if cache else 0
        x = self.wte(tokens) + self.wpe.weight[start : start + tokens.shape[1]]
        for i, block in enumerate(self.h):
            x = block(x, cache and cache.layers[i])
        return self.ln_f(x)


class LayerCache:
    """One layer's keys and values of all S tokens so far: with them a new token costs one position, not S."""

    kv = None  # (2, B, H, S, D) once there are any

    def append(self, k, v):
        new = torch.stack([k, v])
        self.kv = new if self.kv is None else torch.cat([self.kv, new], dim=3)
        return self.kv


class Cache:
    """The `LayerCache` of every layer, for `Transformer.forward`."""

    def __init__(self, config):
        self.layers = [LayerCache() for _ in range(config.n_layer)]

    @property
    def length(self):
        return 0 if self.layers[0].kv is None else self.layers[0].kv.shape[3]

    def take(self, rows):
        """Keep these rows (N,), in this order; a row may be taken more than once."""
        for layer in self.layers:
            layer.kv = layer.kv[:, rows]


class GPT(nn.Module):
    """The language model: hidden states times the token embeddings give the next token's logits."""

    architecture = "GPT2LMHeadModel"

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)

    @property
    def device(self):
        return self.transformer.wte.weight.device

    def head(self, hidden):
        return hidden @ self.transformer.wte.weight.T

    def forward(self, tokens):
        """Token ids (B, T) to logits (B, T, V); those at t are about the token at t + 1."""
        return self.head(self.transformer(tokens))


class ScalarGPT(GPT):
    """The same network with one number per position instead of logits: reward model and critic.

    `forward`: token ids (B, T) to scores (B, T); the one at t has read the tokens up to t.
    """

    architecture = "GPT2ForSequenceClassification"

    def __init__(self, config):
        super().__init__(config)
        self.score = nn.Linear(config.n_embd, 1, bias=False)
        nn.init.normal_(self.score.weight, std=1 / math.sqrt(config.n_embd + 1))  # Stiennon et al. 2020

    def head(self, hidden):
        return self.score(hidden).squeeze(-1)

    @torch.no_grad()
    def shift(self, amount):
        """Add a constant to all scores. GPT-2's head has no bias, so the last norm's bias takes it in."""
        w = self.score.weight[0]
        self.transformer.ln_f.bias += amount * w / (w @ w)


# ----------------------------------------------------------------------------------------------------
# 2. Log-probabilities and sampling
#
# Prompts and answers share rows of tokens (B, T), and a mask (B, T) is true at the answers' tokens. No answer
# begins before column `start`, so nothing need be computed for the columns that only hold prompts.


def answer_states(model, tokens, start, copies=1):
    """Hidden states (B, T − start + 1, C) of the columns start − 1, …, T − 1.

    `copies`: the first `start` columns say the same B / copies beginnings again and again. So it is with two
    answers to each prompt, `data.pad_pairs`. Read once, they make a step of DPO 1.7 times as quick.
    """
    if copies == 1:
        return model.transformer(tokens)[:, start - 1 :]
    rows, cache = torch.arange(len(tokens) // copies, device=tokens.device), Cache(model.config)
    first = model.transformer(tokens[rows, :start], cache)[:, -1:]
    cache.take(rows.repeat(copies))
    return torch.cat([first.repeat(copies, 1, 1), model.transformer(tokens[:, start:], cache)], dim=1)


def token_log_probs(model, tokens, mask, start=1, copies=1):
    """log π(token t | tokens before t) at t, where `mask` is true, and 0 elsewhere.

    tokens, mask and the result are all (B, T), so the same mask selects a token and its log-probability.
    For `start`, which is at least 1, and `copies` see above.
    """
    logits = model.head(answer_states(model, tokens, start, copies)[:, :-1]).float()  # (B, T − start, V)
    losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, start:].flatten(), reduction="none")
    return F.pad(-losses.view(len(tokens), -1), (start, 0)) * mask


def final_scores(model, tokens, mask, start=1, copies=1):
    """A `ScalarGPT`'s score (B,) at the last token under the mask (B, T): the whole text has been read."""
    scores = model.head(answer_states(model, tokens, start, copies)).float()  # of columns from start − 1 on
    return scores.gather(1, last_index(mask) - (start - 1)).squeeze(1)


def token_values(model, tokens, mask, start=1):
    """A `ScalarGPT`'s guess (B, T) before token t is written, from what stands before it; 0 off the mask."""
    values = model.head(answer_states(model, tokens, start)[:, :-1]).float()
    return F.pad(values, (start, 0)) * mask


def last_index(mask):
    """The last position under the mask (B, T) in each row: (B, 1)."""
    return (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1, keepdim=True)


def filter_logits(logits, top_k, top_p):
    """Keep the `top_k` likeliest tokens (0: all), and of those the fewest with mass `top_p` (1: all)."""
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        ordered, index = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # mass of all likelier tokens
        before[:, 0] = -1  # the likeliest token always stays
        logits = logits.masked_fill((before >= top_p).scatter(1, index, before >= top_p), -math.inf)
    return logits


def draw(log_probs, generator=None):
    """One token a row (B,) from log-probabilities (B, V): where a uniform number falls among the sums.

    It is what `torch.multinomial` does; on two cores all of sampling takes a third less time this way.
    """
    cumulative = log_probs.exp().cumsum(-1)
    u = 1 - torch.rand(len(log_probs), 1, generator=generator, device=log_probs.device)  # never 0
    return torch.searchsorted(cumulative, u * cumulative[:, -1:]).squeeze(1).clamp(max=log_probs.shape[1] - 1)


@torch.no_grad()
def generate(model, prompts, max_new_tokens, eos, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Continue B prompts (lists of ids, none empty) of unequal lengths until EOS or `max_new_tokens`.

    Temperature 0 takes the likeliest token. Returns, (B, T) each: tokens, right-padded; the mask of
    new tokens, EOS included; their log-probabilities under the distribution that they were drawn from.

    All rows walk through the same columns. A row that is still inside its prompt is given the prompt's next
    token instead of a drawn one, so one cache serves all rows.
    """
    device, start, longest = model.device, min(map(len, prompts)), max(map(len, prompts))
    T = min(longest + max_new_tokens, model.config.n_positions)
    if longest >= T:
        raise BadInput(f"a prompt of {longest} tokens leaves no room in a context of {T}")
    tokens = torch.tensor([[*prompt, *[0] * (T - len(prompt))] for prompt in prompts], device=device)
    mask, log_probs = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros(tokens.shape, device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    rows = torch.arange(len(prompts), device=device)  # those that are still computed …
    ended = torch.zeros_like(mask[:, 0])  # … and which of them have ended
    # Rows that begin alike, such as two answers to one prompt, share the reading of that beginning.
    beginnings, of = tokens[:, :start].unique(dim=0, return_inverse=True)
    cache = Cache(model.config)
    hidden = model.transformer(beginnings, cache)[of, -1]
    cache.take(of)
    for t in range(start, T):
        logits = model.head(hidden).float() / max(temperature, 1e-3)
        distribution = filter_logits(logits, top_k, top_p).log_softmax(-1)
        token = draw(distribution, generator) if temperature >= 1e-3 else distribution.argmax(-1)
        new = ~ended & (t >= lengths[rows])
        tokens[rows, t] = torch.where(new, token, tokens[rows, t])
        log_probs[rows, t] = torch.where(new, distribution.gather(1, token[:, None]).squeeze(1), 0.0)
        mask[rows, t] = new
        ended |= (new & (token == eos)) | (t + 1 >= lengths[rows] + max_new_tokens)
        if t % 4 == 3:  # not after each token, since looking at a result makes a GPU wait
            if ended.all():
                break
            if ended.float().mean() > 0.5:  # drop the rows that have ended
                cache.take(~ended)
                rows, ended = rows[~ended], ended[~ended]
        hidden = model.transformer(tokens[rows, t : t + 1], cache)[:, -1]
    end = mask.any(0).nonzero().max() + 1
    return tokens[:, :end], mask[:, :end], log_probs[:, :end]


def sample_texts(model, tokenizer, prompts, max_new_tokens=MAX_ANSWER_TOKENS, batch_size=256, **how):
    """`generate` for any number of prompts, neighbours in length together. Texts in, texts out."""
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    responses = [None] * len(prompts)
    for begin in range(0, len(order), batch_size):
        some = order[begin : begin + batch_size]
        tokens, mask, _ = generate(model, [encoded[i] for i in some], max_new_tokens, tokenizer.eos, **how)
        for i, row, new in zip(some, tokens, mask):
            responses[i] = tokenizer.decode(row[new])
    return responses


# ----------------------------------------------------------------------------------------------------
# 3. Optimizers


def make_optimizers(model, lr):
    """[Muon, AdamW]: PyTorch's own, without weight decay.

    Muon (Jordan 2024, kellerjordan.github.io/posts/muon) is for the matrices inside the blocks. It takes the
    momentum of a matrix's gradient and keeps its directions but evens out their sizes, so rare directions
    are learned as fast as common ones. AdamW has embeddings, norms, biases and head, at half of Muon's rate.
    """
    inside = lambda name, p: ".h." in name and p.dim() == 2
    matrices = [p for name, p in model.named_parameters() if inside(name, p)]
    others = [p for name, p in model.named_parameters() if not inside(name, p)]
    muon = torch.optim.Muon(matrices, lr, weight_decay=0.0)
    adamw = torch.optim.AdamW(others, lr / 2, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return [muon, adamw]


def set_lr(optimizers, step, steps, warmup, final=0.0):
    """Linear warm-up over `warmup` steps, then linear decay to `final` times the full rate."""
    decay = final + (1 - final) * (steps - step) / max(1, steps - warmup)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * min((step + 1) / warmup, decay)


# ----------------------------------------------------------------------------------------------------
# 4. Checkpoints: config.json and model.safetensors, as Hugging Face writes them for GPT-2

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
# GPT-2's files keep these matrices as (in, out); nn.Linear keeps (out, in).
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def safetensors_bytes(tensors):
    """8 bytes header length, a JSON header {name: {dtype, shape, data_offsets}}, then the raw numbers."""
    header, blobs, offset = {"__metadata__": {"format": "pt"}}, [], 0
    for name, tensor in tensors.items():
        blobs.append(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        end = offset + len(blobs[-1])
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # numbers start at a multiple of 8
    return struct.pack("<Q", len(text)) + text + b"".join(blobs)


def read_safetensors(path):
    """The tensors of a file, as float32. BadInput where it is not what its header says.

    The numbers must follow one another without gap or overlap, as the format demands, so a file cannot ask
    for more memory than it has bytes.
    """
    try:
        raw = Path(path).read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        if length > len(raw) - 8:
            raise ValueError(f"a header of {length} bytes in a file of {len(raw)}")
        header, body, tensors, expected = json.loads(raw[8 : 8 + length]), raw[8 + length :], {}, 0
        header.pop("__metadata__", None)
        for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            (start, end), dtype, shape = info["data_offsets"], DTYPES[info["dtype"]], info["shape"]
            if start != expected or end != start + math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name}: bytes {start} to {end} are not {shape} numbers")
            tensors[name] = torch.frombuffer(bytearray(body[start:end]), dtype=dtype).reshape(shape).float()
            expected = end
        if expected != len(body):
            raise ValueError(f"{len(body)} bytes of numbers where the header names {expected}")
    except Exception as error:  # damage may show anywhere
        raise BadInput(f"{path}: not a whole safetensors file ({error})") from None
    return tensors


def save_model(model, tokenizer, directory):
    """Write model and tokenizer so that `load_model`, `Tokenizer.load` and `transformers` can open them."""
    state = model.state_dict()
    tensors = {name: tensor.T if name.endswith(TRANSPOSED) else tensor for name, tensor in state.items()}
    config = vars(model.config) | {"architectures": [model.architecture], "model_type": "gpt2"}
    config |= {"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}
    config |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config |= {f"{name}_token_id": tokenizer.eos for name in ("bos", "eos")} | {"pad_token_id": tokenizer.pad}
    if isinstance(model, ScalarGPT):
        config |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}  # that is, num_labels=1
    files = {"preferences.jsonl": None}  # pairs of the model that was here before
    files |= tokenizer.files() | {"model.safetensors": safetensors_bytes(tensors)}
    files |= {"config.json": json.dumps(config, indent=2).encode()}  # the last: no checkpoint without it
    if RANK == 0:
        write_files(directory, files)


def load_model(directory, kind=GPT, new_head=False):
    """Open a GPT-2 directory as `GPT` or `ScalarGPT`, in float32.

    With `new_head` a language model can be opened as a `ScalarGPT`: its head is then random.
    """
    path = Path(directory, "config.json")
    if not path.exists():
        raise BadInput(
            f"{directory}: no checkpoint there (config.json is missing); run pretrain.py first, or --resume?"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        names = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
        config = Config(*(int(found[name]) for name in names), found.get("activation_function", "gelu_new"))
        expected = {
            "model_type": ["gpt2"],
            "layer_norm_epsilon": [1e-5],
            "n_inner": [None, 4 * config.n_embd],
        }
        expected |= {"scale_attn_weights": [True], "tie_word_embeddings": [True]}
        for name, values in expected.items():
            if found.get(name, values[0]) not in values:
                raise ValueError(f"{name} is {found[name]!r}, not {values[0]!r}")
    except Exception as error:  # not JSON, not an object, a name that is missing, a size that is none, …
        raise BadInput(f"{path}: not a GPT-2 configuration ({error!r})") from None
    tensors = {}
    for name, tensor in read_safetensors(Path(directory, "model.safetensors")).items():
        name = name if name.startswith(("transformer.", "score.", "lm_head.")) else f"transformer.{name}"
        if not name.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight")):  # masks; the tied head
            tensors[name] = tensor.T if name.endswith(TRANSPOSED) else tensor
    weights = sum(tensor.numel() for tensor in tensors.values())
    C, asked = config.n_embd, config.vocab_size + config.n_positions + 12 * config.n_layer * config.n_embd
    if C * asked > weights:  # before any memory is asked for
        raise BadInput(f"{directory}: config.json describes a larger model than model.safetensors holds")
    if kind is GPT and "score.weight" in tensors:
        raise BadInput(f"{directory}: a reward model, not a language model; give what pretrain.py saved")
    if kind is ScalarGPT and "score.weight" not in tensors and not new_head:
        raise BadInput(f"{directory}: a language model, not a reward model; run reward.py first?")
    model = kind(config)
    if new_head:
        tensors["score.weight"] = model.score.weight.data
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        what = " ".join(str(error).split())
        raise BadInput(f"{directory}: the weights do not fit config.json: {what}") from None
    return model


# ----------------------------------------------------------------------------------------------------
# 5. Around every run


def number(kind, low, high=2**31):
    """An argparse type: an int or a float from `low` to `high`."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:  # as is NaN
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low} to {high}")
        return value

    parse.__name__ = kind.__name__
    return parse


def make_parser(name, description):
    """An argument parser whose --help names every default."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    return argparse.ArgumentParser(name, description=description, formatter_class=formatter)


def add_common_options(parser):
    """The options that mean the same in every training script."""
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=1, help="seed of all randomness")
    parser.add_argument("--device", choices=["cpu", "cuda", "mps"], help="the best one here, if left out")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the products")
    parser.add_argument("--compile", action="store_true", help="compile the network: for long runs")
    parser.add_argument("--resume", action="store_true", help="go on where the same command was stopped")


def set_up(args):
    """Seed all randomness, make --out, meet the other processes, set the precision. Returns the device."""
    args.began = time.time()
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = args.device or next(name for name in here if here[name])
    if not here[name]:
        raise BadInput(f"--device {name}: there is none here; leave the option out to take the best one")
    if WORLD_SIZE > 1 and not torch.distributed.is_initialized():
        if name == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if name == "cuda" else "gloo")
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")
    torch.manual_seed(args.seed)
    if hasattr(args, "out"):
        Path(args.out).mkdir(parents=True, exist_ok=True)
    torch.set_autocast_enabled(name, getattr(args, "dtype", None) == "bfloat16")
    torch.set_autocast_dtype(name, torch.bfloat16)
    torch.set_autocast_cache_enabled(False)  # the weights change while autocast is on
    return torch.device(name)


# Several processes, started by torchrun: each holds all networks and computes its share of every batch, and
# the gradients are averaged. The first one alone prints and writes.
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def shard(rows):
    """This process's share of a batch."""
    if len(rows) < WORLD_SIZE:
        raise BadInput(f"a batch of {len(rows)} is too small for {WORLD_SIZE} processes; change --batch-size")
    return rows[RANK::WORLD_SIZE]


def average_gradients(parameters, loss, weight):
    """Average gradients and loss over all processes; `weight` is how many tokens or pairs this loss is of."""
    if WORLD_SIZE == 1:
        return loss
    loss, share = loss.detach().clone(), torch.as_tensor(weight, dtype=torch.float32, device=loss.device)
    total = share.clone()
    torch.distributed.all_reduce(total)
    for tensor in (loss, *[p.grad for p in parameters]):
        torch.distributed.all_reduce(tensor.mul_(share / total))
    return loss


def own_pairs(args, model, tokenizer):
    """The preference file in the directory `args.init`: pairs of that model's own answers, made if missing.

    Volunteers are shown two answers to each of `args.pairs` new posts. The same checkpoint and seed give the
    same pairs, whichever script asks first.
    """
    path = Path(args.init, "preferences.jsonl")
    if RANK == 0 and not path.exists():
        if not os.access(args.init, os.W_OK):
            raise BadInput(f"{path}: cannot be written; copy {args.init}, or give pairs with --data")
        print(f"{path}: asking the volunteers about {args.pairs} pairs of answers …")
        posts = [document.prompt for document in documents(args.pairs, seed=[args.seed, 2], kind="POST")]
        twice = [post for post in posts for _ in range(2)]
        generator = torch.Generator(model.device).manual_seed(args.seed)
        answers = sample_texts(model, tokenizer, twice, generator=generator)
        write_records(path, ask_volunteers(posts, answers, seed=[args.seed, 2]))
    if WORLD_SIZE > 1:
        torch.distributed.barrier()
    return path


SAVE_SECONDS = 10  # between two saves; longer where a save takes more than a twentieth of that


class Run:
    """All that surrounds a training loop: progress, metrics, saving and resuming.

        run = Run(args, "dpo", steps, pairs, models=[policy], optimizers=optimizers)
        for step in run:
            …
            run.log(loss=loss.item())
        run.finish(val_loss=…)

    `OUT/resume.pt` holds all that changes from step to step, and the metrics so far. So a stopped and resumed
    run ends with the same weights, bit for bit on a CPU, as one that was not stopped. It also holds what it
    was made from, the options and a fingerprint of data and first weights, and does not go on with others.
    """

    def __init__(self, args, title, steps, data, models, optimizers):
        self.path, self.title, self.steps, self.began = Path(args.out, "resume.pt"), title, steps, args.began
        self.models, self.parts, self.step, self.metrics = models, [*models, *optimizers], 0, []
        digest = hashlib.sha256(json.dumps(data, default=lambda x: hashlib.sha256(x).hexdigest()).encode())
        for tensor in (tensor for model in models for tensor in model.state_dict().values()):
            digest.update(tensor.cpu().numpy())
        self.made_from = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items()}
        self.made_from |= {"the data or the --init weights": digest.hexdigest()[:8]}
        del self.made_from["--resume"], self.made_from["--began"]
        if args.resume:
            self.load()
        elif self.path.exists():
            raise BadInput(f"{self.path}: a run was stopped here; add --resume, or delete it to start afresh")
        # metrics.jsonl stays the last finished run's until this one is finished, too.
        self.live = self.path.with_name("metrics-unfinished.jsonl")
        if RANK == 0:
            write_records(self.live, self.metrics)

    def save(self):
        state = {"step": self.step, "metrics": self.metrics, "made_from": self.made_from}
        state |= {"seconds": self.seconds(), "parts": [part.state_dict() for part in self.parts]}
        torch.save(state, file := io.BytesIO())
        write_files(self.path.parent, {self.path.name: file.getvalue()})

    def load(self):
        if not self.path.exists():
            raise BadInput(f"{self.path}: not there, so there is nothing to resume; start without --resume")
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            before = saved["made_from"]
            changed = [name for name, value in self.made_from.items() if before[name] != value]
            if changed:
                was = ", ".join(f"{name} (was {before[name]})" for name in changed)
                raise BadInput(f"{self.path}: changed since that run was stopped: {was}")
            for part, state in zip(self.parts, saved["parts"], strict=True):
                part.load_state_dict(state)
            self.step, self.metrics = saved["step"], saved["metrics"]
            self.began -= saved["seconds"]
        except BadInput:
            raise
        except Exception as error:  # torch.load has no list of what it may raise
            raise BadInput(f"{self.path}: cannot be resumed ({error!r}); delete it to start afresh") from None

    def seconds(self):
        """Wall time of the run so far, all parts of it together."""
        return time.time() - self.began

    def __iter__(self):
        """The steps that are left to do."""
        due = time.time() + SAVE_SECONDS
        quiet = None if RANK == 0 else True  # None: no bar where nobody looks at a terminal
        with tqdm(total=self.steps, initial=self.step, desc=self.title, disable=quiet) as self.bar:
            while self.step < self.steps:
                yield self.step
                self.step += 1
                self.bar.update()
                if RANK == 0 and time.time() > due and self.step < self.steps:
                    began = time.time()
                    self.save()
                    due = time.time() + max(SAVE_SECONDS, 20 * (time.time() - began))

    def log(self, **metrics):
        """Show and write the metrics of this step. One that is NaN or infinite stops the run."""
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise BadInput(f"step {self.step + 1}: {name} is {value}; most often --lr is too high")
        if not all(p.isfinite().all() for model in self.models for p in model.parameters()):
            raise BadInput(f"step {self.step + 1}: weights are NaN or infinite; most often --lr is too high")
        self.bar.set_postfix({name: f"{value:.3f}" for name, value in metrics.items()}, refresh=False)
        self.metrics.append({"step": self.step + 1, **metrics})
        if RANK == 0:
            with open(self.live, "a", encoding="utf-8") as file:
                print(json.dumps(self.metrics[-1]), file=file)

    def finish(self, **metrics):
        """The run is done and its model saved: write all metrics; there is nothing to resume any more."""
        if RANK == 0:
            self.metrics.append({"final": True, **metrics, "seconds": self.seconds()})
            write_records(self.path.with_name("metrics.jsonl"), self.metrics)
            self.live.unlink()
            self.path.unlink(missing_ok=True)


def run_script(main, parser):
    """Run `main(options)`. Bad input ends in one sentence and exit status 2; Ctrl-C says how to go on."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends a script without a complaint
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "r+"))
        getattr(sys, name).reconfigure(encoding="utf-8", errors="replace")
    args = parser.parse_args()
    try:
        main(args)
    except BadInput as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except OSError as error:  # a disk that is full, a folder that may not be written
        where = error.filename or "writing"
        parser.exit(2, f"{parser.prog}: {where}: {error.strerror}; what was saved before is untouched\n")
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        parser.exit(2, f"{parser.prog}: not enough memory; lower --batch-size or the sizes of the model\n")
    except KeyboardInterrupt:
        saved = Path(getattr(args, "out", ""), "resume.pt").exists()
        how = "; the same command with --resume goes on from the last save" if saved else ""
        parser.exit(130, f"\n{parser.prog}: stopped{how}\n")
