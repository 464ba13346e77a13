#!/usr/bin/env python3
"""Tokenizer speed against the `tokenizers` library, one thread each, in one run on the same texts.

    ninja -C build/release tokenizer_bench
    python3 tools/fidelity/tokenizer_speed.py --bench build/release/tests/server/text/tokenizer_bench \\
        [--tokenizers ../shared/data/tokenizers] [--text NAME=FILE ...] [--rounds 5] [--only NAME]

For every tokenizer and text it prints MB/s of both and the ratio (ours / theirs, above 1 is faster), medians over the
rounds of CPU time. `docs` is one document of --mb megabytes, `short` a third of it in strings of about 200. The
library is measured through encode() and, where that is faster, encode_fast(), which leaves offsets out as we do.
"""
import argparse
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"
import tokenizers  # noqa: E402

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import tokenizer_cases  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[2]


def corpora(extra, size):
    """Name to text. Prose and code are this repository's own; the rest is mixed from sentences by a fixed seed."""
    rng = random.Random(1)
    prose = "\n".join(p.read_text(errors="replace") for p in sorted(ROOT.glob("**/*.md")) if "build" not in p.parts)
    code = "\n".join(p.read_text(errors="replace") for pattern in ("**/*.cc", "**/*.h", "**/*.py")
                     for p in sorted(ROOT.glob(pattern)) if "build" not in p.parts)
    words = [w for text in tokenizer_cases.PROSE for w in text.split(" ")]
    multilingual = []
    while sum(map(len, multilingual)) < 600_000:
        sentence = rng.choice(tokenizer_cases.PROSE)
        if rng.random() < 0.5:
            parts = sentence.split(" ") + rng.sample(words, 3)
            rng.shuffle(parts)
            sentence = " ".join(parts)
        multilingual.append(sentence + rng.choice(["", " ", "\n", rng.choice(tokenizer_cases.EMOJI)]))
    lines = [line for line in prose.split("\n") if len(line) > 20]
    chat = "\n".join(json.dumps({"messages": [
        {"role": role, "content": " ".join(rng.sample(lines, 2))} for role in ("system", "user", "assistant")],
        "temperature": round(rng.random(), 2), "id": rng.randrange(1 << 40)}) for _ in range(2500))
    texts = {"prose": prose, "code": code, "multilingual": " ".join(multilingual), "chat": chat}
    for item in extra:
        name, path = item.split("=", 1)
        texts[name] = pathlib.Path(path).read_text(errors="replace")
    out = {}
    for name, text in texts.items():
        while len(text.encode()) < size:
            text += "\n" + text
        out[name] = text.encode()[:size].decode(errors="ignore")
    return out


def short(text):
    rng, out, at = random.Random(2), [], 0
    while at < len(text) / 3:
        n = rng.randint(20, 380)
        out.append(text[at:at + n])
        at += n
    return out


def theirs(tokenizer, texts, rounds):
    best = None
    for encode in (tokenizer.encode, getattr(tokenizer, "encode_fast", tokenizer.encode)):
        seconds = []
        for _ in range(rounds):
            start = time.thread_time()
            for text in texts:
                encode(text, add_special_tokens=False)
            seconds.append(time.thread_time() - start)
        median = statistics.median(seconds)
        best = median if best is None else min(best, median)
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", required=True)
    parser.add_argument("--tokenizers", default="../shared/data/tokenizers")
    parser.add_argument("--text", action="append", default=[])
    parser.add_argument("--mb", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    files = {p.parent.name: p for p in sorted(pathlib.Path(args.tokenizers).glob("*/tokenizer.json"))
             if not p.parent.name.startswith("misc")}
    files |= {p.stem + " (small)": p for p in sorted((ROOT / "tests/golden/tokenizers").glob("*.json"))
              if p.stem in ("llama3", "gemma", "t5", "xlmr", "o200k", "deepseek")}
    texts = corpora(args.text, int(args.mb * 1_000_000))
    print(f"tokenizers {tokenizers.__version__}, {args.rounds} rounds, MB/s ours / theirs = ratio")
    ratios = []
    for name, path in files.items():
        if args.only not in name:
            continue
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        for corpus, text in texts.items():
            for kind, parts in (("docs", [text]), ("short", short(text))):
                with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as out:
                    out.writelines(json.dumps(part) + "\n" for part in parts)
                    out.flush()
                    run = subprocess.run([args.bench, str(path), out.name, str(args.rounds)], check=True, capture_output=True)
                ours = json.loads(run.stdout)
                hf = theirs(tokenizer, parts, args.rounds)
                mine = statistics.median(ours["seconds"])
                mb = ours["bytes"] / 1e6
                ratios.append((hf / mine, name, corpus, kind))
                print(f"{name:22} {corpus:13} {kind:6} {mb / mine:8.1f} / {mb / hf:7.1f} = {hf / mine:6.2f}", flush=True)
    worst = min(ratios)
    print(f"worst: {worst[0]:.2f} ({worst[1]}, {worst[2]}, {worst[3]}); "
          f"median: {statistics.median(r[0] for r in ratios):.2f}; {len(ratios)} measurements")


if __name__ == "__main__":
    main()
