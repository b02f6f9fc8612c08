"""Everything that knows text: a tokenizer, a small world to write about, preferences, and files.

1. `Tokenizer`: byte-level byte-pair encoding, in GPT-2's own file format.
2. The world: short posts and their summaries ("TL;DR"), made up from a seed. Its source and its judge
   are known exactly, so every result of this project can be held against the best possible one.
3. Preferences: pairs of answers, of which a person liked one better.
4. Batches: lists of token ids as one rectangle of numbers.
5. Files: text of your own, reading with one clear sentence when something is wrong, and writing.

Look at the data before anything else:

    python data.py
"""

import gzip
import itertools
import json
import math
import os
import random
import re
import unicodedata
import zlib
from collections import Counter, defaultdict, namedtuple
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm


class BadInput(Exception):
    """Something that the user gave is wrong. The message is one sentence: where, what, and how to fix it."""

    def __init__(self, message):
        super().__init__(printable(message.replace("\n", " ")))  # it may quote a file


# ----------------------------------------------------------------------------------------------------
# 1. Tokenizer: byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909; bytes as in GPT-2)

EOS, PAD = "<|endoftext|>", "<|pad|>"


def byte_alphabet():
    """GPT-2's name for each of the 256 bytes: itself where it prints, else a letter from U+0100 on."""
    printable = [ord(c) for c in map(chr, range(256)) if "!" <= c <= "~" or "¡" <= c <= "¬" or "®" <= c]
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
    words = rf"'s|'t|'re|'ve|'m|'ll|'d| ?{letter}+| ?{number}+| ?{other}+"
    return re.compile(rf"{words}|{space}+(?!{visible})|{space}+")


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
        self.id_to_token = {i: token for token, i in vocab.items()}
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.eos = vocab[EOS]
        self.pad = vocab.get(PAD, 0)  # masks are made from lengths, so a GPT-2 without PAD may use any id
        self.encode_word = cache(self._encode_word)

    @classmethod
    def train(cls, texts, vocab_size):
        """Merge the most frequent pair of neighbours, again and again, until the vocabulary is full."""
        smallest = len(BYTE_TO_CHAR) + 2
        if vocab_size < smallest:
            raise BadInput(
                f"a vocabulary of {vocab_size} is too small: bytes and special tokens are {smallest}"
            )
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
        chars = "".join(self.id_to_token[i] for i in map(int, ids) if self.id_to_token[i] not in (EOS, PAD))
        return bytes(CHAR_TO_BYTE[c] for c in chars).decode("utf-8", "replace")

    def files(self):
        """The two files that GPT-2's tokenizer is made of, as {name: bytes}."""
        merges = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in self.merges)
        vocab = json.dumps(self.vocab, ensure_ascii=False)
        return {"vocab.json": vocab.encode(), "merges.txt": merges.encode()}

    @classmethod
    def load(cls, directory):
        """Read both files. BadInput where they are missing, not GPT-2's, or do not fit the model there."""
        vocab_path, merges_path = Path(directory, "vocab.json"), Path(directory, "merges.txt")
        config_path = Path(directory, "config.json")
        if not vocab_path.exists():
            newer = Path(directory, "tokenizer.json").exists()
            hint = "save its tokenizer as vocab.json and merges.txt" if newer else "run pretrain.py first?"
            raise BadInput(f"{directory}: no checkpoint there (vocab.json is missing); {hint}")
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
# 2. The world: someone tells what happened, and someone else sums it up.
#
#     POST: It rained all day. My captain Hugo lost my kite underwater. I had soup for lunch.
#     TL;DR: Hugo lost my kite underwater.
#
# One sentence is news, the others are small talk. Three writers in five are lazy: they repeat the post's
# first sentence. The others try, and one in six of those gets it right. A model that is pretrained on all
# of this writes like all of them. One text in four is a letter: it has words of its own, and no volunteer
# ever sees one, so letters show whether alignment carries over to text that nobody labelled.

WORLD = {
    "POST": {
        "relation": "cousin boss teacher doctor neighbour baker captain plumber".split(),
        "name": "Ada Ben Carl Dora Emil Fay Gus Hugo Ida Jack Kim Lena "
        "Max Nora Olga Pia Rex Rosa Sam Tess Uma Vera Will Zoe".split(),
        "verb": "lost found broke fixed hid sold painted borrowed".split(),
        "thing": "kite hat bike lamp drum clock boat vase "
        "scarf ring chair kettle ladder mirror rug violin".split(),
        "place": "upstairs outside downtown abroad backstage nearby underwater indoors".split(),
    },
    "LETTER": {
        "relation": "aunt uncle dentist butler pirate wizard".split(),
        "name": "Agatha Basil Clara Desmond Edith Felix Greta Horace Iris Jasper Mabel Otto".split(),
        "verb": "washed dropped buried ironed juggled stole".split(),
        "thing": "trombone teapot wig canoe umbrella piano tent globe".split(),
        "place": "offshore uphill overseas downstairs aloft overboard".split(),
    },
}
DISHES = "soup pie toast rice stew cake".split()
GREETERS = "Alma Bert Cleo Dirk Elsa Finn".split()  # they say hello, and never make news
SMALL_TALK = [  # a template, and the words for each of its gaps
    ("It {} all {}.", "rained snowed stormed".split(), "day night morning".split()),
    ("I had {} for {}.", DISHES, "lunch dinner breakfast".split()),
    ("I feel {} today.", "happy tired fine great old young".split()),
    ("{} says hello.", GREETERS),
    ("The {} {} next to me.", "cat dog baby parrot".split(), "sleeps sings snores sneezes".split()),
    ("It is {} again.", "Monday Tuesday Friday Sunday".split()),
    ("I have a {} {}.", "sore cold stiff".split(), "knee nose back foot".split()),
    ("I need more {}.", "sleep tea money time".split()),
]
WRITERS = ["lazy"] * 9 + ["full", "short", "wrong thing", "wrong name", "beside the point", "rambling"]
MAX_ANSWER_TOKENS = 32  # the longest answer that these writers give is shorter

Document = namedtuple("Document", "prompt response writer log_prob")  # three texts, and nats


def write_document(pick, kind):
    """One "POST" or "LETTER" and its summary: (prompt, response, writer). `pick(options)` makes each choice.

    Different choices always give different texts, so a document's probability is the product of its
    choices' probabilities. An option that stands in a list n times is n times as likely.
    """

    def small_talk(templates):
        template, *gaps = chosen = pick(templates)
        templates.remove(chosen)  # no kind twice in one post
        return template.format(*[pick(words) for words in gaps])

    templates, words = list(SMALL_TALK), WORLD[kind]
    sentences = [small_talk(templates) for _ in range(pick([2, 3]))]
    relation, name, verb, thing, place = (pick(options) for options in words.values())
    news = f"My {relation} {name} {verb} my {thing} {place}."
    sentences.insert(pick(range(len(sentences) + 1)), news)

    writer = pick(WRITERS)
    match writer:
        case "lazy":
            answer = sentences[0]
        case "full":
            answer = f"{name} {verb} my {thing} {place}."
        case "short":
            answer = f"{name} {verb} my {thing}."
        case "wrong thing":  # mostly a dish; one in four takes a comparison with the post to find
            others = pick([DISHES] * 3 + [[other for other in words["thing"] if other != thing]])
            answer = f"{name} {verb} my {pick(others)} {place}."
        case "wrong name":  # mostly someone who says hello
            others = pick([GREETERS] * 3 + [[other for other in words["name"] if other != name]])
            answer = f"{pick(others)} {verb} my {thing} {place}."
        case "beside the point":  # about the writer's own day
            answer = small_talk(templates)
        case "rambling":
            answer = f"{name} {verb} my {thing} {place}. {small_talk(list(SMALL_TALK))}"
    return f"{kind}: {' '.join(sentences)}\nTL;DR:", f" {answer}", writer


def documents(n, seed, kind=None):
    """n documents of one kind, "POST" or "LETTER", or by default three posts to each letter.

    `log_prob` is the exact log-probability of a document, given its kind, in nats. Its mean is minus the
    entropy of what a model has to guess: the first token tells the kind and is given, not guessed.
    """
    rng = random.Random(str(seed))
    result = []
    for _ in range(n):
        log_prob = 0.0

        def pick(options):
            nonlocal log_prob
            chosen = rng.choice(options)
            log_prob += math.log(options.count(chosen) / len(options))
            return chosen

        written = write_document(pick, kind or rng.choice(["POST"] * 3 + ["LETTER"]))
        result.append(Document(*written, log_prob))
    return result


def facts(prompt):
    """Who, did, what and where: ("Hugo", "lost", "kite", "underwater"), or () where a text has no news."""
    found = re.search(r"My \w+ (\w+) (\w+) my (\w+) (\w+)\.", prompt)
    return found.groups() if found else ()


@cache
def fact_words():
    """All words that can be stated as a fact: names, verbs, things and places, dishes and greeters too."""
    kinds = [words[key] for words in WORLD.values() for key in ("name", "verb", "thing", "place")]
    return {word for words in (*kinds, DISHES, GREETERS) for word in words}


def judge(prompt, response):
    """The taste of the people in this world: how good is `response` as a summary of `prompt`?

    +1 for each of who, did, what and where that is right; −1 for each name, verb, thing or place that is
    wrong; −0.2 for each word over five. So "Hugo lost my kite underwater." earns 4, the most there is.
    """
    stated = set(re.findall(r"\w+", response)) & fact_words()
    points = sum(1 if word in facts(prompt) else -1 for word in stated)
    return points - 0.2 * max(0, len(response.split()) - 5)


# ----------------------------------------------------------------------------------------------------
# 3. Preferences: one JSON object a line, {"prompt": …, "chosen": …, "rejected": …}


def preference(prompt, a, b):
    """The probability that a volunteer prefers answer a to b: σ(judge(a) − judge(b)).

    So people differ, and the same person errs now and then (Bradley and Terry 1952).
    """
    return 0.5 + 0.5 * math.tanh((judge(prompt, a) - judge(prompt, b)) / 2)  # σ, without overflow


def ask_volunteers(posts, answers, seed):
    """Show volunteers two answers to each of n posts, and write down which one they choose.

    `answers` has 2n texts, the two to one post side by side. Returns preference records. "certainty" is
    the probability with which the chosen answer was to be chosen; no script trains on it. Where both
    answers are the same there is nothing to choose, and no record.
    """
    rng, records = random.Random(str(seed)), []
    for post, a, b in zip(posts, answers[0::2], answers[1::2]):
        p = preference(post, a, b)
        if rng.random() > p:
            a, b, p = b, a, 1 - p
        if a != b:
            records.append({"prompt": post, "chosen": a, "rejected": b, "certainty": round(p, 4)})
    return records


def best_accuracy(records):
    """The best accuracy that any model can reach on pairs with these certainties; None without them."""
    if not all("certainty" in record for record in records):
        return None
    return float(np.mean([max(r["certainty"], 1 - r["certainty"]) for r in records]))


TURN = "\n\nAssistant:"  # in a transcript, what follows the last of these is the answer
ROLES = {"user": "Human", "human": "Human", "assistant": "Assistant", "gpt": "Assistant", "system": "System"}
FORMS = [  # keys of the prompt, the chosen and the rejected answer; the first line that is there is taken
    ("prompt", "chosen", "rejected"),
    ("question", "chosen", "rejected"),
    ("question", "response_j", "response_k"),
    ("conversations", "chosen", "rejected"),
    (None, "chosen", "rejected"),  # transcripts, as in HH (Bai et al. 2022): the prompt is what both share
]
OPENINGS = ("\n\nHuman:", "\n\nSystem:")  # of a transcript
NEVER_IGNORED = {"question", "conversations", "system", "instruction", "input", "context", "history"}


def as_text(key, value):
    """A text as it is; one or several {"role", "content"} or {"from", "value"} as HH writes conversations."""
    if isinstance(value, str):
        return value
    text = ""
    for message in (value if isinstance(value, list) else [value]) or [None]:
        match message:
            case {"role": str(role), "content": str(content)} | {"from": str(role), "value": str(content)}:
                pass
            case _:
                raise ValueError(f'"{key}" is neither a text nor a chat of {{"role": …, "content": …}}')
        if role not in ROLES:
            raise ValueError(f'"{key}" has the role {role!r}, which is none of {", ".join(ROLES)}')
        text += f"\n\n{ROLES[role]}: {content}"
    return text


def join(prompt, answer):
    """The conversation of a prompt and an answer that may say the prompt, or its end, once more."""
    for turn in re.finditer(r"\n\n(Human|Assistant|System):(?=\s*\S)", prompt):
        if f"{answer}\n\n".startswith(f"{prompt[turn.start() :]}\n\n"):
            return prompt[: turn.start()] + answer
    if answer.startswith(TURN):
        return prompt + answer
    if f"{prompt}{TURN}" in answer:  # after earlier turns
        return answer
    raise ValueError("the answers begin with a turn that is neither the assistant's nor in the prompt")


def canonical(record):
    """A record of any accepted form as {"prompt", "chosen", "rejected", maybe "certainty"}, all texts.

    All that a record says is in the result exactly once. ValueError says what is wrong with it.
    """
    if not isinstance(record, dict):
        raise ValueError('write an object: {"prompt": …, "chosen": …, "rejected": …}')
    form = next((form for form in FORMS if {*form} - {None} <= record.keys()), None)
    if form is None or NEVER_IGNORED & record.keys() - {*form}:
        accepted = "; ".join(", ".join(key for key in form if key) for form in FORMS)
        raise ValueError(f"found the keys {', '.join(record) or '(none)'}; accepted are {accepted}")
    prompt, *answers = (record.get(key) for key in form)
    if isinstance(answers[0], str) != isinstance(answers[1], str):
        raise ValueError(f'of "{form[1]}" and "{form[2]}" one is a text and one is not; write both alike')
    whole = [not isinstance(answer, str) or answer.startswith(OPENINGS) for answer in answers]
    answers = [as_text(key, answer) for key, answer in zip(form[1:], answers)]
    if all(whole):  # conversations, in which the prompt ends where the last turn begins that both share
        if prompt is not None:
            said = as_text(form[0], prompt)
            if isinstance(prompt, str):
                said = said.removesuffix(TURN) if said.startswith(OPENINGS) else f"\n\nHuman: {said}"
            answers = [join(said, answer) for answer in answers]
        shared = os.path.commonprefix(answers)
        if TURN not in shared:
            raise ValueError("the answers share no prompt that the assistant then answers")
        prompt = shared[: shared.rfind(TURN) + len(TURN)]
        answers = [answer.removeprefix(prompt) for answer in answers]
    elif prompt is None:
        raise ValueError(f'no "prompt", and the answers are not transcripts that share a {TURN!r}')
    elif any(whole):
        raise ValueError("one answer is a whole transcript, the other one is not; write both alike")
    elif not isinstance(prompt, str):
        prompt, answers = as_text(form[0], prompt) + TURN, [f" {answer}" for answer in answers]
    result = dict(zip(("prompt", "chosen", "rejected"), (prompt, *answers)))
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


# ----------------------------------------------------------------------------------------------------
# 4. Batches


def encode_pairs(tokenizer, records, context):
    """Preference records to token ids: a list of (prompt, chosen, rejected), and the records behind it.

    Prompt and answers are encoded apart, and both answers end with EOS. What is too long for a context of
    so many tokens keeps the start of its answers and the end of its prompt. A pair whose answers are equal
    after that teaches nothing and is dropped.
    """
    pairs, kept = [], []
    for record in records:
        prompt = tokenizer.encode(record["prompt"])
        chosen, rejected = (tokenizer.encode(record[k]) + [tokenizer.eos] for k in ("chosen", "rejected"))
        chosen, rejected = chosen[: context // 2], rejected[: context // 2]
        prompt = prompt[max(0, len(prompt) + max(len(chosen), len(rejected)) - context) :]
        if chosen != rejected and prompt:
            pairs.append((prompt, chosen, rejected))
            kept.append(record)
    return pairs, kept


def load_pairs(path, tokenizer, context, batch_size):
    """Read and encode a preference file: the pairs, their records, and how many at the end are held out."""
    records = read_preferences(path)
    pairs, kept = encode_pairs(tokenizer, records, context)
    if len(pairs) < max(20, batch_size):
        dropped = f"{len(records)}, of which {len(records) - len(pairs)} have equal answers"
        raise BadInput(f"{path}: too few pairs ({dropped}); give 20 or more, and not fewer than --batch-size")
    n_val, dropped = min(1024, len(pairs) // 10), len(records) - len(pairs)
    print(
        f"{path}: {len(pairs) - n_val} pairs to learn from, {n_val} held out, {dropped} dropped. One of them:"
    )
    print(printable("{prompt}\n    chosen:  {chosen}\n    rejected:{rejected}\n".format(**kept[0])))
    return pairs, kept, n_val


def batches(lengths, batch_size, rng, steps=None):
    """Index arrays of `batch_size` items, neighbours in length together: one pass, or what `steps` need.

    Rows of one batch are padded to its longest row, so equal lengths waste nothing. Sorting within a
    random sixteen batches, not within all data, keeps every batch random enough to learn from.
    """
    lengths, result = np.asarray(lengths), []
    while not result or len(result) < (steps or 0):
        order, one_pass = rng.permutation(len(lengths)), []
        for start in range(0, len(order), 16 * batch_size):
            window = order[start : start + 16 * batch_size]
            window = window[np.argsort(lengths[window], kind="stable")]
            one_pass += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        result += [one_pass[i] for i in rng.permutation(len(one_pass))]
    return result[:steps]


def pad_rows(prompts, responses, device="cpu"):
    """Lists of ids to a right-padded batch.

    Returns tokens (B, T), the mask of response tokens (B, T), and the column where the first response starts.
    """
    rows = [[*prompt, *response] for prompt, response in zip(prompts, responses)]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.long)
    column = torch.arange(width)
    start, end = (torch.tensor([[len(part)] for part in parts]) for parts in (prompts, rows))
    return tokens.to(device), ((column >= start) & (column < end)).to(device), min(map(len, prompts))


def pad_pairs(pairs, device="cpu"):
    """`pad_rows` of B pairs (prompt, chosen, rejected) as 2B rows: first all chosen, then all rejected."""
    prompts, chosen, rejected = zip(*pairs)
    return pad_rows(prompts * 2, chosen + rejected, device)


# ----------------------------------------------------------------------------------------------------
# 5. Files


OTHER_FORMATS = {b"PK": "a zip archive", b"PAR1": "a parquet table", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}


def read_chunks(path, size=2**20):
    """The text of a UTF-8 file, gzip or not, in pieces of about `size` characters.

    A piece ends before white space, where words end too, so it is tokenized as it would be in the whole.
    BadInput says in one sentence what is wrong with a file.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise BadInput(f"{path}: not a file; a folder or a pipe cannot be read here")
    try:
        with open(path, "rb") as file:
            start = file.read(6)
        for magic, kind in OTHER_FORMATS.items():
            if start.startswith(magic):
                raise BadInput(f"{path}: {kind}, which is not read here; give UTF-8 text, or that with gzip")
        with gzip.open(path) if start.startswith(b"\x1f\x8b") else open(path, "rb") as file:
            text, number = "", 0
            for number, line in enumerate(file, start=1):
                text += line.decode("utf-8-sig" if number == 1 else "utf-8")
                if len(text) >= size:
                    piece = re.sub(r"[^\S\x1c-\x1f]+\Z", "", text)  # GPT-2's white space, as in word_pattern
                    yield piece
                    text = text[len(piece) :]
            yield text
    except UnicodeDecodeError:
        raise BadInput(f"{path}:{number}: not UTF-8 text; save it as UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def read_text(path):
    """All of such a file."""
    return "".join(read_chunks(path))


def encode_files(tokenizer, paths, target):
    """Encode text files once, into a file of token ids that is then mapped, not read, into memory: ids (N,).

    An `<|endoftext|>` in the text, and the end of each file, become EOS.
    """
    kind = np.dtype(np.uint16 if len(tokenizer.vocab) <= 2**16 else np.uint32)
    texts = (text for path in paths for text in itertools.chain(read_chunks(path), [EOS]))
    with open(target, "wb") as file, tqdm(desc="encoding", unit=" characters", unit_scale=True) as bar:
        for text in texts:
            ids = []
            for i, part in enumerate(text.split(EOS)):
                ids += [tokenizer.eos] * (i > 0) + tokenizer.encode(part)
            file.write(np.array(ids, dtype=kind).tobytes())
            bar.update(len(text))
    return np.memmap(target, dtype=kind, mode="r")


def write_files(directory, files):
    """Write {name: bytes} into a directory: all under other names, then renamed. None puts a file aside.

    So a reader never sees half a file, and a full disk leaves what was there before. Of several files the
    last one is away while the others change: a kill cannot leave a set that looks whole and is mixed.
    """
    written = [Path(directory, name) for name, content in files.items() if content is not None]
    try:
        for path in written:
            with open(f"{path}.tmp", "wb") as file:
                file.write(files[path.name])
                file.flush()
                os.fsync(file.fileno())  # on the disk before it gets its name
        for path in {Path(directory, name) for name in files}.difference(written):
            if path.exists():
                os.replace(path, f"{path}.old")
        if len(written) > 1:
            written[-1].unlink(missing_ok=True)
        for path in written:
            os.replace(f"{path}.tmp", path)
    finally:
        for path in written:
            Path(f"{path}.tmp").unlink(missing_ok=True)


def write_records(path, records):
    """Write records as JSONL, one object a line, all of them or nothing."""
    lines = "".join(f"{json.dumps(record)}\n" for record in records)
    write_files(Path(path).parent, {Path(path).name: lines.encode()})


def printable(text):
    """Text that a model wrote, without control and direction characters, which could harm the terminal."""
    harmful = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
    return re.sub(harmful, lambda found: found[0].encode("unicode_escape").decode(), text)


def main():
    print("What people write. In brackets: who wrote the summary, and how surprising it all is, in nats.\n")
    for document in documents(6, seed=5):
        print(f"{document.prompt}{document.response}    [{document.writer}; {-document.log_prob:.1f}]\n")
    post = documents(1, seed=5, kind="POST")[0].prompt
    name, verb, thing, place = facts(post)
    answers = [
        f" {name} {verb} my {thing} {place}.",
        f" {name} {verb} my {thing} {place}. I need more tea.",
        f" {name} {verb} my {thing}.",
        f" Alma {verb} my {thing} {place}.",
        f" {name} {verb} my soup {place}.",
        " I need more tea.",
    ]
    print(f"Answers to one post, and what the judge thinks of each:\n\n{post}")
    for answer in answers:
        print(f"{judge(post, answer):6.1f}  {answer}")
    print("\nWhat volunteers choose when they see two of them:\n")
    for a, b in zip(answers, answers[1:]):
        print(f"{preference(post, a, b):6.0%}  {a}\n{preference(post, b, a):6.0%}  {b}\n")


if __name__ == "__main__":
    main()
