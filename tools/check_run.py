"""tools/run --check: one chat request through a fresh `tidepool serve`; prints the answer and its path.

Usage: check_run.py TIDEPOOL_BINARY [serve argument...]. Exit code 0: the answer is there, prefill and decode
ran in different processes, and KV blocks moved between them. Standard library only.
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests", "integration"))
from harness import Serve, ServeFailed  # noqa: E402

# The demo model answers from the passage; several blocks long, so that KV has to move.
QUESTION = (
    "The code of the blue door is 4821. The code of the red door is 1907. The code of the green door is 3354. "
    "Anna lives in Lisbon. Ben lives in Oslo. Clara works as a baker. The price of the lamp is 35 coins. "
    "The price of the chair is 72 coins. David has a dog. What is the code of the blue door?"
)


def check(binary, args):
    with Serve(binary, args) as serve:
        reply = serve.post_json(
            "/v1/chat/completions",
            {
                "model": serve.model(),
                "messages": [{"role": "user", "content": QUESTION}],
                "max_tokens": 48,
                "temperature": 0,
                "return_trace": True,
            },
            timeout=60,
        )
        answer = reply["choices"][0]["message"]["content"]
        trace = reply["tidepool_trace"]
        print("answer:", answer)
        print("path:")
        for key, value in trace.items():
            print(f"  {key}: {value}")
        problems = []
        if not answer:
            problems.append("the answer is empty")
        if trace["prefill_pid"] == trace["decode_pid"]:
            problems.append("prefill and decode ran in the same process")
        if not trace["fetched_blocks"] > 0:
            problems.append("no KV block was fetched")
        if problems:
            serve.print_log()
        return problems


def main():
    try:
        problems = check(sys.argv[1], sys.argv[2:])
    except ServeFailed as error:
        problems = [str(error)]
    for problem in problems:
        print("failed:", problem, file=sys.stderr)
    if not problems:
        print("check passed")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
