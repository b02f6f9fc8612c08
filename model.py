"""Everything that knows token ids: GPT-2, sampling, log-probabilities, the optimizer, checkpoints.

1. The model: GPT-2 (Radford et al. 2019), and the same network with a scalar head.
2. Log-probabilities of given tokens, and sampling of new ones with a key-value cache.
3. The optimizer: Muon for the matrices, AdamW for the rest.
4. Checkpoints: a directory that is a Hugging Face GPT-2 directory.
5. Around every run: device, a progress bar with its log, one sentence for bad input.

Shapes: B rows of a batch, T tokens of a row, C channels (`n_embd`), V vocabulary, H heads, D = C / H.
"""

import argparse
import ctypes
import io
import json
import math
import os
import platform
import signal
import struct
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------
# 1. The model


@dataclass
class Config:
    """Sizes of a GPT-2, under the names that Hugging Face's `config.json` has for them."""

    vocab_size: int
    n_positions: int = 128  # the longest text it can read, in tokens; also called block size or context
    n_embd: int = 128
    n_layer: int = 2
    n_head: int = 4
    activation_function: str = "gelu"  # GPT-2 itself has "gelu_new", an approximation that takes thrice as long

    def __post_init__(self):
        sizes = [self.vocab_size, self.n_positions, self.n_embd, self.n_layer, self.n_head]
        if min(sizes) < 1 or self.n_embd % self.n_head:
            raise BadInput(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}, or a size is below 1")
        if self.activation_function not in ("gelu", "gelu_new"):
            raise BadInput(f"activation_function is {self.activation_function!r}, not 'gelu' or 'gelu_new'")


class Attention(nn.Module):
    """Each position asks (query) all positions before it (key) and takes what they have (value)."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache, layer, visible):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in (q, k, v))  # (B, H, T, D)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, H, everything so far, D)
        # With a cache, a single new token may look at all of it; otherwise mask the future.
        y = F.scaled_dot_product_attention(q, k, v, visible, is_causal=visible is None and T > 1)
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

    def forward(self, x, cache, layer, visible, wanted):
        x = x + self.attn(self.ln_1(x), cache, layer, visible)
        if wanted is not None:
            x = x.flatten(0, 1).index_select(0, wanted)
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
        # GPT-2's start: N(0, 0.02), and what is added to the residual stream smaller with depth.
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if "c_proj" in name else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens, cache=None, layout=None, wanted=None):
        """`layout` is for rows that are not one text from left to right, see `data.pack_pairs`: positions
        (B, T), and which tokens each token may look at (B, 1, T, T).
        `wanted`: the result is asked for at these of the B·T places only, and is (N, C). The last block lets go
        of all others, above all the prompt's, once they have been looked at: in two blocks, a fifth of a step.
        """
        start = cache.length if cache else 0
        positions, visible = layout or (torch.arange(start, start + tokens.shape[1], device=tokens.device), None)
        x = self.wte(tokens) + self.wpe(positions)
        for layer, block in enumerate(self.h):
            x = block(x, cache, layer, visible, wanted if layer == len(self.h) - 1 else None)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.ln_f(x)


class Cache:
    """Keys and values of all tokens so far, so that a new token costs one position, not the whole text."""

    def __init__(self, config, B, T, device):
        shape = (config.n_layer, 2, B, config.n_head, T, config.n_embd // config.n_head)
        self.kv = torch.empty(shape, device=device)
        self.length = 0

    def append(self, layer, k, v):
        end = self.length + k.shape[2]
        self.kv[layer, 0, :, :, self.length : end] = k
        self.kv[layer, 1, :, :, self.length : end] = v
        return self.kv[layer, :, :, :, :end]


class GPT(nn.Module):
    """The language model: hidden states times the token embeddings give the next token's logits."""

    architecture = "GPT2LMHeadModel"

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)

    def logits(self, hidden):
        return hidden @ self.transformer.wte.weight.T

    def forward(self, tokens):
        """Token ids (B, T) to logits (B, T, V); those at t are about the token at t + 1."""
        return self.logits(self.transformer(tokens))


class ScalarGPT(nn.Module):
    """The same network with one number per position instead of logits: reward model and critic."""

    architecture = "GPT2ForSequenceClassification"

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.score = nn.Linear(config.n_embd, 1, bias=False)
        nn.init.normal_(self.score.weight, std=1 / math.sqrt(config.n_embd + 1))  # Stiennon et al. 2020

    def forward(self, tokens):
        """Token ids (B, T) to scores (B, T); the one at t has read the tokens up to t."""
        return self.score(self.transformer(tokens)).squeeze(-1)

    @torch.no_grad()
    def shift(self, amount):
        """Add a constant to all scores. GPT-2's head has no bias, so the last norm's bias takes it in."""
        w = self.score.weight[0]
        self.transformer.ln_f.bias += amount * w / (w @ w)


# ----------------------------------------------------------------------------------------------------
# 2. Log-probabilities and sampling


def places(mask):
    """Where a mask (B, T) is true, counted through all B·T tokens: (N,)."""
    return mask.flatten().nonzero().squeeze(1)


def token_log_probs(model, tokens, mask, layout=None):
    """log π(token t | tokens before t) at t, where `mask` is true, and 0 elsewhere.

    tokens, mask and the result are all (B, T), so the same mask selects a token and its log-probability.
    Position 0 has nothing before it and must not be masked in. Logits are made only where they are asked.
    """
    at = places(mask)  # (N,)
    hidden = model.transformer(tokens, layout=layout, wanted=at - 1)  # (N, C), from one token before
    log_probs = F.log_softmax(model.logits(hidden).float(), dim=-1)  # (N, V)
    chosen = log_probs.gather(1, tokens.flatten()[at, None]).squeeze(1)  # (N,)
    return torch.zeros(tokens.shape, device=tokens.device).masked_scatter(mask, chosen)


def last_token(mask):
    """The last position under the mask in each row, as a mask (…, T)."""
    return mask & (mask.cumsum(-1) == mask.sum(-1, keepdim=True))


def final_scores(model, tokens, mask):
    """A `ScalarGPT`'s score (B,) at the last token under the mask (B, T): the whole text has been read."""
    return model.score(model.transformer(tokens, wanted=places(last_token(mask)))).squeeze(1)


def token_values(model, tokens, mask):
    """A `ScalarGPT`'s guess (B, T) before token t is written, so from what stands before it; 0 off the mask."""
    values = model.score(model.transformer(tokens, wanted=places(mask) - 1)).squeeze(1)  # (N,)
    return torch.zeros(tokens.shape, device=tokens.device).masked_scatter(mask, values.float())


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


@torch.no_grad()
def generate(model, prompts, max_new_tokens, eos, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Continue a batch of prompts of unequal lengths until EOS or `max_new_tokens`.

    prompts: list of B lists of ids, none empty. temperature 0 is greedy; `generator` seeds the choice.
    Returns, each (B, T): tokens, right-padded; mask of new tokens, EOS included; and their
    log-probabilities under the distribution that they were drawn from (greedy: under temperature 1).

    All rows walk through the same positions. A row that is still inside its prompt is given the prompt's
    next token instead of a sampled one, so one cache serves all rows and no row needs an attention mask.
    """
    device = model.transformer.wte.weight.device
    longest = max(map(len, prompts))
    if longest >= model.config.n_positions:
        raise BadInput(f"a prompt of {longest} tokens leaves no room in a context of {model.config.n_positions}")
    B, T = len(prompts), min(longest + max_new_tokens, model.config.n_positions)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    tokens = torch.tensor([[*p, *[0] * (T - len(p))] for p in prompts], device=device)
    mask = torch.zeros(B, T, dtype=torch.bool, device=device)
    log_probs = torch.zeros(B, T, device=device)
    rows = torch.arange(B, device=device)  # those that are still computed
    shared = world_size() > 1 and B >= world_size()
    if shared:  # every process writes its share, and in the end all get all
        rows = mine(rows)
    alive = torch.zeros(B, dtype=torch.bool, device=device).index_fill(0, rows, True)
    start = min(map(len, prompts))
    forward = model.transformer.forward  # as it is, not compiled: every step has another shape
    # Rows that begin alike, such as two answers to one prompt, share the reading of that beginning.
    seen = {}
    of = [seen.setdefault(tuple(prompts[i][:start]), len(seen)) for i in rows.tolist()]
    cache = Cache(model.config, len(seen), T, device)
    wanted = torch.arange(1, len(seen) + 1, device=device) * start - 1
    hidden = forward(torch.tensor(list(seen), device=device), cache, wanted=wanted)[of]  # (B, C)
    cache.kv = cache.kv[:, :, of]
    for t in range(start, T):
        logits = model.logits(hidden).float()
        if temperature > 0:
            logits = filter_logits(logits / temperature, top_k, top_p)
        dist = F.log_softmax(logits, dim=-1)
        if temperature > 0:  # a uniform number picks from the cumulated probabilities: cheaper than multinomial
            cumulated = dist.exp().cumsum(-1)
            u = 1 - torch.rand(B, 1, generator=generator, device=device)[rows]  # never 0
            drawn = torch.searchsorted(cumulated, u * cumulated[:, -1:])  # the first token whose sum reaches it
        else:
            drawn = dist.argmax(-1, keepdim=True)
        writing = alive[rows] & (t >= lengths[rows]) & (t < lengths[rows] + max_new_tokens)
        tokens[rows, t] = torch.where(writing, drawn.squeeze(1), tokens[rows, t])
        log_probs[rows, t] = torch.where(writing, dist.gather(1, drawn).squeeze(1), 0.0)
        mask[rows, t] = writing
        alive &= ~(mask[:, t] & (tokens[:, t] == eos)) & (t + 1 < lengths + max_new_tokens)
        left = alive.sum().item()
        if t + 1 == T or not left:
            break
        if left < 0.5 * len(rows):  # let go of rows that have ended; copying the cache costs less than they do
            cache.kv = cache.kv[:, :, alive[rows]]
            rows = rows[alive[rows]]
        hidden = forward(tokens[rows, t : t + 1], cache)[:, -1]
    if shared:
        new = tokens * mask
        for tensor in (new, log_probs, mask := mask.byte()):
            torch.distributed.all_reduce(tensor)
        mask = mask.bool()
        tokens, last = torch.where(mask, new, tokens), int(mask.any(0).nonzero().max())
        for _ in range(last - t if temperature > 0 else 0):  # as many random numbers as everyone else
            torch.rand(B, 1, generator=generator, device=device)
        t = last
    return tokens[:, : t + 1], mask[:, : t + 1], log_probs[:, : t + 1]


def sample_texts(model, tokenizer, prompts, max_new_tokens, batch_size=256, **how):
    """`generate` for any number of prompts, neighbours in length together. Texts in, texts out."""
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    responses = [None] * len(prompts)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        tokens, mask, _ = generate(model, [encoded[i] for i in rows], max_new_tokens, tokenizer.eos, **how)
        for i, row, new in zip(rows, tokens, mask):
            responses[i] = tokenizer.decode(row[new])
    return responses


# ----------------------------------------------------------------------------------------------------
# 3. The optimizer


def orthogonalize(G):
    """Push all singular values of each matrix in G (..., m, n) towards 1: five Newton–Schulz steps.

    The quintic's coefficients are steep at 0, so that small singular values grow fast, at the price that
    all end between about 0.7 and 1.2 instead of at 1 (Jordan 2024, kellerjordan.github.io/posts/muon).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = G.shape[-2] > G.shape[-1]
    X = G.mT if tall else G
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # now no singular value is over 1
    # Each step is X <- P X with P = a + b A + c A² and A = X Xᵀ, the smaller square. So the steps can be taken
    # on A alone, and X is multiplied once, by all P together. That is 1.6 times as fast.
    A, I = X @ X.mT, torch.eye(X.shape[-2], device=X.device)
    product = P = a * I + b * A + c * A @ A
    for _ in range(4):
        A = P @ A @ P
        P = a * I + b * A + c * A @ A
        product = P @ product
    X = product @ X
    return X.mT if tall else X


class Muon(torch.optim.Optimizer):
    """Muon for the matrices inside the blocks, AdamW for everything else: embeddings, norms, biases, head.

    Muon takes the momentum of a matrix's gradient and keeps its directions but evens out their sizes, so
    that rare directions are learned as fast as common ones. AdamW is Loshchilov and Hutter 2019, without
    weight decay; its rate is half of Muon's, which served every stage of this project.
    """

    def __init__(self, model, lr, momentum=0.95, betas=(0.9, 0.95), eps=1e-8):
        matrices = [p for name, p in model.named_parameters() if ".h." in name and p.dim() == 2]
        others = [p for name, p in model.named_parameters() if not (".h." in name and p.dim() == 2)]
        groups = [
            {"params": matrices, "lr": lr, "initial_lr": lr, "muon": True},
            {"params": others, "lr": lr / 2, "initial_lr": lr / 2, "muon": False},
        ]
        super().__init__(groups, {"momentum": momentum, "betas": betas, "eps": eps})

    @torch.no_grad()
    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    (self.muon_step if group["muon"] else self.adam_step)(p, p.grad, self.state[p], group)

    def muon_step(self, p, g, state, group):
        m = state.setdefault("m", torch.zeros_like(p))
        m.lerp_(g, 1 - group["momentum"])
        update = orthogonalize(g.lerp(m, group["momentum"]))  # Nesterov: look one step ahead
        p.add_(update, alpha=-group["lr"] * math.sqrt(max(1, p.shape[0] / p.shape[1])))

    def adam_step(self, p, g, state, group):
        (beta1, beta2), t = group["betas"], state.get("t", 0) + 1
        m, v = state.setdefault("m", torch.zeros_like(p)), state.setdefault("v", torch.zeros_like(p))
        m.lerp_(g, 1 - beta1)
        v.lerp_(g * g, 1 - beta2)
        p.addcdiv_(m / (1 - beta1**t), (v / (1 - beta2**t)).sqrt() + group["eps"], value=-group["lr"])
        state["t"] = t


def set_lr(optimizer, step, steps, warmup, final=0.0):
    """Linear warm-up over `warmup` steps, then linear decay to `final` times the full rate."""
    decay = final + (1 - final) * (steps - step) / max(1, steps - warmup)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * min((step + 1) / warmup, decay)


# ----------------------------------------------------------------------------------------------------
# 4. Checkpoints: config.json and model.safetensors, as Hugging Face writes them for GPT-2

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8, "BOOL": torch.bool}
# GPT-2's files keep these matrices as (in, out); nn.Linear keeps (out, in).
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def write_files(directory, files):
    """Write {name: bytes} into a directory: all under other names first, then renamed.

    So a reader never sees half a file, and a kill or a full disk leaves what was there before.
    """
    if not is_first():
        return
    temporary = [Path(directory, f"{name}.tmp") for name in files]
    try:
        for path, content in zip(temporary, files.values()):
            with open(path, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # on the disk before it gets its name
    except OSError as error:
        for path in temporary:
            path.unlink(missing_ok=True)
        raise BadInput(f"{directory}: cannot be written ({error.strerror}); what was saved before is untouched") from None
    for path, name in zip(temporary, files):
        os.replace(path, Path(directory, name))


def safetensors_bytes(tensors):
    """8 bytes header length, a JSON header {name: {dtype, shape, data_offsets}}, then the raw numbers."""
    header, blobs, offset = {"__metadata__": {"format": "pt"}}, [], 0
    for name, tensor in tensors.items():
        blobs.append(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + len(blobs[-1])]}
        offset += len(blobs[-1])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # numbers start at a multiple of 8
    return struct.pack("<Q", len(text)) + text + b"".join(blobs)


def read_safetensors(path):
    """The tensors of a file, as float32. BadInput where the file is not what its header says.

    The numbers must follow one another without gap or overlap, as the format demands, so a file cannot ask
    for more memory than it has bytes.
    """
    try:
        raw = memoryview(Path(path).read_bytes())
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    try:
        (length,) = struct.unpack("<Q", raw[:8])
        if length > min(len(raw) - 8, 100_000_000):  # the format's own limit
            raise ValueError(f"a header of {length} bytes in a file of {len(raw)}")
        header, body, tensors, expected = json.loads(bytes(raw[8 : 8 + length])), raw[8 + length :], {}, 0
        header.pop("__metadata__", None)
        for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            (start, end), dtype, shape = info["data_offsets"], DTYPES[info["dtype"]], info["shape"]
            if start != expected or end != start + math.prod(shape) * dtype.itemsize or min(shape, default=0) < 0:
                raise ValueError(f"{name}: bytes {start} to {end} are not {shape} numbers after byte {expected}")
            flat = torch.frombuffer(bytearray(body[start:end]), dtype=dtype) if end > start else torch.empty(0)
            tensors[name], expected = flat.reshape(shape).float(), end
        if expected != len(body):
            raise ValueError(f"{len(body)} bytes of numbers where the header names {expected}")
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        raise BadInput(f"{path}: not a whole safetensors file ({error})") from None
    return tensors


def save_model(model, tokenizer, directory):
    """Write model and tokenizer so that `load_model`, `Tokenizer.load` and `transformers` can open them."""
    tensors = {
        name: tensor.T if name.endswith(TRANSPOSED) else tensor
        for name, tensor in model.state_dict().items()
    }  # fmt: skip
    config = {"architectures": [model.architecture], "model_type": "gpt2", **vars(model.config),
              "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
              "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
              "bos_token_id": tokenizer.eos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}  # fmt: skip
    if isinstance(model, ScalarGPT):
        config["id2label"], config["label2id"] = {"0": "score"}, {"score": 0}  # that is, num_labels=1
    text = json.dumps(config, indent=2) + "\n"
    write_files(directory, {**tokenizer.files(), "config.json": text.encode(), "model.safetensors": safetensors_bytes(tensors)})


def load_model(directory, kind=GPT, extra_layers=0, new_head=False):
    """Open a GPT-2 directory as `GPT` or `ScalarGPT`, in float32.

    With `new_head` a language model can be opened as a `ScalarGPT`: its head is then random. `extra_layers`
    are put on top of the blocks that are there; they start as the identity.
    """
    path = Path(directory, "config.json")
    if not path.exists():
        raise BadInput(f"{directory}: no checkpoint there (config.json is missing); run pretrain.py first?")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        sizes = {name: int(found[name]) for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
        config = Config(**sizes, activation_function=found.get("activation_function", "gelu_new"))
        others = {"model_type": "gpt2", "layer_norm_epsilon": 1e-5, "n_inner": None,
                  "scale_attn_weights": True, "tie_word_embeddings": True}  # fmt: skip
        for name, value in others.items():
            if found.get(name, value) not in (value, *([4 * config.n_embd] if name == "n_inner" else [])):
                raise ValueError(f"{name} is {found[name]!r}, not {value!r}")
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, AttributeError, RecursionError) as error:
        raise BadInput(f"{path}: not a GPT-2 configuration ({error!r})") from None
    found = read_safetensors(Path(directory, "model.safetensors"))
    weights = sum(tensor.numel() for tensor in found.values())
    if config.n_embd * (config.vocab_size + config.n_positions + 12 * config.n_layer * config.n_embd) > weights:
        raise BadInput(f"{directory}: config.json describes a larger model than model.safetensors holds")
    config.n_layer += extra_layers
    model = kind(config)
    new = {f"transformer.h.{config.n_layer - 1 - i}." for i in range(extra_layers)} | ({"score."} if new_head else set())
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(tuple(new))}
    for name, tensor in tensors.items():
        if name.endswith("c_proj.weight"):
            tensor.zero_()  # such a block adds nothing to what it reads
    for name, tensor in found.items():
        name = name if name.startswith(("transformer.", "score.", "lm_head.")) else f"transformer.{name}"
        if not name.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight")):  # masks; the tied head
            tensors[name] = tensor.T if name.endswith(TRANSPOSED) else tensor
    if kind is ScalarGPT and "score.weight" not in tensors:
        raise BadInput(f"{directory}: a language model, not a reward model; run reward.py first?")
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise BadInput(f"{directory}: the weights do not fit {path.name}: {' '.join(str(error).split())}") from None
    return model


# ----------------------------------------------------------------------------------------------------
# 5. Around every run


def positive(kind, or_zero=False):
    """An argparse type: an int or a float above 0, or also 0."""

    def parse(text):
        value = kind(text)
        if not (0 < value < math.inf or (or_zero and value == 0)):
            raise argparse.ArgumentTypeError(f"{text} is {'below' if or_zero else 'not above'} 0, or not finite")
        return value

    parse.__name__ = kind.__name__
    return parse


def add_common_options(parser):
    """The options that mean the same in every training script."""
    parser.add_argument("--seed", type=int, default=1, help="seed of all chance (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda", "mps"], help="default: the best one here")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the products (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="compile the network; pays for long runs of larger models")
    parser.add_argument("--resume", action="store_true", help="go on where a run with the same options was stopped")


def set_up(args):
    """Seed all chance, make the output directory, choose device and precision. Returns the device."""
    args.began = time.time()
    keep_memory()
    if "RANK" in os.environ and torch.cuda.is_available() and args.device in (None, "cuda"):
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            raise BadInput(f"more processes than the {torch.cuda.device_count()} GPUs here; lower --nproc_per_node")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = pick_device(args.device)
    if "RANK" in os.environ and not torch.distributed.is_initialized():
        if device.type == "mps":
            raise BadInput("several processes cannot share an mps device; add --device cpu")
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if not is_first():
            sys.stdout = open(os.devnull, "w")
    if args.seed < 0:
        raise BadInput(f"--seed {args.seed}: give 0 or more")
    torch.manual_seed(args.seed)
    if hasattr(args, "out"):
        try:
            Path(args.out).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"--out {args.out}: cannot be made ({error.strerror})") from None
        if not os.access(args.out, os.W_OK):
            raise BadInput(f"--out {args.out}: cannot be written")
    bfloat16 = getattr(args, "dtype", None) == "bfloat16"
    torch.set_autocast_enabled(device.type, bfloat16)
    torch.set_autocast_dtype(device.type, torch.bfloat16)
    torch.set_autocast_cache_enabled(False)  # the weights change while autocast is on
    return device


def keep_memory():
    """Ask the C library to keep freed memory for the next step, not to give it back and fetch it page by page.

    At 6 layers × 384 that fetching is an eighth of a training step. The price is up to 42% more memory. Only
    glibc, so Linux, has this request (`man mallopt`); elsewhere nothing is asked.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no separate mapping for any block
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back


def pick_device(name=None):
    """The named device, or the best one here: cuda, then mps, then cpu."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError):
        raise BadInput(f"--device {name}: there is none here; leave the option out to take the best one") from None
    return torch.device(name)


# Several processes, started by torchrun. All of them hold all networks and see the same data in the same
# order; each computes its share of a batch; gradients are averaged, so all take the same steps.


def world_size():
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def is_first():
    """Of several processes, the first alone prints and writes."""
    return world_size() == 1 or torch.distributed.get_rank() == 0


def wait_for_all():
    if world_size() > 1:
        torch.distributed.barrier()


def mine(rows):
    """This process's share of a batch."""
    if len(rows) < world_size():
        raise BadInput(f"a batch of {len(rows)} cannot be shared by {world_size()} processes; change --batch-size")
    return rows[torch.distributed.get_rank() :: world_size()] if world_size() > 1 else rows


def average_gradients(parameters, loss, weight):
    """Average gradients over all processes, by how many tokens or pairs (`weight`) each had; and the loss."""
    if world_size() == 1:
        return loss
    grads = [p.grad for p in parameters]
    flat = torch.cat([*(g.flatten() for g in grads), loss.detach().view(1), loss.new_ones(1)]) * weight
    torch.distributed.all_reduce(flat)
    flat /= flat[-1].clone()
    for grad, mean in zip(grads, flat.split([g.numel() for g in grads] + [2])):
        grad.copy_(mean.view_as(grad))
    return flat[-2]


class Checkpoint:
    """What a run needs to go on after a stop: `OUT/resume.pt`, written after every 50 steps and at Ctrl-C.

    parts: models and optimizers by name. What else changes from step to step is given to `save` and comes
    back in `extra`. All chance (torch's and `rng`) is kept, so a run that was stopped and resumed ends with
    the same weights, bit for bit on the CPU, as one that was not.
    """

    def __init__(self, args, rng, **parts):
        self.path, self.rng, self.parts = Path(args.out, "resume.pt"), rng, parts
        self.options = {name: value for name, value in vars(args).items() if name not in ("resume", "began")}
        self.began, self.step, self.extra, self.stopped = args.began, 0, (), False
        if args.resume:
            self.load()
        if threading.current_thread() is threading.main_thread():
            self.handler = signal.signal(signal.SIGINT, self.stop)

    def stop(self, *_):
        self.stopped = True  # finish the step first
        signal.signal(signal.SIGINT, self.handler)  # a second Ctrl-C does not wait

    def load(self):
        if not self.path.exists():
            raise BadInput(f"{self.path}: not there, so there is nothing to resume; start without --resume")
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            changed = [n for n in self.options if state["options"].get(n) != self.options[n]]
            if changed:
                raise BadInput(f"--resume: --{changed[0].replace('_', '-')} was {state['options'].get(changed[0])} in the run that was stopped")
            for name, part in self.parts.items():
                part.load_state_dict(state["parts"][name])
            torch.set_rng_state(state["torch"])
            if torch.cuda.is_available():
                torch.cuda.set_rng_state(state["cuda"])
            self.rng.bit_generator.state = json.loads(state["numpy"])
            self.step, self.extra, self.began = state["step"], state["extra"], self.began - state["seconds"]
        except BadInput:
            raise
        except Exception as error:  # torch.load has no list of what it may raise
            raise BadInput(f"{self.path}: cannot be resumed ({type(error).__name__}); start without --resume") from None

    def seconds(self):
        """Wall time of the run so far, all parts of it together."""
        return time.time() - self.began

    def save(self, step, extra=()):
        """After a step: save if it is time to, and end the run if Ctrl-C was pressed."""
        if world_size() > 1:  # stop together
            device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
            torch.distributed.all_reduce(stopped := torch.tensor(int(self.stopped), device=device))
            self.stopped = stopped.item() > 0
        if is_first() and (self.stopped or step % 50 == 0):
            file = io.BytesIO()
            torch.save({
                "step": step, "seconds": self.seconds(), "options": self.options, "extra": extra,
                "parts": {name: part.state_dict() for name, part in self.parts.items()},
                "torch": torch.get_rng_state(), "numpy": json.dumps(self.rng.bit_generator.state),
                "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
            }, file)  # fmt: skip
            write_files(self.path.parent, {self.path.name: file.getvalue()})
        if self.stopped:
            raise Stopped(f"stopped after step {step}; the same command with --resume goes on from there")

    def finish(self):
        """The run is done: there is nothing to resume any more."""
        if is_first():
            self.path.unlink(missing_ok=True)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self.handler)


class Log:
    """A progress bar with live figures, and the same figures as lines of `metrics.jsonl`."""

    def __init__(self, directory, steps, title, start=0):
        path = Path(directory, "metrics.jsonl") if is_first() else Path(os.devnull)
        kept = []
        if start and is_first():  # what was logged after the last save will be logged again
            kept = [line for line in path.read_text().splitlines(True) if json.loads(line).get("step", start + 1) <= start]
        self.file = open(path, "w")
        self.file.writelines(kept)
        self.bar = tqdm(total=steps, initial=start, desc=title, mininterval=0.5, disable=None if is_first() else True)

    def __call__(self, step, **figures):
        """Show and write the figures of one step. One that is no number stops the run."""
        for name, value in figures.items():
            if not math.isfinite(value) and name != "explained_variance":
                self.bar.close()
                raise BadInput(f"step {step}: {name} is {value}, so the run stops; most often --lr is too high. What was saved before is untouched")
        self.bar.set_postfix({name: f"{value:.3f}" for name, value in figures.items()}, refresh=False)
        print(json.dumps({"step": step, **figures}), file=self.file, flush=True)

    def close(self, **figures):
        """Write the summary as the last line."""
        self.bar.close()
        print(json.dumps({"final": True, **figures}), file=self.file, flush=True)
        self.file.close()


def printable(text):
    """Text that a model wrote, with control characters escaped, so that it cannot harm the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


class BadInput(Exception):
    """Something in what the user gave is wrong; the message is one sentence that says what and where."""


class Stopped(Exception):
    """The user pressed Ctrl-C, and the run has been saved."""


def run(main, parser):
    """Run `main(options)`; where the input is at fault, say so in one sentence and exit with status 2."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends a script without a complaint
    try:
        main(parser.parse_args())
    except BadInput as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except OSError as error:  # a disk that is full, a file that may not be written
        parser.exit(2, f"{parser.prog}: {error.filename or 'writing'}: {error.strerror}; what was saved before is untouched\n")
    except (KeyboardInterrupt, Stopped) as stop:
        parser.exit(130, f"\n{parser.prog}: {stop or 'stopped'}\n")
