"""Our tokenizer next to the `tokenizers` library on random, multilingual, broken and adversarial texts.

Each tokenizer of ../shared/data/tokenizers and of tests/golden/tokenizers encodes and decodes CASES texts, a number that
fits the test run; TIDEPOOL_TOKENIZER_CASES=100000 is the full comparison (some 20 minutes), TIDEPOOL_TOKENIZER_SEED
another draw.
"""

import base64
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import unittest

from support import BINARY, ROOT

sys.path.insert(0, os.path.join(ROOT, "tools", "fidelity"))
import tokenizer_cases  # noqa: E402

try:
    from tokenizers import Tokenizer
except ImportError:
    Tokenizer = None

CASES = int(os.environ.get("TIDEPOOL_TOKENIZER_CASES", "1000"))
SEED = int(os.environ.get("TIDEPOOL_TOKENIZER_SEED", "20"))
DRIVER = pathlib.Path(os.environ.get(
    "TIDEPOOL_TOKENIZER_DRIVER", pathlib.Path(BINARY).parent.parent / "tests/server/text/tokenizer_driver"))
DATA = pathlib.Path(ROOT).parent / "shared/data/tokenizers"
GOLDEN = pathlib.Path(ROOT) / "tests/golden/tokenizers"
BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


def holds_broken_bytes(tokenizer, ids, skipped):
    """Whether a run of byte tokens is not UTF-8: there the library gives up the whole run, and we its bad bytes."""
    run = b""
    for token in [*map(tokenizer.id_to_token, ids), ""]:
        if token in skipped:
            continue
        byte = BYTE_TOKEN.fullmatch(token or "")
        if byte:
            run += bytes([int(byte[1], 16)])
            continue
        try:
            run.decode()
        except UnicodeDecodeError:
            return True
        run = b""
    return False


def consistent(path):
    """misc-sqlpilot gives its control tokens the ids of other tokens. The library renumbers them and we refuse the
    file, so both get one with the library's numbers."""
    spec = json.loads(path.read_text())
    vocab = spec["model"]["vocab"]
    if not isinstance(vocab, dict):
        return path
    taken = {i: t for t, i in vocab.items()}
    clash = [e for e in spec.get("added_tokens", []) if taken.get(e["id"], e["content"]) != e["content"]]
    if not clash:
        return path
    for number, entry in enumerate(clash):
        entry["id"] = len(vocab) + number
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as out:
        json.dump(spec, out)
    return pathlib.Path(out.name)


@unittest.skipIf(Tokenizer is None, "PyPI tokenizers is not installed")
@unittest.skipUnless(DRIVER.exists(), f"{DRIVER} is not built")
class TokenizersTest(unittest.TestCase):
    def compare(self, path):
        clean = consistent(path)
        if clean != path:
            self.addCleanup(clean.unlink)
        tokenizer = Tokenizer.from_file(str(clean))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        added = tokenizer.get_added_tokens_decoder().values()
        special = {t.content for t in added if t.special}
        ids_all = sorted(tokenizer.get_vocab(with_added_tokens=True).values())
        rng = random.Random(SEED)
        requests, want, broken = [], [], 0
        for number, data in enumerate(tokenizer_cases.texts(SEED, CASES, [t.content for t in added])):
            with_special = number % 2 == 0
            ids = tokenizer.encode(data.decode("utf-8", "replace"), add_special_tokens=with_special).ids
            requests.append({"b64": base64.b64encode(data).decode(), "special": with_special})
            want.append({"ids": ids})
            # Decoding: what came out, or cut in two and turned round, or anything.
            if number % 4 == 0:
                ids = [rng.choice(ids_all) for _ in range(rng.randint(1, 12))]
            elif number % 4 == 1 and len(ids) > 3:
                cut = rng.randrange(len(ids))
                ids = ids[cut:] + ids[:cut]
            skip = number // 4 % 2 == 0
            text = tokenizer.decode(ids, skip_special_tokens=skip)
            requests.append({"decode": ids, "skip": skip})
            if holds_broken_bytes(tokenizer, ids, special if skip else ()):
                broken += 1
                text = None
            want.append({"text": text})
        with tempfile.TemporaryFile() as lines:
            lines.write("".join(json.dumps(r) + "\n" for r in requests).encode())
            lines.seek(0)
            run = subprocess.run([str(DRIVER), str(clean)], stdin=lines, capture_output=True, timeout=3600)
        self.assertEqual(run.returncode, 0, run.stderr.decode(errors="replace"))
        answers = run.stdout.splitlines()
        self.assertEqual(len(answers), len(want))
        wrong = []
        for request, expected, line in zip(requests, want, answers):
            got = json.loads(line)
            if "text" in expected:
                good = got.get("streamed") == got.get("text") and expected["text"] in (None, got.get("text"))
            else:
                good = got == expected
            if not good:
                wrong.append((request, expected, got))
        print(f"{path.parent.name}/{path.name}: {len(want) - len(wrong)} of {len(want)} equal"
              f" ({broken} decodings with broken bytes compared with themselves only)", flush=True)
        self.assertEqual(len(wrong), 0, f"seed {SEED}: {wrong[:3]}")

    def test_shared_files_give_what_the_library_gives(self):
        paths = sorted(p for p in DATA.glob("*/*.json")
                       if p.name == "tokenizer.json" or p.parent.name == "misc-tiny")
        if not paths:
            self.skipTest(f"{DATA} is not here")
        for path in paths:
            # The library itself refuses these two: a token without single_word, a merge of unknown tokens.
            if path.name in ("mini_llama.json", "test_hf_tokenizer.json"):
                continue
            with self.subTest(tokenizer=path.parent.name):
                self.compare(path)

    def test_families_give_what_the_library_gives(self):
        for path in sorted(GOLDEN.glob("*.json")):
            with self.subTest(tokenizer=path.stem):
                self.compare(path)


if __name__ == "__main__":
    unittest.main()
