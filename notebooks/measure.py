"""How a policy is measured in notebooks 04 and 05: by listing what it may say.

This model is small enough for that. `list_answers` follows every beginning of an answer that is likelier than
3e-5, and comes to about 97% of all answers, with their exact probabilities. Score, KL and the
optimum at that KL are sums over that list, scaled to 100%. So no sampling error is left but that of the 64
posts, and as each seed has posts of its own, the spread over seeds counts both.
"""

import contextlib
import io
import json
import math
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import numpy as np  # noqa: E402
import torch  # noqa: E402

import dpo  # noqa: E402
import ppo  # noqa: E402
import pretrain  # noqa: E402
import reward  # noqa: E402
import sample  # noqa: E402
from data import MAX_ANSWER_TOKENS, Tokenizer, documents, judge, kind_of, pad_rows  # noqa: E402
from model import Cache, final_scores, load_model, sample_texts  # noqa: E402
from plots import KINDS  # noqa: E402

SCRIPTS = {"pretrain": pretrain, "dpo": dpo, "reward": reward, "ppo": ppo}
RUNS = HERE.parent / "runs/race"
POSTS = 64
BETA_GRID = np.geomspace(1e3, 0.05, 80)  # from large to small, as the optimum's KL grows


def home_of(seed, name):
    """The directory of a run."""
    return RUNS / str(seed) / name.replace(" ", "-")


def train(script, seed, name, *options):
    """Run a script with its defaults and these options, unless it has run; the figures of its end."""
    out = home_of(seed, name)
    if not (out / "metrics.jsonl").exists():
        init = [] if script == "pretrain" else ["--init", home_of(seed, "pretrain")]
        words = [str(word) for word in (*init, "--out", out, "--seed", seed, *options)]
        (out / "resume.pt").unlink(missing_ok=True)  # of a race that was stopped
        with contextlib.redirect_stdout(io.StringIO()):
            SCRIPTS[script].main(SCRIPTS[script].parser.parse_args(words))
    final = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    wanted = ("val_loss", "val_accuracy", "best_accuracy", "entropy", "reward")
    figures = {key: final[key] for key in wanted if key in final}
    return figures | {"training_seconds": final["seconds"]}


def pretrained(seed):
    """The pretrained model of a seed and the pairs of its own answers, both made if missing."""
    figures, home = train("pretrain", seed, "pretrain"), home_of(seed, "pretrain")
    if not (home / "preferences.jsonl").exists():
        ask(home, seed)
    return figures


def ask(home, seed, n=16000):
    """Pairs of a model's own answers, as `sample.py --ask` writes them."""
    with contextlib.redirect_stdout(io.StringIO()):
        words = ["--ask", str(n), "--init", str(home), "--seed", str(seed)]
        sample.main(sample.parser.parse_args(words))


@torch.no_grad()
def list_answers(model, reference, prompt, eos, temperature=1.0, floor=3e-5):
    """The answers that are likelier than `floor`, as lists of ids with EOS, and two arrays (N,).

    These are their log-probabilities under the model, at that temperature, and under the reference.
    """
    caches = [Cache(model.config) for _ in range(2)]
    hidden = [m.transformer(torch.tensor([prompt]), c)[:, -1] for m, c in zip((model, reference), caches)]
    tokens, so_far = torch.zeros(1, 0, dtype=torch.long), [torch.zeros(1, 1)] * 2
    answers, found = [], []
    for _ in range(MAX_ANSWER_TOKENS):
        logits = model.head(hidden[0]) / temperature, reference.head(hidden[1])
        log_probs = [x.log_softmax(-1) + before for x, before in zip(logits, so_far)]  # (beginnings, V) each
        likely = log_probs[0] > math.log(floor)
        ended = likely[:, eos].nonzero().flatten()
        answers += [[*row, eos] for row in tokens[ended].tolist()]
        found.append(torch.stack([x[ended, eos] for x in log_probs]))
        likely[:, eos] = False
        rows, new = likely.nonzero(as_tuple=True)
        if not len(rows):
            break
        tokens = torch.cat([tokens[rows], new[:, None]], dim=1)
        so_far = [x[rows, new, None] for x in log_probs]
        for cache in caches:
            cache.take(rows)
        hidden = [m.transformer(new[:, None], c)[:, -1] for m, c in zip((model, reference), caches)]
    return answers, *torch.cat(found, dim=1).double().numpy()


def softmax(logs):
    w = np.exp(logs - logs.max())
    return w / w.sum()


def divergence(w, p):
    """KL(w ‖ p) in nats."""
    return (w * np.log(np.maximum(w, 1e-300) / p)).sum()


class Reference:
    """A seed's pretrained model on its posts of one kind, and the best that any policy could do there.

    `judge` is the taste by which answers are scored. Another model may be named by its directory, `home`.
    """

    def __init__(self, seed, kind="POST", judge=judge, home=None, posts=POSTS):
        self.posts = [d.prompt for d in documents(posts, seed=[seed, 9], kind=kind)]
        kept = None if home else home_of(seed, "pretrain") / f"listed-{kind}.json"
        home = home or home_of(seed, "pretrain")
        self.model, self.tokenizer, self.judge = load_model(home), Tokenizer.load(home), judge
        self.prompts = [self.tokenizer.encode(post) for post in self.posts]
        if kept and kept.exists():
            found = json.loads(kept.read_text())
        else:
            found = [list_answers(self.model, self.model, x, self.tokenizer.eos)[:2] for x in self.prompts]
            found = [(answers, log_p.tolist()) for answers, log_p in found]
        if kept and not kept.exists():
            kept.write_text(json.dumps(found))
        self.answers, log_p = map(list, zip(*found))
        self.texts = [[self.tokenizer.decode(answer) for answer in some] for some in self.answers]
        self.p = [softmax(np.array(some)) for some in log_p]  # scaled to sum 1
        self.scores = self.judged(judge)
        self.start = np.mean([p @ s for p, s in zip(self.p, self.scores)])
        grid = [self.ideal(self.scores, beta) for beta in BETA_GRID]
        self.frontier = np.array([[self.kl(w), self.mean(w, self.scores)] for w in grid])  # (80, 2)

    def judged(self, judge):
        """What a taste says of each listed answer, post by post."""
        return [np.array([judge(post, x) for x in some]) for post, some in zip(self.posts, self.texts)]

    def kl(self, weights):
        """From the reference, of a policy that gives these weights to the listed answers."""
        return np.mean([divergence(w, p) for w, p in zip(weights, self.p)])

    def mean(self, weights, values):
        return np.mean([w @ x for w, x in zip(weights, values)])

    def kinds(self, weights):
        """The share of each kind of answer in such a policy."""
        kinds = dict.fromkeys(KINDS, 0.0)
        for post, texts, w in zip(self.posts, self.texts, weights):
            for text, share in zip(texts, w):
                kinds[kind_of(post, text)] += share / len(self.posts)
        return {kind: round(share, 4) for kind, share in kinds.items()}

    def ideal(self, values, beta):
        """The ideal policy for a reward, π_ref exp(value / β), as weights of the listed answers."""
        return [softmax(np.log(p) + x / beta) for p, x in zip(self.p, values)]

    def ideal_at(self, values, kl):
        """The same at a KL: β is found by bisection."""
        low, high = 1e-3, 1e4
        for _ in range(60):
            beta = math.sqrt(low * high)
            weights = self.ideal(values, beta)
            low, high = (beta, high) if self.kl(weights) > kl else (low, beta)
        return weights

    def share_at(self, values, kl=1):
        """The share of the ideal policy for a reward, at that KL."""
        weights = self.ideal_at(values, kl)
        return self.share(self.mean(weights, self.scores), self.kl(weights))

    def share(self, score, kl):
        """Of the gain that is optimal at that KL."""
        best = np.interp(kl, self.frontier[:, 0], self.frontier[:, 1])
        return (score - self.start) / (best - self.start) if kl > 0.02 else None

    def wins(self, i, scores):
        """How often answers with these scores beat the reference's answer to post i; ties count half."""
        return (np.sign(scores[:, None] - self.scores[i][None]) / 2 + 0.5) @ self.p[i]

    def figures(self, weights):
        """Of a policy that gives these weights to the listed answers."""
        score, kl = self.mean(weights, self.scores), self.kl(weights)
        return {"score": score, "kl": kl, "share": self.share(score, kl), "kinds": self.kinds(weights)}

    def measure(self, directory, temperature=1.0, kinds=True):
        """All figures of a checkpoint; kinds of answers, which take longest, only if asked for."""
        model, rows = load_model(directory), []
        for i, post in enumerate(self.posts):
            answers, log_p, log_p_ref = list_answers(
                model, self.model, self.prompts[i], self.tokenizer.eos, max(temperature, 1e-3)
            )
            texts, p = [self.tokenizer.decode(answer) for answer in answers], softmax(log_p)
            scores = np.array([self.judge(post, text) for text in texts])
            words = np.array([len(text.split()) for text in texts])
            wins = p @ self.wins(i, scores)
            rows.append([p @ scores, p @ (log_p - log_p_ref), wins, p @ words, np.exp(log_p).sum()])
        score, kl, wins, words, mass = np.mean(rows, axis=0)
        figures = {"score": score, "kl": kl, "share": self.share(score, kl), "win_rate": wins, "words": words}
        figures |= {"mass": mass}
        return figures | {"kinds": self.sampled_kinds(model, temperature)} if kinds else figures

    def sampled_kinds(self, model, temperature, n=64):
        """The share of each kind among n sampled answers to each post: rare ones count, too."""
        posts, kinds = [post for post in self.posts for _ in range(n)], dict.fromkeys(KINDS, 0.0)
        texts = sample_texts(model, self.tokenizer, posts, ("kinds", n), temperature=temperature)
        for post, text in zip(posts, texts):
            kinds[kind_of(post, text)] += 1 / len(posts)
        return {kind: round(share, 4) for kind, share in kinds.items()}

    @torch.no_grad()
    def valued(self, value):
        """What `value(tokens, mask, start, copies)` gives each listed answer, post by post."""
        found = []
        for prompt, answers in zip(self.prompts, self.answers):
            tokens, mask, start = pad_rows([prompt] * len(answers), answers)
            found.append(value(tokens, mask, start, len(answers)).double().numpy())
        return found

    def scored(self, directory):
        """A reward model's score of each listed answer."""
        model = load_model(directory, network=None)
        return self.valued(lambda *answers: final_scores(model, *answers))


def best_of_n(p, values, n):
    """The exact distribution of the best of n answers drawn from p by `values`; of equals, the first."""
    order = np.argsort(values, kind="stable")
    _, group = np.unique(values[order], return_inverse=True)
    mass = np.bincount(group, p[order])
    upto = np.minimum(np.cumsum(mass), 1.0)
    below = np.concatenate([[0.0], upto[:-1]])
    result = np.empty_like(p)
    result[order] = p[order] * ((upto**n - below**n) / mass)[group]
    return result / result.sum()


def rounded(x):
    """Floats to five digits, at any depth."""
    if isinstance(x, dict):
        return {str(key): rounded(value) for key, value in x.items()}
    if isinstance(x, (list, tuple, np.ndarray)):
        return [rounded(value) for value in x]
    return round(float(x), 5) if isinstance(x, (float, np.floating)) else x
