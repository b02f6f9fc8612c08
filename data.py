"""Everything to do with text. Look at the data before anything else: python data.py

1. The world: short texts and their summaries. Source and judge are known, and so is the best result.
2. People's choices: volunteers prefer one answer to another, and such pairs become rectangles of numbers.
   A first reading ends here. For when you need it:
3. Tokenizer: byte-level byte-pair encoding, in GPT-2's own file format.
4. Pairs of answers: preference files, encoding, what is held out, batches.
5. Files: reading with one clear sentence when something is wrong, and writing.
"""

import argparse
import contextlib
import gzip
import heapq
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

try:
    import fcntl
except ImportError:
    fcntl = None  # on Windows

# ----------------------------------------------------------------------------------------------------
# 1. The world: someone tells what happened, and someone else sums it up.
#
#     POST: It rained all day. My captain Hugo lost my kite underwater. I had soup for lunch.
#     TL;DR: Hugo lost my kite underwater.
#
# One sentence is news, the others are small talk. Three writers in five are lazy: they repeat the post's
# first sentence. The others try, and one in six of those gets it right. One text in four is a letter: it has
# words of its own, and no volunteer ever sees one, so letters show whether alignment carries over.
#
# Nothing outside this section knows what the texts are about. Another task in its place needs `documents`,
# `KINDS`, `judge`, `BEST`, `kind_of` and `MAX_ANSWER_TOKENS`.

FACTS = ("name", "verb", "thing", "place")  # what a summary states and the judge counts
SUMMARY = "{name} {verb} my {thing} {place}."
NEWS = "My {relation} " + SUMMARY
WORDS = {
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
WRITERS = ["repeats"] * 9 + ["full", "short", "wrong thing", "wrong name", "off topic", "rambling"]

KINDS = tuple(WORDS)  # of texts: first the one that volunteers label, then the one that nobody labels
BEST = len(FACTS)  # the highest score that the judge gives
MAX_ANSWER_TOKENS = 32  # the longest answer that these writers give is shorter

Document = namedtuple("Document", "prompt response writer log_prob")  # three texts, and nats


def write_document(pick, kind):
    """One text of a kind and its summary: (prompt, response, writer). `pick(options)` makes each choice.

    Different choices always give different texts, so a document's probability is the product of its
    choices' probabilities. An option that stands in a list n times is n times as likely.
    """

    def small_talk(templates):
        choice = pick(templates)
        templates.remove(choice)  # no template twice in one text
        template, *gaps = choice
        return template.format(*[pick(words) for words in gaps])

    def mistake(key, odd_words):  # three in four can be spotted without the prompt; the fourth cannot
        others = [word for word in WORDS[kind][key] if word != news[key]]
        return SUMMARY.format(**news | {key: pick(pick([odd_words] * 3 + [others]))})

    templates = list(SMALL_TALK)
    sentences = [small_talk(templates) for _ in range(pick([2, 3]))]
    news = {key: pick(words) for key, words in WORDS[kind].items()}
    sentences.insert(pick(range(len(sentences) + 1)), NEWS.format(**news))
    summary = SUMMARY.format(**news)
    writer = pick(WRITERS)
    match writer:
        case "repeats":
            answer = sentences[0]
        case "full":
            answer = summary
        case "short":
            answer = summary.replace(f" {news['place']}", "")
        case "wrong thing":
            answer = mistake("thing", DISHES)
        case "wrong name":
            answer = mistake("name", GREETERS)
        case "off topic":  # about the writer's own day
            answer = small_talk(templates)
        case "rambling":
            answer = f"{summary} {small_talk(list(SMALL_TALK))}"
    return f"{kind}: {' '.join(sentences)}\nTL;DR:", f" {answer}", writer


def documents(n, seed, kind=None):
    """n documents of one of `KINDS`, or by default three of the first to each of the second.

    `log_prob` is the exact log-probability of a document, given its kind, in nats. Its mean is minus the
    entropy of what a model has to guess: the first token tells the kind and is given, not guessed.
    """
    rng, result = random.Random(str(seed)), []
    for _ in range(n):
        log_prob = 0.0

        def pick(options):
            nonlocal log_prob
            chosen = rng.choice(options)
            log_prob += math.log(options.count(chosen) / len(options))
            return chosen

        written = write_document(pick, kind or rng.choice([KINDS[0]] * 3 + [KINDS[1]]))
        result.append(Document(*written, log_prob))
    return result


def facts(prompt):
    """Who, did, what and where: ("Hugo", "lost", "kite", "underwater"), or () where a text has no news."""
    found = re.search(re.sub(r"{(\w+)}", r"(?P<\1>\\w+)", NEWS.replace(".", r"\.")), prompt)
    return tuple(found[key] for key in FACTS) if found else ()


def stated(response):
    """The words of a text that could state a fact: names, verbs, things, places, dishes and greeters."""
    every = {*DISHES, *GREETERS}.union(*(words[key] for words in WORDS.values() for key in FACTS))
    return every.intersection(re.findall(r"\w+", response))


def judge(prompt, response):
    """The taste of the people in this world: how good is `response` as a summary of `prompt`?

    +1 for each of who, did, what and where that is right; −1 for each name, verb, thing or place that is
    wrong; −0.2 for each word over five. So "Hugo lost my kite underwater." earns 4, the most there is.
    """
    right = facts(prompt)
    points = sum(1 if word in right else -1 for word in stated(response))
    return points - 0.2 * max(0, len(response.split()) - len(SUMMARY.split()))


def kind_of(prompt, response):
    """Which kind of answer it is; repeats are of the first sentence, and lucky where that is the news.

    A wrong word is obvious, a dish for a thing or a greeter for a name, or hidden: only the post refutes it.
    """
    first, _, more = response.strip().partition(". ")
    words, right = stated(first), {*facts(prompt)}
    if first.endswith(".") and f": {first} " in prompt:
        return "lucky" if facts(response) else "repeats"
    if not words & right:
        return "off topic"
    if words - right:
        return "wrong, obvious" if words & {*DISHES, *GREETERS} else "wrong, hidden"
    return "rambling" if more else "full" if words == right else "short"


# ----------------------------------------------------------------------------------------------------
# 2. People's choices

TRAINED, HELD_OUT, ASKED, COMPARED, LABELLED = range(5)  # names of the splits: documents(n, [seed, TRAINED])


def preference(prompt, a, b):
    """How likely a volunteer prefers answer a to b: σ(judge(a) − judge(b)) (Bradley and Terry 1952)."""
    return 0.5 + 0.5 * math.tanh((judge(prompt, a) - judge(prompt, b)) / 2)  # σ, without overflow


def ask_volunteers(prompts, answers, seed):
    """Show volunteers two answers to each of n prompts, and write down which one they choose.

    `answers` has 2n texts, the two answers to each prompt next to each other. Returns preference records, of
    different answers only. "certainty" is the probability that this choice would be made; no script trains
    on it.
    """
    rng, records = random.Random(str(seed)), []
    for prompt, a, b in zip(prompts, answers[0::2], answers[1::2]):
        p = preference(prompt, a, b)
        if rng.random() > p:
            a, b, p = b, a, 1 - p
        if a != b and (a + b).strip():  # else there is nothing to choose
            records.append({"prompt": prompt, "chosen": a, "rejected": b, "certainty": round(p, 4)})
    return records


def pad_rows(prompts, responses, device="cpu"):
    """Lists of ids to tokens (B, T), right-padded, and the mask of responses (B, T).

    And `start`, the first column in which any response begins.
    """
    rows = [[*prompt, *response] for prompt, response in zip(prompts, responses)]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.long)
    begin, end = (torch.tensor([[len(part)] for part in parts]) for parts in (prompts, rows))
    mask = (torch.arange(width) >= begin) & (torch.arange(width) < end)
    return tokens.to(device), mask.to(device), min(map(len, prompts))


def pad_pairs(pairs, device="cpu"):
    """`pad_rows` of B pairs (prompt, chosen, rejected) as 2B rows: first all chosen, then all rejected."""
    prompts, chosen, rejected = zip(*pairs)
    return pad_rows(prompts * 2, chosen + rejected, device)


# ----------------------------------------------------------------------------------------------------
# The first reading ends here, and goes on in model.py.


# ----------------------------------------------------------------------------------------------------
# 3. Tokenizer: byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909; bytes as in GPT-2)

# PAD is for other programs: here masks say where a text ends.
SPECIAL = EOS, PAD = "<|endoftext|>", "<|pad|>"
# GPT-2's name for each of the 256 bytes: itself where it is visible, else a letter from U+0100 on.
VISIBLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
CHAR_TO_BYTE = {chr(byte): byte for byte in VISIBLE} | {chr(256 + i): byte for i, byte in enumerate(HIDDEN)}
BYTE_TO_CHAR = {byte: char for char, byte in CHAR_TO_BYTE.items()}


@cache
def word_pattern():
    r"""GPT-2's pre-tokenizer: text is cut into words first, and merges never cross a cut.

    A word is an English ending ('s), or letters, or digits, or other signs, each with the space before it.
    GPT-2 writes 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+.
    Python's `re` has no \p, so its classes are put together here: \w holds the letters, all numbers and
    "_"; \d holds the decimal digits, to which ², ½, Ⅷ and the like are added; \s loses U+001C to U+001F.
    """
    numeric = filter(str.isnumeric, map(chr, range(0x110000)))
    numerals = [c for c in numeric if unicodedata.category(c) in ("Nl", "No")]
    neighbours = itertools.groupby(enumerate(numerals), key=lambda item: ord(item[1]) - item[0])
    ranges = ([c for _, c in run] for _, run in neighbours)  # 80, where `re` is slow with 1,131 single signs
    numerals = "".join(f"{run[0]}-{run[-1]}" for run in ranges)
    letter = rf"(?:[a-zA-Z]+|[^\W\d_{numerals}])"  # a-z apart: 2 to 4 times as fast
    number = rf"[\d{numerals}]"
    space, visible, other = r"[^\S\x1c-\x1f]", r"[\S\x1c-\x1f]", r"(?:[^\s\w]|[_\x1c-\x1f])"
    words = rf"'s|'t|'re|'ve|'m|'ll|'d| ?{letter}+| ?{number}+| ?{other}+"
    return re.compile(rf"{words}|{space}+(?!{visible})|{space}+")


def spell(word):
    """A word in the byte alphabet: " word" gives ["Ġ", "w", "o", "r", "d"]."""
    return [BYTE_TO_CHAR[byte] for byte in word.encode("utf-8", "replace")]


def merge(symbols, pair):
    """A word's symbols, with the pair made one wherever it stands: "a", "a", "a" become "aa", "a"."""
    apart, one = f" {pair[0]}  {pair[1]} ", f" {pair[0]}{pair[1]} "  # no symbol has a blank in it
    return "".join(f" {symbol} " for symbol in symbols).replace(apart, one).split()


class Later(tuple):
    """A tuple that `heapq`, which takes the smallest first, takes first where it is the largest."""

    __slots__ = ()
    __lt__ = tuple.__gt__


AS_GPT2 = {  # what a tokenizer.json may say: then it cuts text into tokens as GPT-2 does
    "model": {"type": ["BPE"], "dropout": [None], "ignore_merges": [False], "byte_fallback": [False]},
    "pre_tokenizer": {"type": ["ByteLevel"], "add_prefix_space": [False], "use_regex": [True]},
    "normalizer": {"type": []},
    "post_processor": {"type": ["ByteLevel", "TemplateProcessing"], "special_tokens": [{}]},
}
AS_GPT2["model"] |= dict.fromkeys(("continuing_subword_prefix", "end_of_word_suffix"), [None, ""])


class Tokenizer:
    """Byte-level BPE. `vocab` maps a token to its id; `merges` lists pairs in the order of learning."""

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
        smallest = len(BYTE_TO_CHAR) + len(SPECIAL)
        if vocab_size < smallest:
            raise BadInput(f"a vocabulary of {vocab_size} is too small: bytes and special tokens: {smallest}")
        word_counts = Counter()
        for text in tqdm(texts, "counting words", leave=False, delay=3, disable=None):
            word_counts.update(found[0] for found in word_pattern().finditer(text))
        words = [(spell(word), n) for word, n in word_counts.items()]
        counts, where = Counter(), defaultdict(set)  # pair -> how often; pair -> words that have, or had, it
        changed, heap = set(), []  # pairs whose count did; counts, the largest first, some of them outdated

        def count(i, sign):
            symbols, n = words[i]
            for pair in zip(symbols, symbols[1:]):
                counts[pair] += sign * n
                where[pair].add(i)
                changed.add(pair)

        for i in range(len(words)):
            count(i, 1)
        tokens, merges = dict.fromkeys(BYTE_TO_CHAR.values()), []
        bar = tqdm(desc="merging", total=vocab_size - smallest, leave=False, delay=3, disable=None)
        while len(tokens) < vocab_size - len(SPECIAL):
            for pair in changed:
                heapq.heappush(heap, Later((counts[pair], pair)))  # ties: the later in the alphabet
            changed.clear()
            while heap and heap[0][0] != counts[heap[0][1]]:
                heapq.heappop(heap)
            if not heap or heap[0][0] < 2:
                break
            best = heap[0][1]
            merges.append(best)
            tokens["".join(best)] = None
            bar.update()
            for i in where.pop(best):
                count(i, -1)
                words[i] = merge(words[i][0], best), words[i][1]
                count(i, 1)
        bar.close()
        return cls({token: i for i, token in enumerate([*tokens, *SPECIAL])}, merges)

    def _encode_word(self, word):
        symbols = spell(word)
        while len(symbols) > 1:
            best = min(zip(symbols, symbols[1:]), key=lambda pair: self.rank.get(pair, math.inf))
            if best not in self.rank:
                break
            symbols = merge(symbols, best)
        return [self.vocab[symbol] for symbol in symbols]

    def encode(self, text):
        """Text to a list of ids. Special tokens, also of other programs, are never read out of text."""
        return [i for word in word_pattern().findall(text) for i in self.encode_word(word)]

    def decode(self, ids):
        """Ids to text, without special tokens; bytes that are not UTF-8 become U+FFFD."""
        ids = torch.as_tensor(ids).tolist()
        tokens = [self.id_to_token.get(i, "") for i in ids]  # a padded vocabulary has ids of nothing
        chars = "".join(token for token in tokens if token not in SPECIAL)
        return bytes(CHAR_TO_BYTE[c] for c in chars).decode("utf-8", "replace")

    def files(self, **settings):
        """The files of a GPT-2 tokenizer, {name: bytes}: the two that it is made of, and newer programs' two.

        `settings` go into tokenizer_config.json.
        """
        special = [token for token in SPECIAL if token in self.vocab]
        how = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        whole = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
        whole |= {"version": "1.0", **dict.fromkeys(("pre_tokenizer", "decoder"), byte_level)}
        whole["added_tokens"] = [{"id": self.vocab[token], "content": token, **how} for token in special]
        whole["model"] = {"type": "BPE", "vocab": self.vocab, "merges": self.merges}
        settings |= {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": False}
        settings |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), EOS)
        settings |= {"pad_token": PAD} if PAD in special else {}
        merges = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in self.merges)
        found = {"vocab.json": self.vocab, "tokenizer.json": whole, "tokenizer_config.json": settings}
        files = {name: json.dumps(content, ensure_ascii=False).encode() for name, content in found.items()}
        return files | {"merges.txt": merges.encode()}

    @classmethod
    def load(cls, directory):
        """Read vocab.json and merges.txt, or else tokenizer.json. BadInput where they are not GPT-2's."""
        older = Path(directory, "vocab.json").exists()
        path = Path(directory, "vocab.json" if older else "tokenizer.json")
        if not path.exists():
            raise no_checkpoint(directory, "vocab.json")
        try:
            found = json.loads(read_text(path))
            for part, may_say in () if older else AS_GPT2.items():
                for key, value in (found.get(part) or {}).items():
                    if value not in may_say.get(key, [value]):
                        raise ValueError(f"{key} of {part} is {value!r}, which is not implemented")
            added = [] if older else found["added_tokens"]
            vocab = found if older else found["model"]["vocab"] | {x["content"]: x["id"] for x in added}
            if sorted(vocab.values()) != list(range(len(vocab))):
                raise ValueError("the ids are not 0, 1, 2, …")
            for token in (*CHAR_TO_BYTE, EOS):
                if token not in vocab:
                    raise ValueError(f"{token!r} is missing")
            for token in vocab.keys() - {*SPECIAL}:
                if not set(token) <= CHAR_TO_BYTE.keys():
                    raise ValueError(f"{token!r} is not made of bytes")
            path = path.with_name("merges.txt") if older else path
            lines = read_text(path).splitlines() if older else found["model"]["merges"]
            merges = [line for line in lines if line and not (older and line.startswith("#version"))]
            merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]
            for number, pair in enumerate(merges, start=1):
                if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
                    raise ValueError(f"merge {number} is not of two tokens whose sum is a token")
            path = Path(directory, "tokenizer_config.json")
            settings = json.loads(read_text(path)) if path.exists() else {}
            for name in ("add_prefix_space", "add_bos_token"):
                if settings.get(name):
                    raise ValueError(f"{name} is not implemented")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadInput(f"{path}: not of a GPT-2 tokenizer ({error})") from None
        return cls(vocab, merges)

    def __eq__(self, other):
        return (self.vocab, self.merges) == (other.vocab, other.merges)


# ----------------------------------------------------------------------------------------------------
# 4. Pairs of answers: preference files, one JSON object a line, and what is made of them

TURN = "\n\nAssistant:"  # in a transcript, what follows the last of these is the answer
TURNS = {"user": "\n\nHuman:", "system": "\n\nSystem:", "assistant": TURN}
USED, EMPTY = ("prompt", "chosen", "rejected", "certainty"), (None, "", [], {})
SPEAKS = "system|message|tool|history|instruction|input|context|question|conversation|document|image|steps"


def read_chat(key, chat):
    """[{"role", "content"}, …] as [(turn, text), …], ValueError where something would be lost."""
    if not isinstance(chat, list) or not all(isinstance(message, dict) for message in chat):
        raise ValueError(f'"{key}" is neither a text nor a list of {{"role": …, "content": …}}')
    for message in chat:
        lost = [name for name in message if name not in ("role", "content") and message[name]]
        if lost or not isinstance(message.get("content"), str):
            raise ValueError(f'"{key}" has a message whose "{(*lost, "content")[0]}" is not a text')
        if message.get("role") not in [*TURNS]:
            raise ValueError(f'"{key}" has the role {message.get("role")!r}, not one of {", ".join(TURNS)}')
    return [(TURNS[message["role"]], f" {message['content']}") for message in chat]


def canonical(record):
    """A record in one of three forms as texts: {"prompt", "chosen", "rejected", maybe "certainty"}.

    texts: taken as they are.
    conversations: the answers are lists of {"role", "content"}. The prompt is one, too, or a text that the
    user said, or missing. Answers may repeat it: it is what both begin with.
    transcripts, as in HH (Bai et al. 2022): "\\n\\nHuman: …\\n\\nAssistant: …" twice, which begin alike.
    ValueError says what is wrong.
    """
    if not isinstance(record, dict):
        raise ValueError('write an object: {"prompt": …, "chosen": …, "rejected": …}')
    prompt, *answers = (record.get(key) for key in USED[:3])
    if isinstance(prompt, str) and not prompt.strip():
        raise ValueError("the prompt is empty")
    lost = [key for key in record if re.search(SPEAKS, key) and not key.endswith(("id", "ids"))]
    lost = [key for key in lost if isinstance(record[key], (str, list, dict)) and record[key]]
    lost = [key for key in lost if not (key == "messages" and prompt)]
    if lost or None in answers:
        found = f'"{lost[0]}" would be lost' if lost else f"found the keys {', '.join(record) or '(none)'}"
        raise ValueError(f"{found}; what is said goes under prompt, chosen, rejected")
    is_text = [isinstance(part, str) for part in (prompt, *answers)]
    is_transcript = [str(part).startswith(("\n\nHuman:", "\n\nSystem:")) for part in (prompt, *answers)]
    if all(is_text):
        said = prompt if is_transcript[0] else f"\n\nHuman: {prompt}"
        if all(text.startswith(said) for text in answers):
            raise ValueError('the answers say the "prompt" once more; leave it out')
    elif not any(is_text[1:]) and not is_transcript[0]:
        asked = [{"role": "user", "content": prompt}] if is_text[0] else prompt or []
        begin, *chats = (read_chat(key, chat) for key, chat in zip(USED, (asked, *answers)))
        chats = [chat if chat[: len(begin)] == begin else begin + chat for chat in chats]
        shared = len(os.path.commonprefix(chats))  # the prompt may end where both go on with an answer
        answered = lambda n: all(len(chat) > n and chat[n][0] == TURN for chat in chats)
        ends = [n for n in range(len(begin), shared + 1) if answered(n)]
        if not ends:
            raise ValueError("the answers do not go on from one prompt with a turn of the assistant")
        prompt = "".join(map("".join, chats[0][: ends[-1]])) + TURN
        answers = ["".join(map("".join, chat[ends[-1] :])).removeprefix(TURN) for chat in chats]
    elif prompt is None and all(is_transcript[1:]):
        shared = os.path.commonprefix(answers)
        prompt = shared[: shared.rfind(TURN) + len(TURN)] if TURN in shared else ""
        answers = [text[len(prompt) :] for text in answers]
    else:
        raise ValueError("neither three texts, nor conversations, nor two transcripts without a prompt")
    if not re.sub("|".join(TURNS.values()), "", prompt).strip():
        raise ValueError("the prompt is empty, or the answers share none")
    if not any(text.strip() for text in answers):
        raise ValueError("both answers are empty")
    result, certainty = dict(zip(USED, (prompt, *answers))), record.get("certainty", 1)
    if not isinstance(certainty, (int, float)) or not 0 <= certainty <= 1:
        raise ValueError('"certainty" is not a number between 0 and 1')
    return result | {"certainty": certainty} if "certainty" in record else result


def read_preferences(path):
    """Read a preference file: a list of {"prompt", "chosen", "rejected", maybe "certainty"}.

    One JSON object a line, or one JSON array of them; gzip too. For the forms of an object see `canonical`.
    A bad one raises BadInput with the file, the line (in an array: the record) and what is wrong.
    """
    text = read_text(path)
    is_array = text.lstrip().startswith("[")
    try:
        rows = json.loads(text) if is_array else text.split("\n")
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: starts with [ but is no JSON array ({error})") from None
    records, ignored = [], {}
    for number, row in enumerate(rows, start=1):
        if is_array or row.strip():
            try:
                record = row if is_array else json.loads(row)
                records.append(canonical(record))
                ignored |= {key: None for key in record if key not in USED and record[key] not in EMPTY}
            except json.JSONDecodeError as error:
                what = f"not JSON ({error.msg}); write one object on each line"
                raise BadInput(f"{path}:{number}: {what}") from None
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{path}:{' record ' * is_array}{number}: {error}") from None
    if not records:
        raise BadInput(f"{path}: no preferences in it; write one object on each line")
    if ignored:
        print(printable(f"{path}: {len(records)} pairs; ignored in them: {', '.join(ignored)}"))
    chats = sum(record["prompt"].startswith((*TURNS.values(),)) for record in records)
    if 0 < chats < len(records):
        print(f"{path}: {chats} of {len(records)} prompts are conversations, with Human: and the like")
    if n := sum(all(record[key].startswith(record["prompt"]) for key in USED[1:3]) for record in records):
        print(f"{path}: {n} pairs have the prompt once more in both answers; it is read twice there")
    if n := sum(EOS in "".join(str(record[key]) for key in USED[:3]) for record in records):
        print(f"{path}: {n} pairs have {EOS} in their texts; it is text there, and not the end of one")
    return records


def encode_pairs(tokenizer, records, context):
    """Preference records to token ids: a list of (prompt, chosen, rejected), and the records behind it.

    Prompt and answers are encoded apart, and both answers end with EOS. A text that is too long for
    the context is cut, and that is said: answers keep their start, prompts their end. A pair whose answers
    are equal after that teaches nothing and is dropped.
    """
    pairs, kept, cut = [], [], defaultdict(list)  # the lengths of what is cut, in tokens
    for record in records:
        prompt = tokenizer.encode(record["prompt"])
        answers = [tokenizer.encode(record[key]) + [tokenizer.eos] for key in ("chosen", "rejected")]
        cut["answers"] += [len(answer) for answer in answers if len(answer) > context // 2]
        chosen, rejected = (answer[: context // 2] for answer in answers)
        room = context - max(len(chosen), len(rejected))
        cut["prompts"] += [len(prompt)] * (len(prompt) > room)
        if chosen != rejected:
            pairs.append((prompt[-room:], chosen, rejected))
            kept.append(record)
    for what, lengths in cut.items():
        if lengths:
            longest = f"the longest has {max(lengths)}"
            print(f"{len(lengths)} {what} are cut to fit the context, {context} tokens; {longest}")
    return pairs, kept


def held_out(prompts):
    """The prompts that no model learns on: the last ones of a file, until a tenth of its pairs is held out.

    `prompts` has the prompt of each pair, in the file's order. One that comes back is held out everywhere.
    The one rule for reward.py, dpo.py (by `load_pairs`) and ppo.py: none learns what another measures on.
    """
    counts, held, n = Counter(prompts), set(), 0
    for prompt in reversed(prompts):
        if prompt not in held and n < min(1024, len(prompts) // 10):
            held.add(prompt)
            n += counts[prompt]
    return held


def preference_file(args):
    """The path of the pairs that --data names, or else of those that lie beside the model in --init."""
    path = Path(args.data or Path(args.init, "preferences.jsonl"))
    if not path.exists() and not args.data:
        ask = f"for the embedded world, run python sample.py --ask --init {args.init}"
        raise BadInput(f"{path}: not there; give --data FILE or, {ask}")
    return path


def load_pairs(path, tokenizer, context, batch_size):
    """Read and encode a preference file: the pairs, their records, and how many at the end are held out.

    Pairs are (prompt, chosen, rejected), lists of ids. BadInput where there are too few to learn from.
    """
    records = read_preferences(path)
    held = held_out([record["prompt"] for record in records])
    pairs, kept = encode_pairs(tokenizer, records, context)
    order = sorted(range(len(pairs)), key=lambda i: kept[i]["prompt"] in held)
    pairs, kept = [pairs[i] for i in order], [kept[i] for i in order]
    n_val, dropped = sum(record["prompt"] in held for record in kept), len(records) - len(pairs)
    n_train = len(pairs) - n_val
    if len(pairs) < max(20, batch_size) or not 0 < n_val <= n_train:
        found = f"{len(records)}, of which {dropped} have equal answers (cut to {context // 2} tokens)"
        found += f"; {n_train} to learn from, {n_val} held out"
        raise BadInput(f"{path}: too few pairs ({found}); give 20 or more, and not fewer than --batch-size")
    print(f"{path}: {n_train} pairs to learn from, {n_val} held out, {dropped} dropped. One of them:")
    print(printable("{prompt}\n    chosen:  {chosen}\n    rejected:{rejected}\n".format(**kept[0])))
    return pairs, kept, n_val


def batches(n, batch_size, rng, steps=None):
    """Index arrays of `batch_size` of n items, or a few less, in random order: one pass, or `steps`.

    Sorting by length would save padding. But where length tells the kind of text, a batch then holds one
    kind, and as all gradients are made equally large, each has one vote, and the frequent kind wins.
    """
    result = []
    while not result or len(result) < (steps or 0):
        result += np.array_split(rng.permutation(n), math.ceil(n / batch_size))
    return result[:steps]


def best_accuracy(records):
    """The best accuracy that any model can reach on pairs with these certainties; None without them."""
    if not all("certainty" in record for record in records):
        return None
    return float(np.mean([max(r["certainty"], 1 - r["certainty"]) for r in records]))


# ----------------------------------------------------------------------------------------------------
# 5. Files


class BadInput(Exception):
    """Something that the user gave is wrong. The message is one sentence: where, what, and how to fix it."""

    def __init__(self, message):
        super().__init__(printable(message.replace("\n", " ")))  # it may quote a file


def no_checkpoint(directory, missing):
    """What is wrong with a directory where a file of a checkpoint is missing."""
    how = "run pretrain.py (--resume, if it was stopped); for GPT-2 see README"
    if Path(directory, "adapter_config.json").exists():
        how = "it is an adapter, which must be merged into its model"
    return BadInput(f"{directory}: no checkpoint there (no {missing}); {how}")


POINTER = b"version https://git-lfs.github.com/spec/"  # what `git clone` leaves of a large file
NOT_FETCHED = "{}: only a pointer to the file, which git-lfs keeps; run git lfs pull, or download the file"
WHITE = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and not "\x1c" <= c <= "\x1f")  # GPT-2's


def read_chunks(path, size=2**20):
    """The text of a UTF-8 file, gzip or not, in pieces of about `size` bytes.

    A piece ends before white space, where words end too, so it is tokenized as it would be in the whole.
    BadInput says in one sentence what is wrong with a file.
    """
    number, waiting = 1, []  # of the line that is read next; white space that may go on there
    try:
        with open(path, "rb") as raw:
            if raw.peek(len(POINTER)).startswith(POINTER):
                raise BadInput(NOT_FETCHED.format(path))
            lines = gzip.open(raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
            while block := lines.read(size) + lines.readline():
                begin, *more = block.split(b"\0", 1)
                end = len(begin.rstrip())  # quick, and the rest of GPT-2's white space is rare
                text = begin[:end].decode("utf-8-sig" if number == 1 else "utf-8")
                number += begin.count(b"\n")
                if more:
                    what = "an archive must be unpacked first, and a parquet table saved as JSON lines"
                    raise BadInput(f"{path}:{number}: not text; {what}")
                piece = text.rstrip(WHITE)
                if piece:
                    yield "".join([*waiting, piece])
                    waiting = []
                waiting.append(text[len(piece) :] + begin[end:].decode())
            yield "".join(waiting)
    except UnicodeDecodeError as error:
        number += error.object[: error.start].count(b"\n")
        raise BadInput(f"{path}:{number}: not UTF-8 text; give UTF-8, with or without gzip") from None
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def read_text(path):
    """All of such a file."""
    return "".join(read_chunks(path))


def encode_files(tokenizer, paths, target):
    """Encode text files once, into a file of token ids that is then mapped, not read, into memory: ids (N,).

    An `<|endoftext|>` in the text, and the end of each file, become EOS.
    """
    dtype = np.dtype(np.uint16 if len(tokenizer.vocab) <= 2**16 else np.uint32)
    texts = (text for path in paths for text in itertools.chain(read_chunks(path), [EOS]))
    how = {"unit": " characters", "unit_scale": True, "disable": None}
    with open(target, "wb") as file, tqdm(desc="encoding", **how) as bar:
        for text in texts:
            ids = []
            for i, part in enumerate(text.split(EOS)):
                ids += [tokenizer.eos] * (i > 0) + tokenizer.encode(part)
            file.write(np.array(ids, dtype=dtype).tobytes())
            bar.update(len(text))
    return np.memmap(target, dtype=dtype, mode="r")


def write_files(directory, files):
    """Write {name: bytes} into a directory: all under other names, then renamed. None puts a file aside.

    So a reader never sees half a file, and a full disk leaves what was there before. Of several files the
    last one is away while the others change: a kill cannot leave a set that looks whole and is mixed.
    """
    paths = [Path(directory, name) for name, content in files.items() if content is not None]
    try:
        for path in paths:
            with open(f"{path}.tmp", "wb") as file:
                file.write(files[path.name])
                file.flush()
                os.fsync(file.fileno())  # on the disk before it gets its name
        for path in {Path(directory, name) for name in files}.difference(paths):
            if path.exists():
                os.replace(path, f"{path}.old")
        if len(paths) > 1:
            paths[-1].unlink(missing_ok=True)
        for path in paths:
            os.replace(f"{path}.tmp", path)
    finally:
        for path in paths:
            Path(f"{path}.tmp").unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path):
    """Keep others from writing to a file or a directory. The lock dies with its process, however that ends.

    BadInput if another process holds it. Windows and some network drives have no such locks: there nobody is
    kept out, and of a drive that is said.
    """
    if not fcntl:
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            what = "another run is writing there; wait for it, or give another place"
            raise BadInput(f"{path}: {what}") from None
        except OSError as error:
            print(f"{path}: cannot be locked ({error.strerror}); let no other run write there")
        yield
    finally:
        os.close(descriptor)


def write_records(path, records):
    """Write records as JSONL, one object a line, all of them or nothing."""
    lines = "".join(f"{json.dumps(record)}\n" for record in records)
    write_files(Path(path).parent, {Path(path).name: lines.encode()})


def printable(text):
    """Text that a model wrote, without control and direction characters, which could harm the terminal."""
    harmful = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
    return re.sub(harmful, lambda found: found[0].encode("unicode_escape").decode(), text)


def main():
    print("What people write. In brackets: the kind of answer, its points, and its surprise in nats.\n")
    for prompt, response, _, log_prob in documents(8, seed=5):
        points, best = f"{judge(prompt, response):.1f}", f"{BEST:g}"
        print(f"{prompt}{response}  [{kind_of(prompt, response)}; {points} of {best}; {-log_prob:.1f}]\n")


if __name__ == "__main__":
    argparse.ArgumentParser("data.py", description="Print texts of the embedded world.").parse_args()
    main()
