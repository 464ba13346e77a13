"""`tidepool model`: inspect, synthesize, tokenize, render, as scripts use them."""

import json
import os
import re
import shutil
import subprocess
import tempfile
import unittest

from harness import Serve
from support import BINARY, ROOT

DEMO = os.path.join(ROOT, "tools", "demo_model", "model")
DATA = os.path.join(ROOT, "..", "shared", "data")
TEMPLATES = os.path.join(DATA, "chat_templates")
TOKENIZERS = os.path.join(DATA, "tokenizers")


def model(*args, stdin=None, text=True, timeout=300):
    return subprocess.run(
        [BINARY, "model", *args], input=stdin, capture_output=True, text=text, timeout=timeout
    )


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def read_jsonl(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


class InspectTest(unittest.TestCase):
    def test_the_demo_model_is_servable(self):
        done = model("inspect", DEMO, "-o", "json")
        self.assertEqual(done.returncode, 0, done.stderr)
        report = json.loads(done.stdout)
        self.assertTrue(report["servable"])
        self.assertEqual(report["problems"], [])
        self.assertEqual(report["architecture"], "LlamaForCausalLM")
        self.assertRegex(report["fingerprint"], "^[0-9a-f]{64}$")
        values = 2 * report["layers"] * report["kv_heads"] * report["head_dim"]
        size = {"bfloat16": 2, "float32": 4}[report["kv_dtype"]]
        self.assertEqual(report["kv_bytes_per_token"], values * size)
        self.assertEqual(report["kv_bytes_per_block"], values * size * report["block_tokens"])
        self.assertEqual(report["parameters"], report["parameters_active"])
        # The demo model stores its head beside the embeddings or not at all; norms and matrices count once.
        self.assertEqual(sum(report["weights"]["bytes_by_dtype"].values()), report["weights"]["bytes"])
        self.assertEqual(report["tokenizer"]["model"], "BPE")
        self.assertTrue(report["chat_template"]["features"]["system"])
        self.assertTrue(report["chat_template"]["features"]["generation_prompt"])
        self.assertTrue(report["chat_template"]["features"]["tools"])

    def test_the_table_shows_the_same(self):
        done = model("inspect", DEMO)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertRegex(done.stdout, r"(?m)^servable +true$")
        self.assertRegex(done.stdout, r"(?m)^tokenizer\.vocab +\d+$")

    def test_every_problem_is_named_with_file_and_field(self):
        with tempfile.TemporaryDirectory() as dir:
            for name in os.listdir(DEMO):
                if name != "model.safetensors":
                    shutil.copy(os.path.join(DEMO, name), dir)
            with open(os.path.join(dir, "config.json")) as file:
                config = json.load(file)
            config.update(num_attention_heads=-1, hidden_act="relu6", rope_scaling={"rope_type": "spiral", "factor": 2})
            with open(os.path.join(dir, "config.json"), "w") as file:
                json.dump(config, file)
            with open(os.path.join(dir, "tokenizer.json"), "a") as file:
                file.write("x")
            done = model("inspect", dir, "-o", "json")
            self.assertEqual(done.returncode, 2)
            problems = json.loads(done.stdout)["problems"]
            for part in ("num_attention_heads", "hidden_act", "tokenizer.json", "model.safetensors"):
                self.assertTrue(any(part in problem for problem in problems), f"{part} in {problems}")
            self.assertTrue(all("\n" not in problem and dir in problem for problem in problems), problems)
            self.assertEqual(len(done.stderr.splitlines()), len(problems))

    def test_missing_and_misshapen_tensors_are_all_named(self):
        with tempfile.TemporaryDirectory() as root:
            out = os.path.join(root, "m")
            done = model("synthesize", "--like", "llama", "--layers", "2", "--hidden", "64", "--vocab", "300", "--out", out)
            self.assertEqual(done.returncode, 0, done.stderr)
            with open(os.path.join(out, "config.json")) as file:
                config = json.load(file)
            config.update(num_hidden_layers=3, vocab_size=301)
            with open(os.path.join(out, "config.json"), "w") as file:
                json.dump(config, file)
            problems = json.loads(model("inspect", out, "-o", "json").stdout)["problems"]
            self.assertTrue(any("model.embed_tokens.weight" in p and "301" in p for p in problems), problems)
            self.assertEqual(sum("model.layers.2." in p for p in problems), 9, problems)

    def test_a_directory_that_is_not_there_is_a_usage_error(self):
        done = model("inspect", "/nowhere")
        self.assertEqual(done.returncode, 2)
        self.assertIn("/nowhere/config.json", done.stderr)


class SynthesizeTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.root = tempfile.mkdtemp(prefix="tidepool-synthesize-")
        help_text = model("synthesize", "--help").stdout
        table = help_text.split("Shapes for --like")[1]
        cls.shapes = re.findall(r"(?m)^  ([a-z0-9.-]+) +([a-z0-9_]+) +[0-9.]+B", table)

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.root, ignore_errors=True)

    def make(self, like, *more):
        out = os.path.join(self.root, like + "".join(more).replace("/", "_"))
        if not os.path.exists(out):
            tiny = ["--layers", "2", "--hidden", "64", "--intermediate", "96", "--vocab", "512", "--max-positions", "1024"]
            done = model("synthesize", "--like", like, "--out", out, *tiny, *more)
            self.assertEqual(done.returncode, 0, done.stderr)
        return out

    def test_help_lists_the_shapes(self):
        self.assertGreater(len(self.shapes), 12)
        self.assertGreaterEqual(
            {family for _, family in self.shapes},
            {"llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "phi3", "gemma", "gemma2", "gemma3"},
        )

    def test_every_family_is_servable(self):
        for family in sorted({family for _, family in self.shapes}):
            with self.subTest(family):
                done = model("inspect", self.make(family), "-o", "json")
                self.assertEqual(done.returncode, 0, done.stderr)
                report = json.loads(done.stdout)
                self.assertEqual(report["family"], family)
                self.assertEqual(report["weights"]["bytes"], 2 * report["parameters"])

    def test_the_result_is_served_at_once(self):
        for family in ("qwen3", "gemma2", "mixtral"):
            with self.subTest(family), Serve(BINARY, ["--model", self.make(family)]) as serve:
                body = {"model": serve.model(), "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
                reply = serve.post_json("/v1/chat/completions", dict(body, temperature=0, ignore_eos=True))
                self.assertEqual(reply["usage"]["completion_tokens"], 8)
                self.assertTrue(reply["choices"][0]["message"]["content"])

    def test_equal_seeds_give_equal_bytes(self):
        with open(os.path.join(self.make("llama"), "model.safetensors"), "rb") as file:
            first = file.read()
        with open(os.path.join(self.make("llama", "--seed=0"), "model.safetensors"), "rb") as file:
            self.assertEqual(file.read(), first)
        with open(os.path.join(self.make("llama", "--seed=1"), "model.safetensors"), "rb") as file:
            self.assertNotEqual(file.read(), first)

    def test_a_config_of_the_callers_is_taken(self):
        out = os.path.join(self.root, "from-config")
        config = os.path.join(DEMO, "config.json")
        done = model("synthesize", "--config", config, "--out", out, "--tokenizer", DEMO, "-o", "json")
        self.assertEqual(done.returncode, 0, done.stderr)
        made, demo = (json.loads(model("inspect", d, "-o", "json").stdout) for d in (out, DEMO))
        self.assertEqual(made["parameters"], demo["parameters"])
        self.assertEqual(made["tokenizer"]["sha256"], demo["tokenizer"]["sha256"])
        self.assertNotEqual(made["fingerprint"], demo["fingerprint"])

    def test_mistakes_are_one_line_and_exit_code_2(self):
        full = self.make("llama")
        out = os.path.join(self.root, "never")
        cases = [
            (["--like", "llama", "--out", full], "not empty"),
            (["--like", "llamma", "--out", out], "llama-3.2-1b"),
            (["--like", "llama", "--out", out, "--heads", "7"], "num_key_value_heads"),
            (["--like", "llama", "--out", out, "--size", "1X"], "--size"),
            (["--like", "llama", "--out", out, "--size", "1B", "--layers", "3"], "layers"),
            (["--config", "/nowhere.json", "--out", out], "/nowhere.json"),
            (["--like", "llama", "--out", out, "--vocab", "100", "--layers", "1"], "vocab_size"),
        ]
        for args, part in cases:
            with self.subTest(args):
                done = model("synthesize", *args)
                self.assertEqual(done.returncode, 2, done.stderr)
                self.assertEqual(len(done.stderr.splitlines()), 1, done.stderr)
                self.assertIn(part, done.stderr)
                self.assertFalse(os.path.exists(out))
        done = model("synthesize", "--like", "llama-3.1-70b", "--layers", "1024", "--dtype", "f32", "--out", out)
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, r"take [0-9.]+ GB, but only [0-9.]+ GB are free")
        self.assertEqual(model("synthesize", "--out", out).returncode, 2)


class TokenizeTest(unittest.TestCase):
    def test_lines_become_ids_and_ids_lines(self):
        rows = [{"text": "Hello <|end|>"}, {"text": "Hello", "add_special_tokens": False, "more": 1}]
        done = model("tokenize", DEMO, "--jsonl", stdin=jsonl(rows))
        self.assertEqual(done.returncode, 0, done.stderr)
        ids = [json.loads(line)["ids"] for line in done.stdout.splitlines()]
        self.assertEqual(ids[0][1 : 1 + len(ids[1])], ids[1])
        back = model("tokenize", DEMO, "--decode", stdin=jsonl([{"ids": i, "skip_special_tokens": False} for i in ids]))
        self.assertEqual([json.loads(line)["text"] for line in back.stdout.splitlines()][1], "Hello")
        skipped = model("tokenize", DEMO, "--decode", stdin=jsonl([{"ids": ids[0]}]))
        self.assertNotIn("<|end|>", json.loads(skipped.stdout)["text"])

    def test_one_text_from_the_command_line(self):
        done = model("tokenize", DEMO, "Hello", "-o", "json")
        self.assertEqual(done.returncode, 0, done.stderr)
        reply = json.loads(done.stdout)
        self.assertEqual(len(reply["ids"]), len(reply["tokens"]))
        self.assertIn(str(reply["ids"][-1]), model("tokenize", DEMO, "Hello").stdout)

    def test_a_bad_line_is_reported_in_its_place(self):
        done = model("tokenize", DEMO, "--jsonl", stdin='{"text":"a"}\n\n{"text":1}\nnot json\n[]\n{"text":"b"}')
        self.assertEqual(done.returncode, 1)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        self.assertEqual([sorted(line) for line in lines], [["ids"], ["error"], ["error"], ["error"], ["ids"]])
        self.assertIn("line 3: text", lines[1]["error"])
        self.assertIn("3 of 6 lines", done.stderr)

    def test_broken_text_reads_as_replacement_characters(self):
        lines = b'{"text":"a\\ud800b"}\n{"text":"a\xff\xfeb"}\n{"text":"a\\ufffdb"}\n{"text":"\\ud83d\\ude00\\\\ud800"}\n'
        done = model("tokenize", DEMO, "--jsonl", stdin=lines, text=False)
        self.assertEqual(done.returncode, 0, done.stderr)
        ids = [json.loads(line)["ids"] for line in done.stdout.splitlines()]
        self.assertEqual(ids[0], ids[2])
        texts = model("tokenize", DEMO, "--decode", stdin=jsonl({"ids": i} for i in ids)).stdout.splitlines()
        self.assertEqual([json.loads(t)["text"] for t in texts], ["a\ufffdb", "a\ufffd\ufffdb", "a\ufffdb", "😀\\ud800"])

    def test_answers_come_line_by_line(self):
        with subprocess.Popen(
            [BINARY, "model", "tokenize", DEMO, "--jsonl"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            for text in ("one", "two"):
                process.stdin.write(json.dumps({"text": text}).encode() + b"\n")
                process.stdin.flush()
                self.assertIn(b"ids", process.stdout.readline())
            process.stdin.close()
            self.assertEqual(process.wait(30), 0)

    def test_the_goldens_stream_through(self):
        golden = os.path.join(TOKENIZERS, "golden")
        if not os.path.isdir(golden):
            self.skipTest(f"{golden} is not here")
        for name in sorted(os.listdir(golden)):
            dir = os.path.join(TOKENIZERS, name.removesuffix(".jsonl"))
            with self.subTest(name):
                rows = read_jsonl(os.path.join(golden, name))
                done = model("tokenize", dir, "--jsonl", stdin=jsonl(rows))
                if done.returncode == 2:
                    self.assertIn("not supported", done.stderr)
                    continue
                got = [json.loads(line).get("ids") for line in done.stdout.splitlines()]
                wrong = [row["text"] for row, ids in zip(rows, got) if row["ids"] != ids]
                self.assertEqual((len(got), wrong[:3]), (len(rows), []))

    def test_a_directory_without_a_tokenizer_is_a_usage_error(self):
        done = model("tokenize", "/nowhere", "--jsonl", stdin="")
        self.assertEqual(done.returncode, 2)
        self.assertIn("tokenizer.json", done.stderr)
        self.assertEqual(model("tokenize", DEMO).returncode, 2)


class RenderTest(unittest.TestCase):
    def test_the_goldens_stream_through(self):
        golden = os.path.join(TEMPLATES, "golden", "golden_dev.jsonl")
        if not os.path.exists(golden):
            self.skipTest(f"{golden} is not here")
        with open(os.path.join(TEMPLATES, "golden", "cases_dev.json")) as file:
            setup = json.load(file)
        by_template = {}
        for row in read_jsonl(golden):
            by_template.setdefault(row["template"], []).append(row)
        for template, rows in by_template.items():
            requests = [
                dict(setup["cases"][row["case"]], bos_token=setup["bos_token"], eos_token=setup["eos_token"])
                for row in rows
            ]
            done = model(
                "render", os.path.join(TEMPLATES, template), "--jsonl", "--now", setup["strftime_now"],
                stdin=jsonl(requests),
            )
            if done.returncode == 2:  # it does not parse: then Jinja2 refuses it, too
                self.assertFalse(any(row["ok"] for row in rows), done.stderr)
                continue
            self.assertEqual(done.returncode, 0, done.stderr)
            for row, line in zip(rows, done.stdout.splitlines(), strict=True):
                got = json.loads(line)
                self.assertEqual(got["ok"], row["ok"], f"{template} {row['case']}")
                if row["ok"]:
                    self.assertEqual(got["text"], row["text"], f"{template} {row['case']}")
                else:
                    self.assertIn(row["error"], got["error"])

    def test_a_directory_brings_its_own_tokens(self):
        request = {"messages": [{"role": "user", "content": "Hi"}], "add_generation_prompt": True}
        wanted = "<|begin_of_text|><|user|>Hi<|end|><|assistant|>"
        for path in (DEMO, os.path.join(DEMO, "tokenizer_config.json")):
            done = model("render", path, stdin=json.dumps(request))
            self.assertEqual((done.returncode, done.stdout), (0, wanted), done.stderr)
        marked = json.loads(model("render", DEMO, "--jsonl", "--data", stdin=json.dumps(request)).stdout)
        self.assertEqual([wanted[b:e] for b, e in marked["data"]], ["Hi"])

    def test_refusals_are_answers_and_bad_lines_are_errors(self):
        with tempfile.NamedTemporaryFile("w", suffix=".jinja") as file:
            file.write("{% if x %}{{ x }}{% else %}{{ raise_exception('no x') }}{% endif %}{{ strftime_now('%H:%M') }}")
            file.flush()
            done = model("render", file.name, "--jsonl", "--now", "2025-07-10T12:34:00", stdin='{"x":1}\n{}\n')
            self.assertEqual(done.returncode, 0, done.stderr)
            lines = [json.loads(line) for line in done.stdout.splitlines()]
            self.assertEqual(lines[0], {"ok": True, "text": "112:34"})
            self.assertEqual(lines[1], {"ok": False, "error": "chat template line 1: TemplateError: no x"})
            done = model("render", file.name, "--jsonl", stdin="{\n")
            self.assertEqual(done.returncode, 1)
            self.assertFalse(json.loads(done.stdout)["ok"])
            self.assertEqual(model("render", file.name, stdin="{}").returncode, 1)
            self.assertEqual(model("render", file.name, "--now", "noon", stdin="{}").returncode, 2)

    def test_a_template_that_does_not_parse_is_a_usage_error(self):
        with tempfile.NamedTemporaryFile("w", suffix=".jinja") as file:
            file.write("\n{% if %}")
            file.flush()
            done = model("render", file.name, "--jsonl", stdin="{}")
            self.assertEqual(done.returncode, 2)
            self.assertIn(file.name, done.stderr)
            self.assertIn("line 2", done.stderr)
        self.assertEqual(model("render", "/nowhere.jinja", stdin="{}").returncode, 2)


if __name__ == "__main__":
    unittest.main()
