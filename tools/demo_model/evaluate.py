"""Measures how often the demo model answers right, on held-out text.

    python evaluate.py --model model --readme README.md

Loads the exported model with `transformers`, in float32 from the bfloat16
weights.  An answer counts only if greedy decoding gives exactly the expected
sentence and then ends.  That is checked without a decoding loop: greedy
decoding gives the expected tokens if and only if each of them is the most
likely one after the prompt and the expected tokens before it.
"""

import argparse
import json

import torch
import transformers

import generate

LENGTHS = [128, 256, 512, 1000, 1500]
HELDOUT_SEED = 20250
MARKS = ("<!-- accuracy: written by evaluate.py -->", "<!-- end of accuracy -->")


class Model:
    def __init__(self, folder):
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32).eval()
        self.end = self.tokenizer.eos_token_id

    def prompt(self, messages):
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True)
        return self.tokenizer.encode(text, add_special_tokens=False)

    @torch.inference_mode()
    def answers_right(self, messages):
        """For each assistant turn: is it what the model would answer?

        The earlier turns of the conversation hold the expected answers.
        """
        ids, spans = [], []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                ids = self.prompt(messages[:i])
                answer = self.tokenizer.encode(message["content"],
                                               add_special_tokens=False)
                spans.append((len(ids), len(ids) + len(answer) + 1))
                ids = ids + answer + [self.end]
        ids = torch.tensor(ids)
        best = self.model(ids[None]).logits[0].argmax(-1)
        return [bool((best[a - 1:b - 1] == ids[a:b]).all()) for a, b in spans]


def question_at_length(rng, model, length, kind=None):
    """A passage of several facts and one question, of `length` tokens or just less.

    Returns the messages, how many facts the passage has, and where in the
    passage the asked fact stands (0: at the start, 1: at the end).
    """
    while True:
        passage = generate.Passage(rng, length, rng.choice([0.0, 0.2, 0.4]))
        asked = [f for f in passage.facts if kind is None or f.kind == kind]
        if not asked:
            continue
        fact = rng.choice(asked)
        question = fact.question(rng)
        place = passage.sentences.index(fact.statement)
        # Too long at first: take sentences away from the end.
        while True:
            messages = [{"role": "user", "content": f"{passage.text()} {question}"}]
            if len(model.prompt(messages)) <= length:
                break
            passage.sentences.pop()
        if place < len(passage.sentences):
            break
    held = set(passage.sentences)
    facts = sum(f.statement in held for f in passage.facts)
    messages.append({"role": "assistant", "content": fact.answer})
    return messages, facts, place / max(1, len(passage.sentences) - 1)


def by_length(model, seed, count, kind):
    rows = []
    for length in LENGTHS:
        rng = generate.heldout_rng(seed + length)
        right, facts, tokens, quarters = 0, 0, 0, [[0, 0] for _ in range(4)]
        for _ in range(count):
            messages, n, place = question_at_length(rng, model, length, kind)
            good = model.answers_right(messages)[0]
            right += good
            facts += n
            tokens += len(model.prompt(messages[:-1]))
            quarter = quarters[min(3, int(place * 4))]
            quarter[0] += good
            quarter[1] += 1
        rows.append({"length": length, "accuracy": right / count,
                     "facts": facts / count, "tokens": tokens / count,
                     "quarters": [a / max(1, b) for a, b in quarters]})
        print(f"{kind or 'all kinds'} {rows[-1]}", flush=True)
    return rows


def conversations(model, seed, count):
    """Accuracy in multi-turn chats of 300 to 1,200 tokens, by kind of answer."""
    rng = generate.heldout_rng(seed)
    fixed = {answer for _, answer in generate.SMALL_TALK} | {generate.NOTED}
    results = {"fact": [], "left out": [], "fixed": []}
    for _ in range(count):
        total = rng.choice([300, 600, 1200])
        messages = generate.chat(rng, total // 2, total, unknown_share=0.15)
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        for answer, good in zip(answers, model.answers_right(messages)):
            kind = ("left out" if answer == generate.UNKNOWN
                    else "fixed" if answer in fixed else "fact")
            results[kind].append(good)
    return {kind: {"accuracy": sum(r) / len(r), "answers": len(r)}
            for kind, r in results.items()}


def table(figures):
    """The figures as Markdown."""
    lines = ["| context tokens | facts in it | codes right | all kinds right |",
             "|---:|---:|---:|---:|"]
    for code, every in zip(figures["codes"], figures["all"]):
        lines.append(f"| {code['length']} | {every['facts']:.0f} "
                     f"| {code['accuracy']:.1%} | {every['accuracy']:.1%} |")
    lines += ["", "| answers in conversations | count | right |", "|---|---:|---:|"]
    for kind, row in figures["conversations"].items():
        lines.append(f"| {kind} | {row['answers']} | {row['accuracy']:.1%} |")
    at = next(row for row in figures["codes"] if row["length"] == 1000)
    lines += ["", "Codes at 1,000 tokens by where the fact stands, from the first to "
              "the last quarter: " + ", ".join(f"{q:.1%}" for q in at["quarters"]) + "."]
    lines += ["", f"{figures['count']} questions for each length and column, held-out "
              f"seed {figures['seed']}, greedy decoding, float32, "
              f"transformers {transformers.__version__}."]
    return "\n".join(lines)


def write_into(path, text):
    """Replaces what stands between the two accuracy marks of the README."""
    with open(path) as file:
        before, rest = file.read().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    with open(path, "w") as file:
        file.write(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="model")
    parser.add_argument("--count", type=int, default=1000,
                        help="questions for each context length")
    parser.add_argument("--chats", type=int, default=100)
    parser.add_argument("--seed", type=int, default=HELDOUT_SEED)
    parser.add_argument("--readme", help="write the table into this file")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()

    model = Model(args.model)
    figures = {
        "count": args.count, "seed": args.seed,
        "codes": by_length(model, args.seed, args.count, "code"),
        "all": by_length(model, args.seed + 5000, args.count, None),
        "conversations": conversations(model, args.seed, args.chats),
    }
    text = table(figures)
    print(text)
    if args.readme:
        write_into(args.readme, text)
    if args.json:
        with open(args.json, "w") as out:
            json.dump(figures, out, indent=1)


if __name__ == "__main__":
    main()
