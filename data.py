"""Everything that knows text: a tokenizer, a small world to write about, and files of preferences.

1. `Tokenizer`: byte-level byte-pair encoding, in GPT-2's own file format.
2. The world: short posts and their summaries ("TL;DR"), made up from a seed. Its source and its judge
   are known exactly, so every result of this project can be held against the best possible one.
3. Preference files: pairs of answers, of which a person liked one better.
4. Text files of a user's own, encoded once and mapped into memory.

Look at the data before anything else:

    python data.py
"""

import argparse
import gzip
import hashlib
import json
import math
import os
import re
import unicodedata
import zlib
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model import BadInput, is_first, run, wait_for_all, write_files

# ----------------------------------------------------------------------------------------------------
# 1. Tokenizer: byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909; bytes as in GPT-2)

EOS, PAD = "<|endoftext|>", "<|pad|>"


def byte_alphabet():
    """GPT-2's name for each of the 256 bytes: itself where it prints, else a letter from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTE_TO_CHAR = byte_alphabet()
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


@cache
def word_pattern():
    r"""GPT-2's pre-tokenizer: text is cut into words first, and merges never cross a cut.

    GPT-2 writes 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+.
    Python's `re` has no \p, so its classes are put together here: \w holds the letters, all numbers and
    "_"; \d holds the decimal digits, to which ², ½, Ⅷ and the like are added; \s loses U+001C to U+001F.
    """
    numerals = "".join(c for c in map(chr, range(0x110000)) if unicodedata.category(c) in ("Nl", "No"))
    letter, number = rf"(?:[a-zA-Z]+|[^\W\d_{numerals}])", rf"[\d{numerals}]"  # a-z apart: ten times faster
    space, visible, other = r"[^\S\x1c-\x1f]", r"[\S\x1c-\x1f]", r"(?:[^\s\w]|[_\x1c-\x1f])"
    return re.compile(
        rf"'s|'t|'re|'ve|'m|'ll|'d| ?{letter}+| ?{number}+| ?{other}+|{space}+(?!{visible})|{space}+"
    )


def spell(word):
    """A word in the byte alphabet: " kite" gives ["Ġ", "k", "i", "t", "e"]."""
    return [BYTE_TO_CHAR[byte] for byte in word.encode("utf-8", "replace")]


def merge_pair(symbols, pair):
    """Replace each occurrence of `pair`, from left to right: (a, b, c), ("a", "b") gives [ab, c]."""
    merged, i = [], 0
    while i < len(symbols):
        if tuple(symbols[i : i + 2]) == pair:
            merged.append(symbols[i] + symbols[i + 1])
            i += 2
        else:
            merged.append(symbols[i])
            i += 1
    return merged


class Tokenizer:
    """Byte-level BPE. `vocab` maps a token to its id; `merges` lists pairs of tokens, most useful first."""

    def __init__(self, vocab, merges):
        self.vocab, self.merges = vocab, merges
        self.tokens = {i: token for token, i in vocab.items()}
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.eos = vocab[EOS]
        self.pad = vocab.get(PAD, 0)  # masks are made from lengths, so a GPT-2 without PAD may use any id
        self.encode_word = cache(self._encode_word)

    @classmethod
    def train(cls, texts, vocab_size):
        """Merge the most frequent pair of neighbours, again and again, until the vocabulary is full."""
        smallest = len(BYTE_TO_CHAR) + 2
        if vocab_size < smallest:
            raise BadInput(f"a vocabulary of {vocab_size} is too small: 256 bytes and 2 special tokens need {smallest}")
        word_counts = Counter(word for text in texts for word in word_pattern().findall(text))
        symbols = {word: spell(word) for word in word_counts}
        counts, where = Counter(), defaultdict(set)  # pair -> how often; pair -> words that have it
        for word, n in word_counts.items():
            for pair in zip(symbols[word], symbols[word][1:]):
                counts[pair] += n
                where[pair].add(word)
        alphabet, merges = list(BYTE_TO_CHAR.values()), []
        tokens = dict.fromkeys(alphabet)
        while len(tokens) < vocab_size - 2 and counts:
            most = max(counts.values())
            if most < 2:
                break
            best = max(pair for pair, n in counts.items() if n == most)  # ties: the later in the alphabet
            merges.append(best)
            tokens[best[0] + best[1]] = None
            for word in where.pop(best):
                before, after = symbols[word], merge_pair(symbols[word], best)
                for pair in zip(before, before[1:]):
                    counts[pair] -= word_counts[word]
                    where[pair].discard(word)
                for pair in zip(after, after[1:]):
                    counts[pair] += word_counts[word]
                    where[pair].add(word)
                symbols[word] = after
            counts = +counts if len(merges) % 64 == 0 else counts  # drop the pairs that are gone
        vocab = {token: i for i, token in enumerate([*tokens, EOS, PAD])}
        return cls(vocab, merges)

    def _encode_word(self, word):
        symbols = spell(word)
        while len(symbols) > 1:
            best = min(zip(symbols, symbols[1:]), key=lambda pair: self.rank.get(pair, math.inf))
            if best not in self.rank:
                break
            symbols = merge_pair(symbols, best)
        return [self.vocab[symbol] for symbol in symbols]

    def encode(self, text):
        """Text to a list of ids. Special tokens are never read out of text."""
        return [i for word in word_pattern().findall(text) for i in self.encode_word(word)]

    def decode(self, ids):
        """Ids to text, without special tokens; bytes that are not UTF-8 become U+FFFD."""
        chars = "".join(self.tokens[i] for i in map(int, ids) if self.tokens[i] not in (EOS, PAD))
        return bytes(CHAR_TO_BYTE[c] for c in chars).decode("utf-8", "replace")

    def files(self):
        """The two files that GPT-2's tokenizer is made of, as {name: bytes}."""
        merges = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in self.merges)
        return {"vocab.json": json.dumps(self.vocab, ensure_ascii=False).encode(), "merges.txt": merges.encode()}

    @classmethod
    def load(cls, directory):
        """Read both files. BadInput where they are missing, are not GPT-2's, or do not fit the model there."""
        vocab_path, merges_path, config_path = (Path(directory, n) for n in ("vocab.json", "merges.txt", "config.json"))
        try:
            vocab = json.loads(read_text(vocab_path))
            if sorted(vocab.values()) != list(range(len(vocab))):
                raise ValueError("the ids are not 0, 1, 2, …")
            missing = [token for token in (*CHAR_TO_BYTE, EOS) if token not in vocab]
            if missing:
                raise ValueError(f"{missing[0]!r} is missing")
            size = json.loads(read_text(config_path))["vocab_size"] if config_path.exists() else len(vocab)
            if len(vocab) > size:
                raise ValueError(f"{len(vocab)} tokens, but the model beside it knows {size}")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadInput(f"{vocab_path}: not a GPT-2 vocabulary ({error})") from None
        merges = []
        for number, line in enumerate(read_text(merges_path).splitlines(), start=1):
            if line and not line.startswith("#version"):
                pair = tuple(line.split(" "))
                if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
                    raise BadInput(f"{merges_path}:{number}: not two tokens whose sum is in vocab.json")
                merges.append(pair)
        return cls(vocab, merges)

    def __eq__(self, other):
        return (self.vocab, self.merges) == (other.vocab, other.merges)


# ----------------------------------------------------------------------------------------------------
# 2. The world: someone tells what happened today, and someone else sums it up.
#
#     POST: It rained all day. My cousin Hugo lost my kite upstairs. I had soup for lunch.
#     TL;DR: Hugo lost my kite.
#
# One sentence is news, the others are small talk. Six hands in equal parts write the summary, and only
# one of them does it well. A model that is pretrained on all of this writes like all six.

WORLD = {
    "relation": "cousin friend boss teacher doctor neighbour baker tailor captain plumber".split(),
    "name": "Ada Ben Carl Dora Emil Fay Gus Hugo Ida Jack Kim Lena "
    "Max Nora Olga Pia Rex Rosa Sam Tess Uma Vera Will Zoe".split(),
    "friend": "Alma Bert Cleo Dirk Elsa Finn".split(),  # they say hello; they never make news in training
    "verb": "lost found broke fixed hid sold washed painted dropped borrowed".split(),
    "thing": "kite hat bike lamp drum clock boat vase scarf ring chair kettle "
    "ladder mirror radio rug sofa spoon tent toy violin wig map mug".split(),
    "place": "upstairs downstairs outside indoors downtown abroad backstage nearby overseas offshore uphill "
    "underwater".split(),
    "talk": [
        ("It {} all {}.", "rained snowed stormed".split(), "day night morning".split()),
        ("I had {} for {}.", "soup pie toast rice stew cake".split(), "lunch dinner breakfast".split()),
        ("I feel {} today.", "happy tired fine great old young".split()),
        ("{} says hello.", "friend"),
        ("The {} {} next to me.", "cat dog baby parrot".split(), "sleeps sings snores sneezes".split()),
        ("It is {} again.", "Monday Tuesday Friday Sunday".split()),
        ("I have a {} {}.", "sore cold stiff".split(), "knee nose back foot".split()),
        ("I need more {}.", "sleep tea money time".split()),
    ],
}  # fmt: skip
ANSWERS = ["short", "long", "wrong thing", "wrong name", "beside the point", "rambling"]
MAX_ANSWER_TOKENS = 32  # the longest answer that the six hands write is shorter


def write_document(pick, shifted=False):
    """One post and one summary, as (prompt, response). All chance is in `pick(options) -> option`.

    Different choices always give different texts, so a document's probability is the product of its
    choices' probabilities, and nothing else adds to it. `shifted` posts are longer than any in training,
    and their news is about people who never made news in training.
    """

    def small_talk(kinds):
        template, *slots = kind = pick(kinds)
        kinds.remove(kind)  # no kind twice in one post
        return template.format(*[pick(WORLD[s] if isinstance(s, str) else s) for s in slots])

    kinds = list(WORLD["talk"])
    sentences = [small_talk(kinds) for _ in range(4 if shifted else pick([2, 3]))]

    who = WORLD["friend" if shifted else "name"]
    relation, name = pick(WORLD["relation"]), pick(who)
    verb, thing, place = pick(WORLD["verb"]), pick(WORLD["thing"]), pick(WORLD["place"])
    news = pick([f"My {relation} {name} {verb} my {thing} {place}.",
                 f"{place.capitalize()}, my {relation} {name} {verb} my {thing}."])  # fmt: skip
    sentences.insert(pick(range(len(sentences) + 1)), news)

    match pick(ANSWERS):
        case "short":
            answer = f"{name} {verb} my {thing}."
        case "long":
            answer = f"My {relation} {name} {verb} my {thing} {place}."
        case "wrong thing":
            answer = f"{name} {verb} my {pick([t for t in WORLD['thing'] if t != thing])}."
        case "wrong name":
            answer = f"{pick([n for n in who if n != name])} {verb} my {thing}."
        case "beside the point":
            answer = small_talk(list(WORLD["talk"]))  # about the writer's own day
        case "rambling":
            answer = f"{name} {verb} my {thing}. {small_talk(list(WORLD['talk']))}"
    return f"POST: {' '.join(sentences)}\nTL;DR:", f" {answer}"


def documents(n, seed, shifted=False):
    """n documents of the world: a list of (prompt, response, log_prob), log_prob in nats.

    The mean of −log_prob is the entropy of the source: no model can have a lower loss per document.
    """
    rng = np.random.default_rng(seed)
    result = []
    for _ in range(n):
        log_prob = 0.0

        def pick(options):
            nonlocal log_prob
            log_prob -= math.log(len(options))
            return options[rng.integers(len(options))]

        result.append((*write_document(pick, shifted), log_prob))
    return result


def facts(prompt):
    """What happened: {"name": "Hugo", "verb": "lost", "thing": "kite"}, or {} where a text has no news."""
    names = WORLD["name"] + WORLD["friend"]
    one_of = lambda words: f"({'|'.join(words)})"  # noqa: E731
    pattern = rf"[Mm]y \w+ {one_of(names)} {one_of(WORLD['verb'])} my {one_of(WORLD['thing'])}\b"
    found = re.search(pattern, prompt)
    return dict(zip(("name", "verb", "thing"), found.groups())) if found else {}


def judge(prompt, response):
    """The taste of the people in this world: how good is `response` as a summary of `prompt`?

    +1 for each of who, did and what that is right; −1 for each name, verb or thing that is wrong;
    −0.15 for each word over four. So "Hugo lost my kite." earns 3, the most there is.
    """
    right, words = facts(prompt), re.findall(r"\w+", response)
    points = 0
    for kind, known in (("name", WORLD["name"] + WORLD["friend"]), ("verb", WORLD["verb"]), ("thing", WORLD["thing"])):
        for word in set(words) & set(known):
            points += 1 if word == right.get(kind) else -1
    return points + 0.15 * min(0, 4 - len(response.split()))


# ----------------------------------------------------------------------------------------------------
# 3. Preference files: one JSON object a line, {"prompt": …, "chosen": …, "rejected": …}


def preference(prompt, a, b):
    """The probability that a volunteer prefers answer a to b: σ(judge(a) − judge(b)).

    So people differ, and the same person errs now and then (Bradley and Terry 1952).
    """
    return 1 / (1 + math.exp(judge(prompt, b) - judge(prompt, a)))


def collect_preferences(checkpoint, answer, n, seed=2):
    """Show volunteers two of a model's answers to each of n posts, and write down which one they choose.

    `answer(prompts) -> responses` writes the answers. "certainty" is the probability with which the
    chosen answer was to be chosen; no script trains on it. Equal answers are not shown to anyone.

    The pairs go to `preferences.jsonl` beside the model's directory, and "model" marks the weights that wrote
    them. They are collected again only when the weights are others. A file without the mark is someone's
    own, and stays. Returns the path.
    """
    path = Path(checkpoint).parent / "preferences.jsonl"
    model = hashlib.sha256(Path(checkpoint, "model.safetensors").read_bytes()).hexdigest()[:12]
    if path.exists():
        with open(path, encoding="utf-8", errors="replace") as file:
            mark = re.search(r'"model": "(\w{12})"}$', file.readline().strip())
        if not mark or mark[1] == model:
            return path
    print(f"asking the volunteers about {n} pairs of answers …")
    rng = np.random.default_rng(seed)
    posts = [prompt for prompt, _, _ in documents(n, seed=[seed, 2])]
    answers = answer([post for post in posts for _ in range(2)])
    lines = []
    for prompt, a, b in zip(posts, answers[0::2], answers[1::2]):
        p = preference(prompt, a, b)
        if rng.random() > p:
            a, b, p = b, a, 1 - p
        if a != b:
            lines.append(json.dumps({"prompt": prompt, "chosen": a, "rejected": b, "certainty": round(p, 4), "model": model}))
    write_text(path, "\n".join(lines) + "\n")
    wait_for_all()
    return path


def best_accuracy(records):
    """The best accuracy that any model can reach on pairs labelled with these certainties; None without them."""
    if not all("certainty" in record for record in records):
        return None
    return float(np.mean([max(r["certainty"], 1 - r["certainty"]) for r in records]))


TURN = "\n\nAssistant:"  # in a transcript, what follows the last of these is the answer


def transcript(key, value):
    """A text as it is; a chat, [{"role": "user", "content": "Hi."}, …], as "\\n\\nHuman: Hi. …"."""
    if isinstance(value, list):
        try:
            names = {"user": "Human", "assistant": "Assistant"}
            return "".join(f"\n\n{names.get(m['role'], m['role'])}: {m['content'] + ''}" for m in value)
        except (TypeError, KeyError):
            raise ValueError(f'"{key}" is a list, but not of {{"role": …, "content": …}}') from None
    if not isinstance(value, str):
        raise ValueError(f'"{key}" is neither a text nor a list of chat messages')
    return value


def canonical(record):
    """A record of any accepted form as {"prompt", "chosen", "rejected", maybe "certainty"}, all texts.

    Without "prompt", or where answers are chats, both are whole transcripts, and the prompt is what they
    share up to an "\\n\\nAssistant:" (the form of HH, Bai et al. 2022). ValueError says what is wrong.
    """
    if not isinstance(record, dict):
        raise ValueError('write an object: {"prompt": …, "chosen": …, "rejected": …}')
    for key in ("chosen", "rejected"):
        if key not in record:
            raise ValueError(f'"{key}" is missing')
    chosen, rejected = (transcript(key, record[key]) for key in ("chosen", "rejected"))
    prompt = None if isinstance(record["chosen"], list) and isinstance(record.get("prompt"), str) else record.get("prompt")
    if isinstance(prompt, list):
        said = transcript("prompt", prompt)
        chosen, rejected = (text if text.startswith(said) else said + text for text in (chosen, rejected))
    if not isinstance(prompt, str):
        end = os.path.commonprefix([chosen, rejected]).rfind(TURN) + len(TURN)
        if end < len(TURN):
            raise ValueError('no "prompt" text, and the answers are not transcripts that share an "\\n\\nAssistant:"')
        prompt, chosen, rejected = chosen[:end], chosen[end:], rejected[end:]
    result = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if "certainty" in record:
        if not isinstance(record["certainty"], (int, float)) or not 0 <= record["certainty"] <= 1:
            raise ValueError('"certainty" is not a number between 0 and 1')
        result["certainty"] = record["certainty"]
    return result


def read_preferences(path):
    """Read a preference file: a list of {"prompt", "chosen", "rejected", maybe "certainty"}.

    One JSON object a line, or one JSON array of them; gzip too. For the forms of an object see `canonical`.
    A bad one raises BadInput with the file, the line (in an array: the record) and what is wrong.
    """
    text = read_text(path)
    is_array = text.lstrip().startswith("[")
    if is_array:
        try:
            rows = [(f"{path}: record {i}", row) for i, row in enumerate(json.loads(text), start=1)]
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path}: starts with [ but is no JSON array ({error})") from None
    else:
        rows = [(f"{path}:{i}", line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
    records = []
    for where, row in rows:
        try:
            records.append(canonical(row if is_array else json.loads(row)))
        except json.JSONDecodeError as error:
            raise BadInput(f"{where}: not JSON ({error.msg}); write one object on each line") from None
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{where}: {error}") from None
    if not records:
        raise BadInput(f"{path}: no preferences in it; write one object on each line")
    return records


def encode_pairs(tokenizer, records, block_size):
    """Preference records to token ids: a list of (prompt, chosen, rejected), and the records behind it.

    Prompt and answers are encoded apart, and both answers end with EOS. What is too long for the model
    keeps the start of its answers and the end of its prompt. A pair whose answers are equal after that
    teaches nothing and is dropped.
    """
    pairs, kept = [], []
    for record in records:
        prompt = tokenizer.encode(record["prompt"])
        chosen, rejected = (tokenizer.encode(record[k]) + [tokenizer.eos] for k in ("chosen", "rejected"))
        chosen, rejected = chosen[: block_size // 2], rejected[: block_size // 2]
        prompt = prompt[max(0, len(prompt) + max(len(chosen), len(rejected)) - block_size) :]
        if chosen != rejected and prompt:
            pairs.append((prompt, chosen, rejected))
            kept.append(record)
    return pairs, kept


def batches(lengths, batch_size, rng):
    """Index arrays of `batch_size` items, each item once, neighbours in length together.

    Rows of one batch are padded to its longest row, so equal lengths waste nothing. Sorting within a
    random sixteen batches, not within all data, keeps every batch random enough to learn from.
    """
    order = rng.permutation(len(lengths))
    lengths = np.asarray(lengths)
    result = []
    for start in range(0, len(order), 16 * batch_size):
        window = order[start : start + 16 * batch_size]
        window = window[np.argsort(lengths[window], kind="stable")]
        result += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
    return [result[i] for i in rng.permutation(len(result))]


def pad_rows(prompts, responses, device="cpu"):
    """Lists of ids to a right-padded batch: tokens (B, T) and the mask of response tokens (B, T)."""
    rows = [[*p, *r] for p, r in zip(prompts, responses)]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    position = torch.arange(width)
    start, end = (torch.tensor([[n] for n in map(len, x)]) for x in (prompts, rows))
    return tokens.to(device), ((position >= start) & (position < end)).to(device)


def pack_pairs(pairs, device="cpu"):
    """Pairs of answers to the same prompt as one row each, so that the prompt is read once, not twice.

    A row is: prompt, chosen answer, the prompt's last token once more, rejected answer. The second part
    sees the prompt and itself, not the chosen answer, and its positions go on from the prompt's. So each
    answer is exactly what it would be in a row of its own.
    Returns tokens (B, T), the masks (2, B, T) of chosen and of rejected tokens, and the layout for the
    model: positions (B, T) and which tokens each token may look at (B, 1, T, T).
    """
    rows = [[*prompt, *chosen, prompt[-1], *rejected] for prompt, chosen, rejected in pairs]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    prompt, chosen, rejected = (torch.tensor([[len(x)] for x in part]) for part in zip(*pairs))  # lengths (B, 1)
    t = torch.arange(width).expand(tokens.shape)
    second = t >= prompt + chosen
    masks = torch.stack([(t >= prompt) & ~second, (t > prompt + chosen) & (t <= prompt + chosen + rejected)])
    positions = torch.where(second, t - chosen - 1, t)
    positions = positions.masked_fill(t > prompt + chosen + rejected, 0)
    first_only = (t >= prompt - 1) & ~second  # the chosen answer, and the token that the second part repeats
    visible = (t[:, None, :] <= t[:, :, None]) & ~(first_only[:, None, :] & second[:, :, None])
    return tokens.to(device), masks.to(device), (positions.to(device), visible[:, None].to(device))


# ----------------------------------------------------------------------------------------------------
# 4. Text of a user's own


def read_chunks(paths, size=2**20):
    """The text of some files, gzip or not, in pieces of about `size` bytes; None after each file.

    A piece ends before white space, where words end too, so it is tokenized as it would be in the whole.
    """
    for path in paths:
        try:
            with open(path, "rb") as file:
                zipped = file.read(2) == b"\x1f\x8b"
            with gzip.open(path) if zipped else open(path, "rb") as file:
                text, number = "", 0
                for number, line in enumerate(file, start=1):
                    text += line.decode("utf-8")
                    if len(text) >= size:
                        piece = text.rstrip()
                        yield piece
                        text = text[len(piece) :]
                yield text
                yield None
        except UnicodeDecodeError:
            raise BadInput(f"{path}:{number}: not UTF-8 text; save it as UTF-8") from None
        except (OSError, EOFError, zlib.error) as error:
            raise BadInput(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def encode_files(tokenizer, paths, target):
    """Encode text files once, into a file of token ids that is then mapped, not read, into memory.

    An `<|endoftext|>` in the text, and the end of each file, become EOS. Returns the ids, shape (N,).
    """
    kind = np.dtype(np.uint16 if len(tokenizer.vocab) <= 2**16 else np.uint32)
    if not is_first():
        wait_for_all()
        return np.memmap(target, dtype=kind, mode="r")
    with open(target, "wb") as file, tqdm(desc="encoding", unit=" characters", unit_scale=True) as bar:
        for text in read_chunks(paths):
            ids = [] if text is not None else [tokenizer.eos]
            for i, part in enumerate((text or "").split(EOS)):
                ids += [tokenizer.eos] * (i > 0) + tokenizer.encode(part)
            file.write(np.array(ids, dtype=kind).tobytes())
            bar.update(len(text or ""))
    wait_for_all()
    return np.memmap(target, dtype=kind, mode="r")


# ----------------------------------------------------------------------------------------------------
# Files


def read_text(path):
    """A UTF-8 file as text, `.gz` unpacked. BadInput says in one sentence what is wrong with it."""
    try:
        raw = Path(path).read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        return raw.decode("utf-8")
    except FileNotFoundError:
        raise BadInput(f"{path}: there is no such file") from None
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise BadInput(f"{path}:{line}: not UTF-8 text; save it as UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path}: cannot be read ({error})") from None


def write_text(path, text):
    """Write a file so that a reader never sees half of it: under another name first, then renamed."""
    write_files(Path(path).parent, {Path(path).name: text.encode("utf-8")})


def main(args):
    print("What people write. In brackets: how surprising each text is, in nats.\n")
    for post, response, log_prob in documents(6, seed=0):
        print(f"{post}{response}    [{-log_prob:.1f}]\n")
    print("Some answers to the last post, and what the judge thinks of them:\n")
    name, verb, thing = facts(post).values()
    answers = [f"{name} {verb} my {thing}.", f"{name} {verb} my {thing}. I like tea.", f"Alma {verb} my {thing}.", "I like tea."]
    for answer in answers:
        print(f"{judge(post, answer):6.2f}  {answer}")
    print("\nWhat volunteers choose when they see two of them:\n")
    for a, b in zip(answers, answers[1:]):
        print(f"{preference(post, a, b):6.0%}  {a}\n{preference(post, b, a):6.0%}  {b}\n")


if __name__ == "__main__":
    run(main, argparse.ArgumentParser("data.py", description="Print a few documents and what the judge thinks."))
