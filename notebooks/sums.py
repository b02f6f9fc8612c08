"""Your own task in forty lines: all of this file takes the place of section 1 of data.py.

Four digits are to be added, and the last number of an answer counts. Most people guess, some waver, and some
write the running totals down before they say what comes out:

    Sum: 8+4+6+9= 25                three writers in five guess, within three: one guess in seven is right
    Sum: 8+4+6+9= 25 or 28 or 26    one in ten wavers between two, three or four guesses
    Sum: 8+4+6+9= 12 18 27          three in ten write running totals, and those are right

    python notebooks/world.py notebooks/sums.py runs/sums

makes a folder of the scripts with this world in it, and says how to go on. For a task of your own copy this
file and write `documents`, `judge`, `kind_of` and the first three constants anew. The scripts use no others.
"""

import math
import random
import re
from collections import namedtuple

KINDS = ("sum", "sum")  # first the kind that people judge, then one that nobody does; here they are the same
BEST = 1  # the highest score that the judge gives
MAX_ANSWER_TOKENS = 16  # the longest answer that these writers give is shorter
MOST = 4  # between how many guesses one wavers, at most

Document = namedtuple("Document", "prompt response writer log_prob")


def documents(n, seed, kind=None):
    """n prompts with an answer, who wrote it, and log p(prompt, answer) in nats: no loss can be lower."""
    rng, result = random.Random(str(seed)), []
    for _ in range(n):
        a, b, c, d = (rng.randrange(10) for _ in range(4))
        writer = rng.choice(["guesses"] * 6 + ["wavers"] + ["totals"] * 3)
        if writer == "totals":
            numbers, p, between = [a + b, a + b + c, a + b + c + d], 0.3, " "
        else:
            k = 1 if writer == "guesses" else rng.randint(2, MOST)
            numbers, between = [a + b + c + d + miss for miss in rng.sample(range(-3, 4), k)], " or "
            p = (0.6 if k == 1 else 0.1 / (MOST - 1)) / math.perm(7, k)
        answer = f" {between.join(map(str, numbers))}"
        result.append(Document(f"Sum: {a}+{b}+{c}+{d}=", answer, writer, math.log(p / 10**4)))
    return result


def judge(prompt, response):
    """1 where the last word is the sum, else 0. Nobody's taste: it can be checked."""
    return float(response.split()[-1:] == [str(sum(map(int, re.findall(r"\d", prompt))))])


def kind_of(prompt, response):
    """What sort of answer it is, and whether it is right."""
    form = "wavers" if "or" in response else "guess" if len(response.split()) < 2 else "totals"
    return f"{form}, {'right' if judge(prompt, response) else 'wrong'}"
