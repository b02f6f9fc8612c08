"""The reward model: learn to predict which of two answers people choose. RLHF's second step.

The network is the pretrained GPT with one number at its end instead of logits: the score r(x, y) of answer
y to prompt x, read at the last token, when the whole answer is known. People choose y_w over y_l with
probability σ(r(x, y_w) − r(x, y_l)) (Bradley and Terry 1952), so the loss is
    loss = −log σ(r(x, y_w) − r(x, y_l))                              (Ouyang et al. 2022, eq. 1)

Only differences count: any constant could be added to all scores. So at the end the scores are shifted to
mean 0 on the pretrained model's own answers. A score above 0 then means "better than usual".

A score asks for something that guessing the next token never did: to check a name in the answer against the
name in the post. Learned from choices alone, at the last token alone, that does not come about here: the
model learns to like short answers and stops. Three things, all without any knowledge of the judge, mend it:
    1. Practice first on free pairs: what was chosen for this post is better than what was chosen for
       another. No further choice need be asked for. (Preference model pretraining, Askell et al. 2021, arXiv 2112.00861.) Strangers
       come first; then look-alikes, which differ in one token, so that every word must be checked.
    2. While training, the scores at all tokens of an answer, summed, must predict the choice as well. At the
       last token alone, a wrong name is one among forty that it might have looked at.
    3. One block more than the pretrained model, which starts as the identity: there the last token can
       gather what the others have found out.
`--plain` leaves the first two out. It is the usual recipe, and for real, long answers the better one: over dozens of
tokens the sum drowns the last one's score.

    python reward.py

takes a bit more than a minute on two CPU cores, and starts from the same preference file as `dpo.py`. What you see
while it runs, all on held-out pairs:
    val_loss      stays above log 2 = 0.693 during practice, then falls
    val_accuracy  share of pairs where the chosen answer has the higher score. People err, so it cannot
                  reach 1: the summary prints the best that any model could do on these pairs
    margin        score of chosen − of rejected; grows from about 0
The table at the end shows calibration: of the pairs where the model was 80% sure, was it right in 80%?
"""

import argparse
import math
from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F

from data import MAX_ANSWER_TOKENS, Tokenizer, batches, best_accuracy, collect_preferences
from data import encode_pairs, pack_pairs, read_preferences
from model import BadInput, Checkpoint, Log, Muon, ScalarGPT, add_common_options, average_gradients, final_scores
from model import generate, last_token, load_model, mine, places, positive, run, sample_texts, save_model, set_lr, set_up

parser = argparse.ArgumentParser("reward.py", description="Learn a reward model from preferences.")
parser.add_argument("--init", default="runs/pretrain", help="checkpoint to start from (default: %(default)s)")
parser.add_argument("--data", help="preference file (default: pairs of the model's own answers, made if missing)")
parser.add_argument("--pairs", type=positive(int), default=17_408, help="how many to collect if missing (default: %(default)s)")
parser.add_argument("--out", default="runs/reward", help="directory for the checkpoint (default: %(default)s)")
parser.add_argument("--practice", type=positive(int, or_zero=True), default=300, help="steps on free pairs, first (default: %(default)s)")
parser.add_argument("--plain", action="store_true", help="no practice, and only the last token's score is trained: for long answers")
parser.add_argument("--steps", type=positive(int), help="steps on people's pairs (default: one pass over them)")
parser.add_argument("--batch-size", type=positive(int), default=64, help="pairs a step (default: %(default)s)")
parser.add_argument("--lr", type=positive(float), default=5e-3, help="peak rate; four times that in practice (default: %(default)s)")
add_common_options(parser)


def reward_loss(chosen, rejected):
    """The loss of each pair (B,), from the scores of its two answers, (B,) each."""
    return -F.logsigmoid(chosen - rejected)


def find_look_alikes(answers):
    """The tokens that were seen at place t of answers that agree elsewhere: {(t, before, after): tokens}."""
    seen = defaultdict(dict)
    for answer in answers:
        for t, token in enumerate(answer[:-1]):  # the end stays
            seen[t, (*answer[:t],), (*answer[t + 1 :],)][token] = None
    return {key: list(tokens) for key, tokens in seen.items() if len(tokens) > 1}


def look_alike(answer, seen, rng):
    """Another answer from the same data that differs from this one in one token, or None."""
    keys = [(t, (*answer[:t],), (*answer[t + 1 :],)) for t in range(len(answer) - 1)]
    keys = [key for key in keys if key in seen]
    if not keys:
        return None
    t, before, after = keys[rng.integers(len(keys))]
    others = [token for token in seen[t, before, after] if token != answer[t]]
    return [*before, others[rng.integers(len(others))], *after]


def pair_scores(model, pairs, device, plain=False):
    """Scores of chosen and rejected answers, in one forward pass.

    Returns r(x, y), read at the last token, and the sum over all of the answer's tokens, (B, 2) each; or, if
    `plain`, r(x, y) twice: then no other token is scored.
    """
    tokens, masks, layout = pack_pairs(pairs, device)  # masks: (2, B, T)
    scored = last_token(masks) if plain else masks
    either = scored.any(0)  # (B, T), N tokens
    scores = model.score(model.transformer(tokens, layout=layout, wanted=places(either))).squeeze(1).float()  # (N,)
    scores = torch.zeros(tokens.shape, device=device).masked_scatter(either, scores) * scored  # (2, B, T)
    return scores[last_token(masks)].view(2, -1).T, scores.sum(-1).T


def calibration(margin, bins=10):
    """How sure the model was and how often it was right, pair by pair from margins (N,), in bins.

    It is σ(|margin|) sure of its favourite. Returns rows (mean certainty, share right, pairs).
    """
    certainty, right = torch.sigmoid(margin.abs()), (margin > 0).float()
    which = ((certainty - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    rows = [(certainty[which == i], right[which == i]) for i in range(bins)]
    return [(c.mean().item(), r.mean().item(), len(c)) for c, r in rows if len(c)]


def main(args):
    device = set_up(args)
    rng = np.random.default_rng(args.seed)

    # The reward model starts as the reference, with one more block and a new head.
    tokenizer = Tokenizer.load(args.init)
    reference = load_model(args.init).to(device)
    model = load_model(args.init, ScalarGPT, extra_layers=1, new_head=True).to(device)

    # Pairs of answers to the same prompt, the last ones held out.
    answer = lambda prompts: sample_texts(reference, tokenizer, prompts, MAX_ANSWER_TOKENS)
    data = args.data or collect_preferences(args.init, answer, args.pairs)
    records = read_preferences(data)
    pairs, kept = encode_pairs(tokenizer, records, model.config.n_positions)
    if len(pairs) < max(20, args.batch_size):
        raise BadInput(f"{data}: {len(pairs)} usable pairs are too few; give at least 20, and not less than --batch-size")
    n_val = min(1024, len(pairs) // 10)
    train, val = range(len(pairs) - n_val), range(len(pairs) - n_val, len(pairs))
    lengths = [len(prompt) + len(chosen) + len(rejected) for prompt, chosen, rejected in pairs]
    print(f"{data}: {len(train)} pairs to learn from, {n_val} held out, {len(records) - len(pairs)} dropped")

    @torch.no_grad()
    def evaluate():
        scores = torch.cat([pair_scores(model, [pairs[i] for i in rows], device, args.plain)[0] for rows in np.array_split(val, min(8, n_val))])
        margin = scores[:, 0] - scores[:, 1]
        return margin, {"val_loss": reward_loss(*scores.unbind(1)).mean().item(),
                        "val_accuracy": (margin > 0).float().mean().item(), "margin": margin.mean().item()}  # fmt: skip

    seen = find_look_alikes([answer for i in train for answer in pairs[i][1:]])
    per_epoch = math.ceil(len(train) / args.batch_size)
    practice, steps = 0 if args.plain else args.practice, args.steps or per_epoch
    epochs = math.ceil((practice + steps) / per_epoch)
    order = [rows for _ in range(epochs) for rows in batches(lengths[: len(train)], args.batch_size, rng)]
    if args.compile:
        model.transformer.compile(dynamic=True)
    # People's pairs get a gentler rate than practice, and no momentum from before.
    practice_optimizer, main_optimizer = Muon(model, 4 * args.lr), Muon(model, args.lr)
    mine(min(order, key=len))  # if a batch is too small for all processes, better to know now
    checkpoint = Checkpoint(args, rng, model=model, practice=practice_optimizer, main=main_optimizer)
    log = Log(args.out, practice + steps, "reward", checkpoint.step)
    for step in range(checkpoint.step, practice + steps):
        batch = [pairs[i] for i in order[step]]
        if step < practice:  # what was chosen here is better than what was chosen elsewhere
            hard = rng.random(len(batch)) < 3 * step / practice  # more and more look-alikes, then nothing else
            free = []
            for is_hard, (prompt, chosen, _), (_, other, _) in zip(hard, batch, batch[1:] + batch[:1]):
                if is_hard:
                    other = look_alike(chosen, seen, rng) or other
                free.append((prompt, chosen, other[: model.config.n_positions - len(prompt)]))
            batch = free
        batch = mine(batch)
        final, summed = pair_scores(model, batch, device, args.plain)
        loss = reward_loss(*final.unbind(1)).mean()
        if not args.plain:
            loss = loss + reward_loss(*summed.unbind(1)).mean()
        if step < practice:
            optimizer = practice_optimizer
            set_lr(optimizer, step, practice, warmup=10, final=0.3)
        else:
            optimizer = main_optimizer
            set_lr(optimizer, step - practice, steps, warmup=10)
        loss.backward()
        loss = average_gradients(model.parameters(), loss, weight=len(batch))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        if step % 50 == 49 or step == practice + steps - 1:
            margin, val_figures = evaluate()
            log(step + 1, loss=loss.item(), **val_figures)
        elif step % 10 == 9:
            log(step + 1, loss=loss.item())
        log.bar.update()
        if step + 1 < practice + steps:
            checkpoint.save(step + 1)

    # Shift the scores to mean 0 on the reference's own answers.
    prompts = [pairs[i][0] for i in val]
    with torch.no_grad():
        tokens, mask, _ = generate(reference, prompts, MAX_ANSWER_TOKENS, tokenizer.eos)
        model.shift(-final_scores(model, tokens, mask).mean())

    save_model(model, tokenizer, args.out)
    checkpoint.finish()
    best = best_accuracy(kept[-n_val:])
    log.close(val_accuracy=val_figures["val_accuracy"], best_accuracy=best, val_loss=val_figures["val_loss"],
              seconds=checkpoint.seconds())  # fmt: skip
    print("how sure   how often right   pairs")
    for certainty, right, n in calibration(margin):
        print(f"{certainty:8.0%}{right:18.0%}{n:8}")
    print(f"held-out pairs: loss {val_figures['val_loss']:.4f}, accuracy {val_figures['val_accuracy']:.3f}", end="")
    if best:
        print(f"; no model can be right more often than {best:.3f}", end="")
    print(f"\nsaved to {args.out}")


if __name__ == "__main__":
    run(main, parser)
