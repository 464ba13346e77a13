"""Tidepool beside llama.cpp's server on the demo model, in one run: throughput, TTFT and ITL at some concurrencies.

Usage: compare_llama_cpp.py --peer-python VENV/bin/python [--binary TIDEPOOL] [--clients 1,8,64] [--rounds N]
                            [--input-words N] [--output-len N] [--threads N] [-o table|json]

The environment of --peer-python holds tools/bench/requirements.txt. The peer is `python -m llama_cpp.server`, the
server that comes with llama-cpp-python: FastAPI around llama.cpp's library, which decodes one sequence at a time;
with --peer-server, llama.cpp's own C++ `llama-server` with as many slots as clients instead. Both serve the same
bfloat16 weights with the same number of threads and get the same prompts from the same `tidepool bench serve`:
greedy, answers of the same length (end tokens are biased away), a closed loop of N clients. Peer and ours alternate
and only one runs at a time; the table has the medians of the rounds and their ratios.
"""

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, os.path.join(ROOT, "tests", "integration"))

from harness import Serve, eventually  # noqa: E402

MODEL = os.path.join(ROOT, "tools", "demo_model", "model")
METRICS = ["output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_itl_ms", "p99_itl_ms", "median_e2el_ms"]
END_TOKENS = {"1": -100, "6": -100}
COLOURS = ["blue", "red", "green", "white", "black", "yellow", "grey", "pink"]


class Peer:
    """llama.cpp's server on `gguf`; context manager."""

    def __init__(self, options, gguf, clients):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        if options.peer_server:
            command = [options.peer_server, "-m", gguf, "--host", "127.0.0.1", "--port", str(port)]
            command += ["-t", str(options.threads), "-tb", str(options.threads)]
            command += ["-np", str(clients), "-c", str(512 * clients), "--no-webui", "-a", "demo"]
        else:
            command = [options.peer_python, "-m", "llama_cpp.server", "--model", gguf, "--model_alias", "demo"]
            command += ["--host", "127.0.0.1", "--port", str(port), "--n_ctx", "2048"]
            command += ["--n_threads", str(options.threads), "--n_threads_batch", str(options.threads)]
            # Its default cuts an answer short when the next request comes.
            command += ["--interrupt_requests", "False"]
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)

    def __enter__(self):
        def ready():
            if self.process.poll() is not None:
                self.log.seek(0)
                sys.exit(f"the peer ended:\n{self.log.read()[-4000:]}")
            try:
                with urllib.request.urlopen(self.url + "/v1/models", timeout=5) as answer:
                    return answer.status == 200
            except OSError:
                return False

        eventually(ready, 120, "the peer answers")
        return self

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


def write_prompts(path, count, words, output, seed):
    """Different from the first word on; both servers count the same tokens."""
    rng = random.Random(seed)
    with open(path, "w") as file:
        for number in range(count):
            text = f"{rng.randrange(10**6)} note:"
            while len(text.split()) < words:
                text += f" The code of the {rng.choice(COLOURS)} door is {rng.randrange(1000, 10000)}."
            file.write(json.dumps({"prompt": text, "max_tokens": output}) + "\n")


def load(options, url, prompts, clients, requests):
    with tempfile.NamedTemporaryFile("r", suffix=".json") as result:
        command = [options.binary, "bench", "serve", "--base-url", url, "--dataset", prompts, "-q", "--temperature", "0"]
        command += ["--max-concurrency", str(clients), "--num-prompts", str(requests), "--result-file", result.name]
        command += ["--extra-body", json.dumps({"logit_bias": END_TOKENS}), "--return-trace", "false"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
        if done.returncode != 0:
            sys.exit(f"bench serve on {url} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return json.load(result)


def measure(options, side, gguf, clients, number, folder):
    """One server, started fresh: a warm-up, then the load."""
    requests = max(options.requests_min, clients * options.requests_each)
    prompts, warm = os.path.join(folder, "prompts"), os.path.join(folder, "warm")
    write_prompts(prompts, requests, options.input_words, options.output_len, number)
    write_prompts(warm, clients, options.input_words, 8, 1000 + number)
    if side == "peer":
        server = Peer(options, gguf, clients)
    else:
        server = Serve(options.binary, ["--engine-max-batch", str(max(32, clients)), *options.serve_args.split()])
    with server:
        url = server.url if side == "peer" else f"http://{server.http}"
        load(options, url, warm, min(clients, 4), clients)
        result = load(options, url, prompts, clients, requests)
    expected = requests * options.output_len
    counted = result["total_output_tokens"]
    if abs(counted - expected) > 0.02 * expected:
        print(f"warning: {side} gave {counted} tokens of {expected} asked for", file=sys.stderr)
    return {metric: result[metric] for metric in METRICS} | {
        "input_tokens": result["total_input_tokens"] / requests,
        "output_tokens": counted / requests,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default=os.path.join(ROOT, "build", "release", "bin", "tidepool"))
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--peer-server", default="", help="llama.cpp's llama-server, instead of the Python one")
    parser.add_argument("--clients", default="1,8,64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--input-words", type=int, default=40, help="about 3 tokens each in the demo model")
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--requests-min", type=int, default=16)
    parser.add_argument("--requests-each", type=int, default=3, help="requests per client")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--serve-args", default="", help="for tidepool serve")
    parser.add_argument("-o", "--output", choices=["table", "json"], default="table")
    options = parser.parse_args()
    clients = [int(text) for text in options.clients.split(",")]
    rounds = {count: {"peer": [], "ours": []} for count in clients}
    with tempfile.TemporaryDirectory() as folder:
        gguf = os.path.join(folder, "demo.gguf")
        subprocess.run([options.peer_python, os.path.join(HERE, "make_gguf.py"), MODEL, gguf], check=True)
        for number in range(options.rounds):
            for count in clients:
                for side in ("peer", "ours") if number % 2 == 0 else ("ours", "peer"):
                    rounds[count][side].append(measure(options, side, gguf, count, number, folder))
                    print(f"round {number + 1}: {count} clients, {side} done", file=sys.stderr)
    medians = {
        count: {
            side: {metric: statistics.median(one[metric] for one in every) for metric in every[0]}
            for side, every in sides.items()
        }
        for count, sides in rounds.items()
    }
    if options.output == "json":
        print(json.dumps({"rounds": rounds, "medians": medians}, indent=1))
        return
    print(f"{'clients':>7} {'metric':18} {'llama.cpp':>12} {'tidepool':>12} {'ours/peer':>10}")
    for count, sides in medians.items():
        for metric in METRICS:
            peer, ours = sides["peer"][metric], sides["ours"][metric]
            ratio = f"{ours / peer:10.2f}" if peer else f"{'-':>10}"
            print(f"{count:7} {metric:18} {peer:12.2f} {ours:12.2f} {ratio}")


if __name__ == "__main__":
    main()
