"""What grouping by shared prefix saves: prompt tokens that are computed, and time, in prefix and in file order.

    python3 tests/integration/batch_prefix_figure.py [--groups 24] [--members 8] [--prefix-sentences 10]

A shuffled workload of prompts that share prefixes on two levels (one system prompt a family, one document a
group) through `tidepool run-batch` on the demo model, with a KV pool that holds a few groups. Each order gets a
cluster of its own. Counted by the gateway: tidepool_prompt_tokens_total.
"""

import argparse
import json
import os
import random
import subprocess
import tempfile
import time

from harness import Serve
from support import BINARY


def sentences(rng, count):
    words = "river stone garden paper window music winter market silver bridge letter engine".split()
    return " ".join(" ".join(rng.choice(words) for _ in range(7)).capitalize() + "." for _ in range(count))


def workload(args):
    rng = random.Random(args.seed)
    rows = []
    families = max(1, args.groups // 6)
    systems = [sentences(rng, args.prefix_sentences // 2) for _ in range(families)]
    for group in range(args.groups):
        document = sentences(rng, args.prefix_sentences)
        for member in range(args.members):
            question = sentences(rng, 2)
            body = {
                "prompt": f"{systems[group % families]}\n{document}\n{question}",
                "max_tokens": args.tokens,
                "temperature": 0,
                "ignore_eos": True,
            }
            rows.append(
                {"custom_id": f"{group}-{member}", "method": "POST", "url": "/v1/completions", "body": body}
            )
    rng.shuffle(rows)
    return rows


def prompt_tokens(serve):
    metrics = serve.metrics("gateway")
    out = {"computed": 0, "cached": 0}
    for labels, value in metrics["tidepool_prompt_tokens_total"].items():
        labels = dict(labels)
        out["cached" if labels.get("source") == "cache" or "cached" in labels.values() else "computed"] += value
    return out


def measure(args, order, rows):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "in.jsonl")
        with open(path, "w") as file:
            file.write("\n".join(map(json.dumps, rows)) + "\n")
        env = {"TIDEPOOL_KV_HOST_BYTES": args.kv_bytes}
        with Serve(BINARY, env=env) as serve:
            before = prompt_tokens(serve)
            began = time.monotonic()
            subprocess.run(
                [
                    BINARY,
                    "run-batch",
                    "-i",
                    path,
                    "-o",
                    os.path.join(folder, "out.jsonl"),
                    "--endpoint",
                    f"http://{serve.http}",
                    "--concurrency",
                    str(args.concurrency),
                    "--order",
                    order,
                ],
                check=True,
                stderr=subprocess.DEVNULL,
            )
            seconds = time.monotonic() - began
            after = prompt_tokens(serve)
            return {key: int(after[key] - before[key]) for key in after} | {"seconds": round(seconds, 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=24)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--prefix-sentences", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--kv-bytes", default="16MiB")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rows = workload(args)
    figures = {order: measure(args, order, rows) for order in ("file", "prefix")}
    figures["computed_ratio"] = round(figures["file"]["computed"] / figures["prefix"]["computed"], 2)
    print(json.dumps({"lines": len(rows), **figures}, indent=1))


if __name__ == "__main__":
    main()
