"""Every family's tiny checkpoint through two workers and the handoff, against what transformers computed."""

import concurrent.futures
import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import unittest

from harness import Serve, eventually
from support import BINARY, EXACT, ROOT

FAMILIES = os.path.join(ROOT, "tests", "golden", "families")
BLOCK_TOKENS = 16  # smaller than the default: five of the eight prompts have whole blocks


def cases():
    return sorted(
        name for name in os.listdir(FAMILIES) if os.path.exists(os.path.join(FAMILIES, name, "golden.json"))
    )


class FamiliesTest(unittest.TestCase):
    """One test a case, made below: 64 greedy tokens of 8 prompts at once, in float32, equal to transformers'."""

    def check(self, name):
        with open(os.path.join(FAMILIES, name, "golden.json")) as file:
            golden = json.load(file)
        args = ["--model", os.path.join(FAMILIES, name), "--model-tokenizer", os.path.join(FAMILIES, "tokenizer")]
        args += ["--model-name", name, "--model-dtype", "float32", "--kv-block-tokens", str(BLOCK_TOKENS)]
        # A prompt with a whole block before its last token is handed over, however short.
        args += ["--scheduler-local-prefill-tokens", "0", *EXACT]
        if golden["max_model_len"]:
            args += ["--model-max-model-len", str(golden["max_model_len"])]
        with Serve(BINARY, args) as serve:

            def answer(prompt):
                body = {"model": name, "prompt": prompt["ids"], "max_tokens": len(prompt["greedy"]), "temperature": 0}
                body.update(ignore_eos=True, return_token_ids=True, return_trace=True)
                return serve.post_json("/v1/completions", body)

            with concurrent.futures.ThreadPoolExecutor(len(golden["prompts"])) as pool:
                answers = list(pool.map(answer, golden["prompts"]))
        for prompt, reply in zip(golden["prompts"], answers):
            tokens = len(prompt["ids"])
            with self.subTest(prompt_tokens=tokens):
                self.assertEqual(reply["choices"][0]["token_ids"], prompt["greedy"])
                trace = reply["tidepool_trace"]
                self.assertEqual(trace["cached_tokens"], 0)
                if tokens > BLOCK_TOKENS:
                    self.assertNotEqual(trace["prefill_pid"], trace["decode_pid"])
                    self.assertGreaterEqual(trace["fetched_blocks"], (tokens - 1) // BLOCK_TOKENS)


for _name in cases():
    setattr(
        FamiliesTest,
        "test_" + re.sub(r"\W", "_", _name),
        lambda self, name=_name: self.check(name),
    )


class FamiliesMadeAgainFromPyPITest(unittest.TestCase):
    """tools/fidelity with the pinned torch and transformers gives what is committed.

    Their packages (2.4 GB to fetch, 4.1 GB on disk, CUDA's libraries among them: PyPI has no smaller torch for
    x86-64) go into build/fidelity-venv and stay there. TIDEPOOL_REGENERATE=0 leaves this out.
    """

    tools = os.path.join(ROOT, "tools", "fidelity")
    venv = os.path.join(ROOT, "build", "fidelity-venv")
    python = os.path.join(venv, "bin", "python")
    disk_bytes = 10 << 30
    install_seconds = 300
    check_seconds = 420

    @contextlib.contextmanager
    def alone(self):
        """Two runs in one tree must not install over each other."""
        os.makedirs(os.path.dirname(self.venv), exist_ok=True)
        with open(self.venv + ".lock", "w") as lock:

            def locked():
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return True
                except BlockingIOError:
                    return False

            eventually(locked, self.install_seconds + self.check_seconds, "another run of this test ends")
            yield

    def install(self):
        """Skips the test where the packages cannot be had."""
        requirements = os.path.join(self.tools, "requirements.txt")
        stamp = os.path.join(self.venv, "installed.txt")
        with open(requirements) as file:
            wanted = file.read()
        if os.path.exists(stamp):
            with open(stamp) as file:
                if file.read() == wanted:
                    return
        shutil.rmtree(self.venv, ignore_errors=True)
        if shutil.disk_usage(os.path.dirname(self.venv)).free < self.disk_bytes:
            self.skipTest(f"torch and transformers from PyPI need {self.disk_bytes >> 30} GiB of free disk in build/")
        pip = [self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
        # Two idle cores near a mirror need a minute or two.
        pip += ["--no-compile", "--no-deps", "--retries", "1", "--timeout", "20", "-r", requirements]
        try:
            subprocess.run([sys.executable, "-m", "venv", self.venv], check=True, capture_output=True, timeout=60)
            done = subprocess.run(pip, capture_output=True, text=True, timeout=self.install_seconds)
            if done.returncode == 0:
                check = [self.python, "-c", "import torch, transformers"]
                done = subprocess.run(check, capture_output=True, text=True, timeout=120)
            problem = None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        except subprocess.TimeoutExpired:
            problem = f"not installed within {self.install_seconds} s"
        except subprocess.CalledProcessError:
            problem = "python3 has no working venv module"
        if problem is not None:
            shutil.rmtree(self.venv, ignore_errors=True)
            self.skipTest(f"torch and transformers could not be had from PyPI: {problem}")
        with open(stamp, "w") as file:
            file.write(wanted)

    def test_checkpoints_and_goldens_are_the_committed_ones(self):
        if os.environ.get("TIDEPOOL_REGENERATE") == "0":
            self.skipTest("TIDEPOOL_REGENERATE=0; unset it to make the goldens again from PyPI's transformers")
        with self.alone():
            self.install()
            done = subprocess.run(
                [self.python, "-B", os.path.join(self.tools, "make_families.py"), "--check", FAMILIES],
                capture_output=True,
                text=True,
                timeout=self.check_seconds,
            )
        self.assertEqual(done.returncode, 0, done.stdout[-4000:] + done.stderr[-4000:])


if __name__ == "__main__":
    unittest.main()
