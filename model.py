"""Everything that works on token ids: GPT-2, log-probabilities, sampling, optimizers, checkpoints, runs.

1. The model: GPT-2 (Radford et al. 2019), and the same network with a scalar head.
2. Log-probabilities of given tokens, and sampling of new ones with a key-value cache.
   A first reading ends here. For when you need it:
3. Optimizers: Muon for the matrices, AdamW for the rest; gradients of several processes.
4. Checkpoints: a directory that is a Hugging Face GPT-2 directory.
5. Around every run: options, devices, and `Run`: progress, metrics, resuming.

Shapes: B rows of a batch, T tokens of a row, C channels (`n_embd`), V vocabulary, H heads, D = C / H.
"""

import argparse
import contextlib
import io
import json
import math
import os
import shlex
import struct
import sys
import time
import timeit
import zlib
from collections import defaultdict
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import MAX_ANSWER_TOKENS, NOT_FETCHED, POINTER, BadInput, locked, no_checkpoint, printable
from data import write_files, write_records

# ----------------------------------------------------------------------------------------------------
# 1. The model


@dataclass
class Config:
    """Sizes of a GPT-2, under Hugging Face's names.

    A field that you add is saved and read, too. Its default must be what GPT-2 does: a checkpoint with any
    other value says that it is no GPT-2 (`model_type`).
    """

    vocab_size: int
    n_positions: int = 128  # the context: the longest text it can read, in tokens
    n_embd: int = 128
    n_layer: int = 2
    n_head: int = 4
    activation_function: str = "gelu"  # GPT-2 itself has "gelu_new", an approximation that takes longer here

    def __post_init__(self):
        if self.n_head < 1 or self.n_embd % self.n_head:
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

    def forward(self, x, cache=None, layer=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in (q, k, v))  # (B, H, T, D)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, H, S, D): of all S tokens so far, these T included
        S = k.shape[2]
        # Query t is token S − T + t and may look at all keys up to there: a mask (T, S), unless T is 1 or S.
        mask = None if T in (1, S) else torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        # softmax(Q Kᵀ / √D) V: weights (B, H, T, S), where the mask is false 0, times values (B, H, S, D).
        causal = True if T == S else False  # `T == S` is a symbol to torch.compile, which would give up
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Each position by itself, (B, T, C) to (B, T, C): where what was attended to is worked on."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.approximate = "tanh" if config.activation_function == "gelu_new" else "none"

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate))


class Block(nn.Module):
    """Attention and MLP each add to the residual stream x (B, T, C), and read it normalized first."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, layer=None):
        x = x + self.attn(self.ln_1(x), cache, layer)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Token ids (B, T) to hidden states (B, T, C)."""

    def __init__(self, config, generator=None):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        # GPT-2's initialization: N(0, 0.02), and what is added to the residual stream smaller with depth.
        for name, p in self.named_parameters():
            if p.dim() == 2:
                std = 0.02 / math.sqrt(2 * config.n_layer) if "c_proj" in name else 0.02
                nn.init.normal_(p, std=std, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens, cache=None):
        """With a `Cache`, `tokens` continue the cached ones, and are added to them."""
        past = cache.length if cache else 0
        if past + tokens.shape[1] > len(self.wpe.weight):
            raise BadInput(f"a text is longer than the context of {len(self.wpe.weight)} tokens")
        x = self.wte(tokens) + self.wpe.weight[past : past + tokens.shape[1]]
        for layer, block in enumerate(self.h):
            x = block(x, cache, layer)
        return self.ln_f(x)


class Cache:
    """Keys and values of all S tokens so far, layer by layer: a new token then costs one position, not S."""

    def __init__(self, config):
        self.layers = [None] * config.n_layer  # each (2, B, H, S, D) once there are any

    @property
    def length(self):
        return 0 if self.layers[0] is None else self.layers[0].shape[3]

    def append(self, layer, k, v):
        """Add keys and values (B, H, T, D) of T new tokens; returns all, (2, B, H, S, D)."""
        old, new = self.layers[layer], torch.stack([k, v])
        self.layers[layer] = new if old is None else torch.cat([old, new], dim=3)
        return self.layers[layer]

    def take(self, rows):
        """Keep these rows (N,), in this order; a row may be taken more than once."""
        self.layers = [kv[:, rows] for kv in self.layers]


class GPT(nn.Module):
    """The language model: hidden states times the token embeddings give the next token's logits."""

    architecture = "GPT2LMHeadModel"
    beta = None  # of an aligned one: β log(π / π_ref) is its implicit reward

    def __init__(self, config, generator=None):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config, generator)

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

    def __init__(self, config, generator=None):
        super().__init__(config, generator)
        self.score = nn.Linear(config.n_embd, 1, bias=False)
        nn.init.normal_(self.score.weight, std=1 / math.sqrt(config.n_embd + 1), generator=generator)

    def head(self, hidden):
        return self.score(hidden).squeeze(-1)

    @torch.no_grad()
    def shift(self, amount):
        """Add a constant to all scores. GPT-2's head has no bias, so the last norm's takes it in.

        A second head, if you add one, reads that bias too.
        """
        w = self.score.weight[0]
        self.transformer.ln_f.bias += amount * w / (w @ w)


# ----------------------------------------------------------------------------------------------------
# 2. Log-probabilities and sampling
#
# Prompts and answers share rows of tokens (B, T), and a mask (B, T) is true at the answers' tokens. No answer
# begins before column `start`, so the head, whose V columns cost most, is only asked from start − 1 on.


def answer_states(model, tokens, start, copies=1):
    """Hidden states (B, T − start + 1, C) of the columns start − 1, …, T − 1.

    With `copies` the rows' first `start` columns are B / copies distinct prefixes, the whole list repeated
    so many times (`data.pad_pairs`: twice). Read once, they make a step of DPO 1.7 times as fast.
    """
    if copies == 1:
        return model.transformer(tokens)[:, start - 1 :]
    cache = Cache(model.config)
    first = model.transformer(tokens[: len(tokens) // copies, :start], cache)[:, -1:]
    cache.take(torch.arange(len(first), device=tokens.device).repeat(copies))
    return torch.cat([first.repeat(copies, 1, 1), model.transformer(tokens[:, start:], cache)], dim=1)


def token_log_probs(model, tokens, mask, start=1, copies=1):
    """log π(token t | tokens before t) at t under the mask, else 0; tokens, mask and result are (B, T)."""
    logits = model.head(answer_states(model, tokens, start, copies)[:, :-1]).float()  # (B, T − start, V)
    losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, start:].flatten(), reduction="none")
    return F.pad(-losses.view(len(tokens), -1), (start, 0)) * mask


def last_index(mask):
    """The last position under the mask (B, T) in each row: (B, 1)."""
    return (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1, keepdim=True)


def final_scores(model, tokens, mask, start=1, copies=1):
    """A `ScalarGPT`'s score (B,) at the last token under the mask (B, T): the whole text has been read."""
    scores = model.head(answer_states(model, tokens, start, copies)).float()  # of columns from start − 1 on
    return scores.gather(1, last_index(mask) - (start - 1)).squeeze(1)


def token_values(model, tokens, mask, start=1):
    """V_t, the critic's (a `ScalarGPT`'s) estimate before token t is written, (B, T); 0 off the mask."""
    values = model.head(answer_states(model, tokens, start)[:, :-1]).float()
    return F.pad(values, (start, 0)) * mask


def filter_logits(logits, top_k, top_p):
    """Keep the `top_k` likeliest tokens (0: all), and of those the fewest with mass `top_p` (1: all)."""
    ordered, index = logits.sort(descending=True)
    if top_k:
        ordered[:, top_k:] = -math.inf
    if top_p < 1:
        p = ordered.softmax(-1)
        before = p.cumsum(-1) - p  # the mass of all likelier tokens
        ordered[:, 1:].masked_fill_(before[:, 1:] >= top_p, -math.inf)  # the likeliest one always stays
    return logits.scatter(1, index, ordered)


def sample_token(logits, temperature, top_k, top_p, generator):
    """Draw the next token (B,) of each row from logits (B, V); its log-probability (B,), as it was drawn."""
    logits = logits.float() / max(temperature, 1e-3)
    if top_k or top_p < 1:
        logits = filter_logits(logits, top_k, top_p)
    log_probs = logits.log_softmax(-1)
    if temperature < 1e-3:
        token = log_probs.argmax(-1)
    else:  # where a uniform number falls among the sums of the probabilities: faster than torch.multinomial
        u = 1 - torch.rand(len(logits), 1, generator=generator, device=logits.device)  # never 0
        sums = log_probs.exp().cumsum(-1)
        token = torch.searchsorted(sums, u * sums[:, -1:]).squeeze(1).clamp(max=logits.shape[1] - 1)
    return token, log_probs.gather(1, token[:, None]).squeeze(1)


@torch.no_grad()
def generate(model, prompts, max_new_tokens, eos, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Continue B prompts (lists of ids, none empty) of unequal lengths until EOS or `max_new_tokens`.

    Temperature 0 takes the likeliest token. Returns, (B, T) each: tokens, right-padded; the mask of
    new tokens, EOS included; their log-probabilities under the distribution that they were drawn from.
    BadInput where a prompt fills the whole context.

    All rows walk through the same columns. A row that is still inside its prompt is given the prompt's next
    token instead of a drawn one, so one cache serves all rows. Two tricks save time: rows that begin alike
    share the reading of that, and rows that ended are dropped.
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    start, longest = min(map(len, prompts)), max(map(len, prompts))
    T = min(longest + max_new_tokens, model.config.n_positions)
    if longest >= T:
        raise BadInput(f"a prompt of {longest} tokens leaves no room in a context of {T}")
    tokens = torch.tensor([[*prompt, *[0] * (T - len(prompt))] for prompt in prompts], device=model.device)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    log_probs = torch.zeros(tokens.shape, device=model.device)
    rows = torch.arange(len(prompts), device=model.device)  # those that are still computed …
    ended = torch.zeros_like(mask[:, 0])  # … and which of them have ended
    cache = Cache(model.config)
    beginnings, which_beginning = tokens[:, :start].unique(dim=0, return_inverse=True)
    hidden = model.transformer(beginnings, cache)[which_beginning]
    cache.take(which_beginning)
    for t in range(start, T):
        if t > start:
            hidden = model.transformer(tokens[rows, t - 1 : t], cache)
        token, log_prob = sample_token(model.head(hidden[:, -1]), temperature, top_k, top_p, generator)
        new = ~ended & (t >= lengths[rows])
        mask[rows, t] = new
        tokens[rows, t] = torch.where(new, token, tokens[rows, t])
        log_probs[rows, t] = log_prob * new
        ended |= (new & (token == eos)) | (t + 1 >= lengths[rows] + max_new_tokens)
        if t % 4 == 3:  # not after each token, since reading a value back synchronizes with the GPU
            if ended.all():
                break
            if ended.float().mean() > 0.5:
                cache.take(~ended)
                rows, ended = rows[~ended], ended[~ended]
    end = mask.any(0).nonzero().max() + 1
    return tokens[:, :end], mask[:, :end], log_probs[:, :end]


def sample_texts(model, tokenizer, prompts, seed, max_new_tokens=MAX_ANSWER_TOKENS, batch_size=256, **how):
    """`generate` for any number of prompts, texts in and texts out; `how` is its temperature and so on.

    Prompts of similar length make a batch. Batches are dealt to the processes, and batch b has the random
    numbers `seeded(*seed, b)`. So any number of processes writes the same texts, and each gets all of them.
    """
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    order, texts = sorted(range(len(prompts)), key=lambda i: len(encoded[i])), {}
    for b in bar(range(RANK, math.ceil(len(order) / batch_size), WORLD_SIZE), "answers"):
        rows = order[b * batch_size : (b + 1) * batch_size]
        asked, generator = [encoded[i] for i in rows], seeded(*seed, b, device=model.device)
        tokens, mask, _ = generate(model, asked, max_new_tokens, tokenizer.eos, generator=generator, **how)
        texts |= {i: tokenizer.decode(row[new]) for i, row, new in zip(rows, tokens, mask)}
    if WORLD_SIZE > 1:
        parts = [None] * WORLD_SIZE
        torch.distributed.all_gather_object(parts, texts)
        texts = {i: text for part in parts for i, text in part.items()}
    return [texts[i] for i in range(len(prompts))]


def seeded(*seed, device="cpu"):
    """A generator for one purpose, seeded by its name and numbers, so that no purpose disturbs another."""
    return torch.Generator(device).manual_seed(zlib.crc32(repr(seed).encode()))


# ----------------------------------------------------------------------------------------------------
# The first reading ends here, and goes on in the script of your choice.

# ----------------------------------------------------------------------------------------------------
# 3. Optimizers, in one process or several


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized: a step in which all directions of a matrix count alike (Jordan 2024).

    kellerjordan.github.io/posts/muon. `torch.optim.Muon` takes the same steps in bfloat16, which most CPUs
    have no instructions for: there such products take many times as long.
    """

    def __init__(self, matrices, lr, momentum=0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_side = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                    average = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                    ahead = p.grad.lerp(average, group["momentum"])  # Nesterov's: the average one step on
                    by_side[min(p.shape)].append((p, ahead))
            for some in by_side.values():
                for (p, _), x in zip(some, orthogonalize([ahead for _, ahead in some])):
                    p.sub_(x, alpha=group["lr"] * math.sqrt(max(1, p.shape[0] / p.shape[1])))


def orthogonalize(matrices):
    """U S Vᵀ → about U Vᵀ, in float32, for matrices whose shorter sides are equal, m.

    Five times x ← (a + b xxᵀ + c (xxᵀ)²) x (Jordan 2024). That acts on the singular values alone: one that is
    0.002 of the Frobenius norm or more ends between 0.68 and 1.21. The bracket is a function of xxᵀ (m × m),
    and such matrices commute. So the five brackets are multiplied up, and x once, by their product.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = [(x if x.shape[0] <= x.shape[1] else x.T) / x.norm().clamp(min=1e-7) for x in matrices]
    with torch.autocast(wide[0].device.type, enabled=False):
        squares, product = torch.stack([x @ x.T for x in wide]), None  # (N, m, m) each
        for _ in range(5):
            G = squares if product is None else product @ squares @ product
            bracket = torch.baddbmm(G, G, G, beta=b, alpha=c)
            bracket.diagonal(dim1=1, dim2=2).add_(a)
            # The first bracket must act first: the other way round, rounding made a step five times too long.
            product = bracket if product is None else bracket @ product
        wide = [p @ x for p, x in zip(product, wide)]
    return [x if x.shape == before.shape else x.T for x, before in zip(wide, matrices)]


def make_optimizers(model, lr):
    """[Muon, AdamW], without weight decay.

    Muon is for the matrices inside the blocks. It keeps the directions of a matrix's gradient but evens out
    their sizes, so rare directions are learned as fast as common ones. AdamW gets embeddings, norms, biases
    and head, at half of Muon's rate. Its β₂ of 0.95 is usual for language models (Brown et al. 2020).
    """
    matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    muon = Muon(matrices, lr)
    adamw = torch.optim.AdamW(others, lr / 2, betas=(0.9, 0.95), weight_decay=0.0, foreach=True)
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


# Several processes, started by torchrun: each holds all networks and computes its share of every batch, and
# the gradients are averaged. The first one alone prints and writes.
RANK, WORLD_SIZE = int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)


def shares(batches):
    """This process's share of each batch. Before the first step it is known that there is one."""
    if min(map(len, batches)) < WORLD_SIZE:
        raise BadInput(f"a batch is too small to feed {WORLD_SIZE} processes; choose a larger --batch-size")
    return [rows[RANK::WORLD_SIZE] for rows in batches]


def process_mean(x, weight=1.0):
    """The mean of a tensor over all processes, weighted by the number of tokens or pairs behind each."""
    if WORLD_SIZE == 1:
        return x
    weight = torch.as_tensor(weight, dtype=torch.float32, device=x.device)
    both = x * weight, weight.clone()
    for tensor in both:
        torch.distributed.all_reduce(tensor)
    return both[0] / both[1]


def update(models, optimizers, weight):
    """One step against the gradients: their mean over all processes, each network's clipped to norm 1.

    `weight` is how many tokens or pairs this process's loss is the mean of. A frozen parameter has none.
    """
    learned = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for model in models:
        for p in model.parameters():
            assert p.grad is None or p in learned, "a parameter has a gradient, and no optimizer moves it"
            p.grad = None if p.grad is None else process_mean(p.grad, weight)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


# ----------------------------------------------------------------------------------------------------
# 4. Checkpoints: config.json and model.safetensors, as Hugging Face writes them for GPT-2


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"U8": torch.uint8, "BOOL": torch.bool}  # of masks
# GPT-2's files keep these matrices as (in, out); nn.Linear keeps (out, in).
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
PARTS = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")  # of a block
SIZES = {"vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "activation_function"}
# Keys of config.json that change what the network computes, and what they must say.
FIXED = {"layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
FIXED |= {"add_cross_attention": False, "tie_word_embeddings": True}


def model_type(model):
    """The text "gpt2", or "changed-gpt2" if it has more weights, or a new field is not at its default."""
    c, scalar = model.config, isinstance(model, ScalarGPT)
    n = (c.vocab_size + c.n_positions + 2 + c.n_layer * (12 * c.n_embd + 13) + scalar) * c.n_embd
    parts = [f"h.{i}.{part}" for i in range(c.n_layer) for part in PARTS] + ["ln_f"]
    names = {f"transformer.{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    names |= {"transformer.wte.weight", "transformer.wpe.weight"} | ({"score.weight"} if scalar else set())
    same = model.state_dict().keys() == names and sum(p.numel() for p in model.parameters()) == n
    as_new = all(getattr(c, field.name) == field.default for field in fields(c) if field.name not in SIZES)
    return "gpt2" if same and as_new else "changed-gpt2"


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
        if raw.startswith(POINTER):
            raise BadInput(NOT_FETCHED.format(path))
        (length,) = struct.unpack("<Q", raw[:8])
        header, body, tensors = json.loads(raw[8 : 8 + length]), raw[8 + length :], {}
        header.pop("__metadata__", None)
        spans = sorted(info["data_offsets"] for info in header.values())
        chained = [0, *(end for _, end in spans)] == [*(begin for begin, _ in spans), len(body)]
        if length > len(raw) - 8 or not chained:
            raise ValueError("its header does not name all numbers once")
        for name, info in header.items():
            if info["dtype"] not in DTYPES:
                raise ValueError(f"{info['dtype']} is not read, but {', '.join(DTYPES)}")
            some = bytearray(body[slice(*info["data_offsets"])])
            tensor = torch.frombuffer(some, dtype=DTYPES[info["dtype"]]) if some else torch.empty(0)
            tensors[name] = tensor.reshape(info["shape"]).float()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    except BadInput:
        raise
    except Exception as error:  # damage may show anywhere
        raise BadInput(f"{path}: not a whole safetensors file ({error})") from None
    return tensors


def read_tensors(directory):
    """All tensors of a directory, be they in one file or in several (`model.safetensors.index.json`)."""
    path, index = Path(directory, "model.safetensors"), Path(directory, "model.safetensors.index.json")
    if path.exists():
        return read_safetensors(path)
    if not index.exists():
        pickled = any(Path(directory).glob("pytorch_model*.bin"))
        why = (
            "pytorch_model.bin is not read, since unpickling it may run anything"
            if pickled
            else "no weights there"
        )
        raise BadInput(f"{path}: missing ({why}); save the model as safetensors")
    try:
        names = {*json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"].values()}
        return {k: v for name in sorted(names) for k, v in read_safetensors(path.with_name(name)).items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{index}: not an index of safetensors files ({error!r})") from None


def save_model(model, tokenizer, directory, beta=None):
    """Write model and tokenizer so that `load_model`, `Tokenizer.load` and `transformers` can open them.

    `beta`: if β log(π / π_ref) is an implicit reward, where π_ref is the model that --init names, its β.
    """
    state = model.state_dict()
    tensors = {name: tensor.T if name.endswith(TRANSPOSED) else tensor for name, tensor in state.items()}
    length = model.config.n_positions  # "n_ctx" is its older name, which some programs ask for
    config = FIXED | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config |= asdict(model.config) | {"n_ctx": length, "beta": beta}
    config |= {"bos_token_id": tokenizer.eos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
    config |= {"architectures": [model.architecture], "model_type": model_type(model)}
    side = "left"  # so that a batch of prompts ends together, where others write on
    if isinstance(model, ScalarGPT):  # a score, not its sigmoid, read where the text ends
        side, config = "right", config | {"id2label": {"0": "score"}, "problem_type": "regression"}
    files = {
        "preferences.jsonl": None,  # put aside: pairs of the model that was here before
        **tokenizer.files(model_max_length=length, padding_side=side),
        "model.safetensors": safetensors_bytes(tensors),
        "config.json": json.dumps(config, indent=2).encode(),  # the last: no checkpoint without it
    }
    if RANK == 0:
        write_files(directory, files)


def load_model(directory, network=GPT, new_head=None):
    """Open a GPT-2 directory as `GPT` or `ScalarGPT`, or as what it is (None), in float32, `.eval()`.

    With `new_head`, a generator, a `ScalarGPT` gets a random head, whether or not it had one. BadInput where
    the directory is not of a GPT-2 that is computed here as its `config.json` says.
    """
    path = Path(directory, "config.json")
    if not path.exists():
        raise no_checkpoint(directory, "config.json")
    try:
        found = {"activation_function": "gelu_new", "beta": None}
        found |= json.loads(path.read_text(encoding="utf-8-sig"))
        asked = [field for field in fields(Config) if field.name in SIZES or field.name in found]
        for name, kind in [*((field.name, field.type) for field in asked), ("beta", (float, type(None)))]:
            if not isinstance(found[name], kind) and not (kind is not str and type(found[name]) is int):
                raise ValueError(f"{name} is {found[name]!r}")
        config = Config(**{field.name: found[field.name] for field in asked})
        for name, value in (FIXED | {"n_inner": 4 * config.n_embd}).items():
            if found.get(name) not in (None, value):
                raise ValueError(f"{name} is {found[name]!r}, not {value!r}")
    except Exception as error:  # not JSON, not an object, a size that is missing, …
        raise BadInput(f"{path}: not a GPT-2 configuration ({error!r})") from None
    tensors = {}
    for name, tensor in read_tensors(directory).items():
        name = f"transformer.{name}" if name.startswith(("wte.", "wpe.", "h.", "ln_f.")) else name
        if not name.endswith((".attn.bias", ".attn.masked_bias")):  # masks
            tensors[name] = tensor.T.contiguous() if name.endswith(TRANSPOSED) else tensor
            if not tensor.isfinite().all():
                raise BadInput(f"{directory}: {name} has NaN or infinite numbers; save the model anew")
    head = tensors.pop("lm_head.weight", None)  # tied to the embedding, and either may stand for both
    if head is not None:
        tensors.setdefault("transformer.wte.weight", head)
    has_head = "score.weight" in tensors
    network = network or (ScalarGPT if has_head else GPT)
    if network is GPT and has_head:
        raise BadInput(f"{directory}: a reward model, not a language model; give what pretrain.py saved")
    if network is ScalarGPT and not new_head and found.get("pad_token_id", -1) == found.get("eos_token_id"):
        raise BadInput(f"{path}: pad_token_id is EOS, so its score is read before EOS, and not at it as here")
    if network is ScalarGPT and not has_head and not new_head:
        raise BadInput(f"{directory}: a language model, not a reward model; run reward.py first?")
    if new_head:
        small = replace(config, vocab_size=1, n_positions=1, n_layer=0)
        fresh = network(small, new_head).state_dict()
        tensors |= {name: tensor for name, tensor in fresh.items() if not name.startswith("transformer.")}
    try:
        sizes = [*tensors["transformer.wte.weight"].shape, *tensors["transformer.wpe.weight"].shape]
        if sizes != [config.vocab_size, config.n_embd, config.n_positions, config.n_embd]:
            raise ValueError(f"size mismatch, embeddings of {sizes}")
        if f"transformer.h.{config.n_layer - 1}.ln_1.weight" not in tensors:
            raise ValueError(f"there are no {config.n_layer} layers")
        model = network(config)  # of a size that the file has, so a wrong number asks for no memory
        model.load_state_dict(tensors, assign=True)
    except Exception as error:
        what = " ".join(str(error).split()) + " is missing" * isinstance(error, KeyError)
        raise BadInput(f"{directory}: the weights do not fit config.json: {what}") from None
    if found.get("model_type", "gpt2") not in ("gpt2", model_type(model)):
        raise BadInput(f"{path}: the network is {found['model_type']!r}, here it is {model_type(model)!r}")
    model.beta = found["beta"]
    return model.eval()  # without dropout, if somebody adds one, until a script says .train()


# ----------------------------------------------------------------------------------------------------
# 5. Around every run


def number(kind, low, high=2**31):
    """An argparse type: an int or a float from `low` to `high`."""

    def parse(text):
        if not low <= kind(text) <= high:  # false for NaN, too
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low} to {high}")
        return kind(text)

    parse.__name__ = kind.__name__
    return parse


def make_parser(name, description):
    how = argparse.ArgumentDefaultsHelpFormatter
    return argparse.ArgumentParser(name, description=description, formatter_class=how)


def add_common_options(parser):
    """The options that mean the same in every training script."""
    option = parser.add_argument_group("in every training script").add_argument
    option("--seed", type=number(int, 0, 2**63 - 1), default=1, help="of all randomness")
    option("--device", choices=["cpu", "cuda", "mps"], help="if left out, the best one here")
    option("--dtype", choices=["float32", "bfloat16"], default="float32", help="of products")
    option("--compile", action="store_true", help="compile the network: for long runs")
    option("--resume", action="store_true", help="continue a run of the same command that was stopped")


def refuse(parser, args, names, because):
    """Refuse options that have no effect: those of `names` that are not at their default."""
    for name in names:
        if getattr(args, name) != parser.get_default(name):
            raise BadInput(f"--{name.replace('_', '-')} has no effect {because}; leave it out")


def slowdown(device):
    """How many times as long as in float32 a linear layer's three products take in bfloat16."""
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(128, 128, dtype=dtype, device=device)
        products = lambda: (x @ x.T + x @ x + x.T @ x).sum().item()  # forward, gradients of input and weights
        seconds.append(min(timeit.repeat(products, number=1, repeat=3)))
    return seconds[1] / seconds[0]


@contextlib.contextmanager
def set_up(args):
    """`with set_up(args) as device:` joins the other processes and turns on autocast.

    The global generator is seeded, for whoever uses it. A training script has the directory --out to itself.
    BadInput where that is a place that it reads a model from, where another run writes, or one was stopped.
    """
    args.began = time.time()
    if (RANK, WORLD_SIZE) != (0, 1) and "MASTER_ADDR" not in os.environ:
        raise BadInput(
            "RANK or WORLD_SIZE is set, and not by torchrun, which sets MASTER_ADDR, too; unset it"
        )
    torch.manual_seed(args.seed)
    for place in (vars(args).get(name) for name in ("init", "reward")):
        if place and Path(place).is_dir() and Path(args.out).is_dir() and os.path.samefile(place, args.out):
            raise BadInput(f"--out {args.out} would overwrite the model that is read; give another directory")
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    here["mps"] &= hasattr(torch.amp, "is_autocast_available")  # it can autocast from PyTorch 2.5 on
    name = args.device or next(name for name in here if here[name])
    if not here[name]:
        raise BadInput(f"--device {name}: there is none here; leave the option out to take the best one")
    if WORLD_SIZE > 1 and not torch.distributed.is_initialized():
        if name == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if name == "cuda" else "gloo")
    low = getattr(args, "dtype", None) == "bfloat16"
    quiet = contextlib.redirect_stdout(open(os.devnull, "w")) if RANK else contextlib.nullcontext()
    trains = "resume" in args
    if trains:
        os.makedirs(args.out, exist_ok=True)
    lock = locked(args.out) if trains and RANK == 0 else contextlib.nullcontext()
    # Nothing is cached, since the weights change while autocast is on.
    with lock, quiet, torch.autocast(name, torch.bfloat16, enabled=low, cache_enabled=False):
        if trains and Path(args.out, "resume.pt").exists() != args.resume:
            stopped = "a run was stopped here; add --resume, or delete it to start afresh"
            missing = "not there, so there is nothing to resume; start without --resume"
            raise BadInput(f"{Path(args.out, 'resume.pt')}: {missing if args.resume else stopped}")
        if low and (times := slowdown(name)) > 1.5:
            print(f"bfloat16 takes {times:.0f} times as long as float32 here; leave --dtype out")
        yield torch.device(name)


def bar(items, title):
    """A progress bar, shown after a second, and only on a terminal."""
    return tqdm(items, title, leave=False, delay=1, disable=True if RANK else None)


SAVE_SECONDS = 10  # between two saves
# Options that do not change the result, where what they name stays the same.
NO_EFFECT_ON_RESULT = ("init", "data", "reward", "out", "device", "resume", "began")
GOOD = {  # which value of the figures at the end of a run is good
    "val_loss": "of what is held out; lower is better",
    "ratio": "times the entropy; 1 is the best possible",
    "bits_per_byte": "gzip needs about 3, guessing 8",
    "val_accuracy": "a coin is right in 0.5",
    "best_accuracy": "the most that any model could reach",
    "reward": "mean of held-out prompts; higher is better",
    "explained_variance": "of the critic; 1 is perfect, 0 knows only the mean",
}


class Run:
    """All that surrounds a training loop: progress, metrics, saving and resuming.

        run = Run(args, "dpo", steps, pairs, models=[policy], optimizers=optimizers)
        for step in run:
            …
            run.log(loss=loss.item())
        run.finish(["sample.py", "--compare"], fault=False, val_loss=…)

    `OUT/resume.pt` holds all that changes from step to step: models, optimizers, metrics, and the dictionary
    `run.state`, for what a script changes besides. So a stopped and resumed run ends with the same weights,
    bit for bit on a CPU, as one that was not stopped: even the global generator is seeded anew at each step,
    in each process by its number. It goes on only with the same options, data (anything that json can write)
    and first weights; paths and device may differ.
    """

    def __init__(self, args, title, steps, data, models, optimizers):
        self.path, self.title, self.steps, self.began = Path(args.out, "resume.pt"), title, steps, args.began
        self.seed = args.seed
        self.models, self.parts = models, [*models, *optimizers]
        self.step, self.metrics, self.state = 0, [], {}
        digest = zlib.crc32(json.dumps(data, default=zlib.crc32).encode())
        for tensor in (tensor for model in models for tensor in model.state_dict().values()):
            digest = zlib.crc32(tensor.cpu().numpy(), digest)
        options = {name: value for name, value in vars(args).items() if name not in NO_EFFECT_ON_RESULT}
        self.made_from = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
        self.made_from["the data or the first weights"] = digest
        if args.resume:
            self.load()
        parameters = [*models[0].parameters()]
        n, device = sum(p.numel() for p in parameters), parameters[0].device
        where = f"goes on after step {self.step}" if args.resume else args.init or "from scratch"
        print(f"{title}: {where} → {args.out}; {n:,} parameters, {steps} steps, on {device}")

    def save(self):
        names = ("step", "metrics", "state", "made_from")
        saved = {name: getattr(self, name) for name in names} | {"seconds": time.time() - self.began}
        file = io.BytesIO()
        torch.save(saved | {"parts": [part.state_dict() for part in self.parts]}, file)
        write_files(self.path.parent, {self.path.name: file.getvalue()})

    def load(self):
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            before, now = saved["made_from"], self.made_from
            changed = [f"{name} (was {before.get(name)})" for name in now if before.get(name) != now[name]]
            if not changed:
                for part, state in zip(self.parts, saved["parts"], strict=True):
                    part.load_state_dict(state)
                self.step, self.metrics, self.state = saved["step"], saved["metrics"], saved["state"]
                self.began -= saved["seconds"]
        except Exception as error:  # torch.load has no list of what it may raise
            raise BadInput(f"{self.path}: cannot be resumed ({error!r}); delete it to start afresh") from None
        if changed:
            raise BadInput(f"{self.path}: changed since that run was stopped: {', '.join(changed)}")

    def __iter__(self):
        """The steps that are left to do."""
        due = time.time() + SAVE_SECONDS
        quiet = None if RANK == 0 else True  # None: no bar where nobody looks at a terminal
        how = {"disable": quiet, "dynamic_ncols": True}  # a window may be made narrower
        with tqdm(total=self.steps, initial=self.step, desc=self.title, **how) as self.bar:
            while self.step < self.steps:
                torch.manual_seed(zlib.crc32(repr((self.seed, self.step, RANK)).encode()))
                yield self.step
                self.step += 1
                self.bar.update()
                if RANK == 0 and time.time() > due and self.step < self.steps:
                    self.save()
                    due = time.time() + SAVE_SECONDS

    def log(self, weight=1.0, **metrics):
        """Show and keep the metrics of this step. One that is NaN or infinite stops the run.

        Of several processes, which all call this, it is the mean, weighted as in `process_mean`.
        """
        if WORLD_SIZE > 1:
            both = torch.tensor([*metrics.values()], device=self.models[0].device)
            metrics = dict(zip(metrics, process_mean(both, weight).tolist()))
        broken = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
        if not all(p.isfinite().all() for model in self.models for p in model.parameters()):
            broken.append("weights are NaN or infinite")
        if broken:
            why = "what gives the reward is at fault, or" if broken[0].startswith("reward ") else "usually"
            raise BadInput(f"step {self.step + 1}: {broken[0]}; {why} --lr is too high")
        self.bar.set_postfix({name: f"{value:.3f}" for name, value in metrics.items()}, refresh=False)
        self.metrics.append({"step": self.step + 1, **metrics})

    def show(self, step, model, tokenizer, prompt, temperature=0):
        """Print, and keep, what the model answers to one prompt (a list of ids) as training goes on."""
        how = {"temperature": temperature, "generator": seeded("shown", step, device=model.device)}
        tokens, mask, _ = generate(model, [prompt], MAX_ANSWER_TOKENS, tokenizer.eos, **how)
        asked, answer = f"{tokenizer.decode(prompt)}\n" * (step == 0), tokenizer.decode(tokens[mask]).strip()
        self.bar.write(printable(f"{asked}  step {step:4}: {answer}"))
        self.metrics.append({"step": step, "answer": answer})

    def finish(self, then, fault, **metrics):
        """The run is done and its model saved: show and write its metrics, and which command comes `then`.

        Or what is wrong with the model, if `fault` is a text: then there is nothing to go on with.
        """
        metrics["seconds"] = time.time() - self.began
        for name, value in metrics.items():
            if value is not None:
                print(f"{name:>20} {value:9.4f}   {GOOD.get(name, '')}")
        then = f"But it is {fault}: try a lower --lr, or more --steps" if fault else f"Next: {command(*then)}"
        print(f"saved to {self.path.parent}. {then}")
        if RANK == 0:
            write_records(self.path.with_name("metrics.jsonl"), [*self.metrics, {"final": True, **metrics}])
            self.path.unlink(missing_ok=True)


def command(*words):
    """A command that can be pasted, whatever folders are called."""
    return shlex.join(["python", *map(str, words)])


def run_script(main, parser):
    """Run `main(options)`. Bad input gives one sentence and exit status 2; Ctrl-C says how to go on."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # By lines: a log file is written as the run goes on, and a kill loses none of it.
            stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
    args = parser.parse_args()
    try:
        for name, value in vars(args).items():
            if name != "prompt" and "" in (value if isinstance(value, list) else [value]):
                raise BadInput(
                    f"--{name} is empty, as of a variable that is not set; leave it out, or fill it"
                )
        main(args)
    except BadInput as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except (KeyboardInterrupt, BrokenPipeError) as error:
        if isinstance(error, BrokenPipeError):  # whoever read the output, as in `| head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if "resume" not in args:
                return
        saved = Path(getattr(args, "out", None) or "", "resume.pt").exists()
        how = "; the same command with --resume goes on from the last save" if saved else ""
        parser.exit(130, f"\n{parser.prog}: stopped{how}\n")
    except OSError as error:  # a disk that is full, a folder that may not be written
        where = error.filename or "writing"
        parser.exit(2, f"{parser.prog}: {where}: {error.strerror}; what was saved before is untouched\n")
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        parser.exit(2, f"{parser.prog}: not enough memory; lower --batch-size or the sizes of the model\n")


if __name__ == "__main__":
    argparse.ArgumentParser("model.py", description="What the scripts share; run those.").parse_args()
