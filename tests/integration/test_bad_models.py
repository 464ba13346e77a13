"""Broken and hostile model directories: refused at the start, with exit code 2 and one line that names the file."""

import contextlib
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import tempfile
import time
import unittest

from harness import Serve
from support import BINARY, ROOT

DEMO = os.path.join(ROOT, "tools", "demo_model", "model")
# Until the error; the demo model itself takes well below a second to load. Generous for sanitizers.
SECONDS_MAX = 15


def demo(name):
    with open(os.path.join(DEMO, name), "rb") as file:
        return file.read()


def demo_json(name):
    return json.loads(demo(name))


def checkpoint_parts():
    """(header, data) of the demo model's weights."""
    raw = demo("model.safetensors")
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def checkpoint(header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@contextlib.contextmanager
def model_dir(**files):
    """The demo model with some files replaced: bytes, JSON, None (left out), or a function that makes the path."""
    names = {
        "config": "config.json",
        "generation": "generation_config.json",
        "weights": "model.safetensors",
        "index": "model.safetensors.index.json",
        "tokenizer": "tokenizer.json",
        "tokenizer_config": "tokenizer_config.json",
        "template": "chat_template.jinja",
        "shard": "shard.safetensors",
        "other_shard": "other.safetensors",
    }
    folder = tempfile.mkdtemp(prefix="tidepool-bad-")
    try:
        for name in os.listdir(DEMO):
            os.symlink(os.path.join(DEMO, name), os.path.join(folder, name))
        for key, content in files.items():
            path = os.path.join(folder, names[key])
            if os.path.lexists(path):
                os.unlink(path)
            if callable(content):
                content(path)
            elif content is not None:
                with open(path, "wb") as file:
                    file.write(content if isinstance(content, bytes) else json.dumps(content).encode())
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def changed(name, **fields):
    """A JSON file of the demo model with some fields replaced."""
    return {**demo_json(name), **fields}


def changed_model(**fields):
    root = demo_json("tokenizer.json")
    root["model"].update(fields)
    return root


class BadModelCase(unittest.TestCase):
    def refused(self, args, *wanted, env=None):
        """Runs `tidepool ARGS`: exit code 2 in time, and one line of error that holds all of `wanted`.

        `model inspect` lists all that is wrong, one line each: one of them has to.
        """
        started = time.monotonic()
        process = subprocess.Popen(
            [BINARY, *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**{k: v for k, v in os.environ.items() if not k.startswith("TIDEPOOL_")}, **(env or {})},
        )
        try:
            out, err = process.communicate(timeout=SECONDS_MAX)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            try:
                _, err = process.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                _, err = process.communicate()
            self.fail(f"{args}: no error within {SECONDS_MAX} s:\n{err.decode(errors='replace')}")
        text = err.decode(errors="replace")
        self.assertEqual(process.returncode, 2, f"{args} after {time.monotonic() - started:.1f} s:\n{text}")
        errors = [line for line in text.splitlines() if re.match(r"tidepool: |\S+ error ", line)]
        lines = [line for line in text.splitlines() if not re.match(r"\S+ (info|warning) ", line)]
        self.assertEqual(lines, errors, f"{args}:\n{text}")
        if args[:2] == ["model", "inspect"]:
            errors = [line for line in errors if all(word in line for word in wanted)][:1] or errors
        self.assertEqual(len(errors), 1, f"{args}:\n{text}")
        for word in wanted:
            self.assertIn(word, errors[0], args)
        self.assertNotRegex(text, "[\x00-\x09\x0b-\x1f\x7f]", args)
        self.assertLess(len(errors[0]), 2000, args)

    def model_refused(self, folder, *wanted, roles=("inspect", "worker", "serve")):
        """What reads a model directory refuses it: commands out of inspect, worker, gateway, serve."""
        scheduler = ["--cluster-scheduler", "127.0.0.1:9"]
        anywhere = ["--gateway-http-listen", "127.0.0.1:0", "--gateway-grpc-listen", "127.0.0.1:0"]
        commands = {
            "inspect": ["model", "inspect", folder],
            "worker": ["worker", "--role", "prefill", "--model", folder, *scheduler],
            "gateway": ["gateway", "--model", folder, *scheduler, *anywhere],
            "serve": ["serve", "--model", folder, *anywhere],
        }
        for role in roles:
            with self.subTest(role=role):
                self.refused(commands[role], *wanted)


TEXT_ROLES = ("inspect", "gateway", "serve")


class BadDirectoryTest(BadModelCase):
    def test_missing_and_empty_directories(self):
        self.model_refused("/nonexistent/model", "/nonexistent/model", roles=("inspect", "worker", "gateway", "serve"))
        with tempfile.TemporaryDirectory() as folder:
            self.model_refused(folder, folder, roles=("inspect", "worker", "gateway", "serve"))

    def test_a_file_instead_of_the_directory(self):
        self.model_refused(os.path.join(DEMO, "config.json"), "config.json")

    def test_missing_files(self):
        for key, name in (("config", "config.json"), ("tokenizer", "tokenizer.json"), ("weights", "model.safetensors")):
            with self.subTest(name), model_dir(**{key: None}) as folder:
                self.model_refused(folder, name)

    def test_directories_pipes_and_loops_instead_of_files(self):
        makers = {"directory": os.mkdir, "pipe": os.mkfifo, "loop": lambda path: os.symlink(path, path)}
        for key, name in (
            ("config", "config.json"),
            ("generation", "generation_config.json"),
            ("tokenizer", "tokenizer.json"),
            ("tokenizer_config", "tokenizer_config.json"),
            ("template", "chat_template.jinja"),
            ("weights", "model.safetensors"),
        ):
            for kind, make in makers.items():
                with self.subTest(f"{name} is a {kind}"), model_dir(**{key: make}) as folder:
                    self.model_refused(folder, name)

    def test_broken_links(self):
        for key, name in (("config", "config.json"), ("tokenizer", "tokenizer.json"), ("weights", "model.safetensors")):
            with self.subTest(name), model_dir(**{key: lambda path: os.symlink("/nonexistent/x", path)}) as folder:
                self.model_refused(folder, name)

    @unittest.skipIf(os.geteuid() == 0, "root reads everything")
    def test_unreadable_files(self):
        def unreadable(path):
            with open(path, "w"):
                pass
            os.chmod(path, 0)

        for key, name in (("config", "config.json"), ("tokenizer", "tokenizer.json"), ("weights", "model.safetensors")):
            with self.subTest(name), model_dir(**{key: unreadable}) as folder:
                self.model_refused(folder, name)

    def test_empty_files(self):
        for key, name in (
            ("config", "config.json"),
            ("generation", "generation_config.json"),
            ("tokenizer", "tokenizer.json"),
            ("tokenizer_config", "tokenizer_config.json"),
            ("weights", "model.safetensors"),
        ):
            with self.subTest(name), model_dir(**{key: b""}) as folder:
                self.model_refused(folder, name)

    def test_files_that_are_far_too_large(self):
        def sparse(path):
            with open(path, "wb") as file:
                file.truncate(1 << 40)

        for key, name in (
            ("config", "config.json"),
            ("tokenizer", "tokenizer.json"),
            ("tokenizer_config", "tokenizer_config.json"),
            ("template", "chat_template.jinja"),
            ("weights", "model.safetensors"),
        ):
            with self.subTest(name), model_dir(**{key: sparse}) as folder:
                self.model_refused(folder, name)


class BadCheckpointTest(BadModelCase):
    def weights_refused(self, raw, *wanted):
        with model_dir(weights=raw) as folder:
            self.model_refused(folder, "model.safetensors", *wanted)

    def test_header_lengths(self):
        header, data = checkpoint_parts()
        for length in (2**63, 2**64 - 1, 2**64 - 8, 100_000_001, len(data) + 10**6):
            with self.subTest(length=length):
                self.weights_refused(checkpoint(header, data, length), "header")

    def test_headers_that_are_no_json_object(self):
        for header in (b"", b"[]", b"{", b"\xff\xfe{}", b"[" * 100_000, b'{"a":' * 100_000, b"null", b'{"a":1e999}'):
            with self.subTest(header=header[:20]):
                self.weights_refused(checkpoint(header, b""))

    def test_truncated(self):
        raw = demo("model.safetensors")
        for size in (1, 7, 8, 100, len(raw) // 2, len(raw) - 1):
            with self.subTest(size=size):
                self.weights_refused(raw[:size])

    def test_tensors_that_overlap_or_leave_holes(self):
        name = "model.norm.weight"
        for change in ("overlap", "hole", "backwards", "beyond", "trailing"):
            header, data = checkpoint_parts()
            begin, end = header[name]["data_offsets"]
            if change == "overlap":
                other = next(t for n, t in header.items() if n not in (name, "__metadata__") and t["data_offsets"][0])
                header[name]["data_offsets"] = [other["data_offsets"][0], other["data_offsets"][0] + end - begin]
            elif change == "hole":
                header[name]["data_offsets"] = [len(data) + 64, len(data) + 64 + end - begin]
                data += bytes(64 + end - begin)
            elif change == "backwards":
                header[name]["data_offsets"] = [end, begin]
            elif change == "beyond":
                header[name]["data_offsets"] = [2**62, 2**62 + end - begin]
            else:
                data += b"x"
            with self.subTest(change):
                self.weights_refused(checkpoint(header, data), *([name] if change in ("backwards", "beyond") else []))

    def test_shapes(self):
        name = "model.norm.weight"
        for shape in (
            [4194305, 4194305, 211106198978564],
            [-1],
            [2**64],
            ["192"],
            [192.0],
            [191],
            [2, 96],
            None,
            [1] * 100,
        ):
            header, data = checkpoint_parts()
            header[name]["shape"] = shape
            with self.subTest(shape=shape):
                self.weights_refused(checkpoint(header, data), name)

    def test_dtypes(self):
        name = "model.norm.weight"
        for dtype in ("Q4_K", "", 7, None, "bf16"):
            header, data = checkpoint_parts()
            header[name]["dtype"] = dtype
            with self.subTest(dtype=dtype):
                self.weights_refused(checkpoint(header, data), name)

    def test_dtypes_that_are_known_but_not_computed(self):
        header, data = checkpoint_parts()
        header["model.norm.weight"]["dtype"] = "I16"
        self.weights_refused(checkpoint(header, data), "model.norm.weight", "I16")

    def test_a_tensor_less(self):
        header, data = checkpoint_parts()
        header["model.something.else"] = header.pop("model.norm.weight")
        self.weights_refused(checkpoint(header, data), "model.norm.weight")

    def test_names_that_would_garble_a_terminal(self):
        header, data = checkpoint_parts()
        header["\x1b[31m\nok \u202e"] = {"dtype": "BF16", "shape": [1], "data_offsets": [0, 99]}
        self.weights_refused(checkpoint(header, data))

    def test_sparse_file_with_a_good_header(self):
        header, data = checkpoint_parts()

        def sparse(path):
            with open(path, "wb") as file:
                file.write(checkpoint(header, b""))
                file.truncate(1 << 40)

        with model_dir(weights=sparse) as folder:
            self.model_refused(folder, "model.safetensors")

    def test_indices(self):
        raw = demo("model.safetensors")
        names = [name for name in checkpoint_parts()[0] if name != "__metadata__"]
        shard = {name: "shard.safetensors" for name in names}
        cases = {
            "missing shard": ({"weight_map": {**shard, names[0]: "nowhere.safetensors"}}, "nowhere.safetensors"),
            "traversal": ({"weight_map": {**shard, names[0]: "../../../../../../etc/passwd"}}, "passwd"),
            "absolute path": ({"weight_map": {**shard, names[0]: "/etc/passwd"}}, "passwd"),
            "parent folder": ({"weight_map": {**shard, names[0]: ".."}}, names[0]),
            "number": ({"weight_map": {**shard, names[0]: 3}}, names[0]),
            "tensor elsewhere": ({"weight_map": {**shard, "model.extra": "shard.safetensors"}}, "model.extra"),
            "list": ({"weight_map": []}, "weight_map"),
            "nothing": ({}, "weight_map"),
            "not JSON": (b"{", "index.json"),
            "key twice": (b'{"weight_map":{"a":"shard.safetensors","a":"shard.safetensors"}}', "index.json"),
            "deep": (b'{"weight_map":' + b"[" * 100_000, "index.json"),
            "empty map": ({"weight_map": {}}, "model."),
        }
        for case, (index, word) in cases.items():
            with self.subTest(case), model_dir(weights=None, shard=raw, index=index) as folder:
                self.model_refused(folder, word)

    def test_shards(self):
        raw = demo("model.safetensors")
        names = [name for name in checkpoint_parts()[0] if name != "__metadata__"]
        index = {"weight_map": {name: "shard.safetensors" for name in names}}
        index["weight_map"][names[0]] = "other.safetensors"
        for case, other in {"empty": b"", "truncated": raw[:-1], "without the tensor": checkpoint({}, b"")}.items():
            with self.subTest(case), model_dir(weights=None, shard=raw, other_shard=other, index=index) as folder:
                self.model_refused(folder, "other.safetensors")

    def test_other_formats(self):
        for magic in (
            b"GGUF\x03\0\0\0" + bytes(64),
            b"PK\x03\x04" + bytes(64),
            b"\x80\x02}q\0" + bytes(64),
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        ):
            with self.subTest(magic=magic[:8]):
                self.weights_refused(magic)


class BadConfigTest(BadModelCase):
    def config_refused(self, content, *wanted):
        with model_dir(config=content) as folder:
            self.model_refused(folder, "config.json", *wanted)

    def test_not_json(self):
        for content in (
            b"{",
            b"[]",
            b"null",
            b"\xff",
            b"{'a': 1}",
            b"[" * 100_000,
            b'{"a":' * 100_000,
            b'{"vocab_size":1,"vocab_size":2}',
        ):
            with self.subTest(content=content[:20]):
                self.config_refused(content)

    def test_fields(self):
        for field, value in {
            "architectures": ["GPT2LMHeadModel"],
            "num_hidden_layers": 0,
            "hidden_size": 2**32 + 192,
            "num_attention_heads": -4,
            "num_key_value_heads": 3,
            "head_dim": 63,
            "vocab_size": "1280",
            "intermediate_size": 1e300,
            "max_position_embeddings": 2**40,
            "rms_norm_eps": -1,
            "rope_theta": 0,
            "hidden_act": "tanhshrink",
            "eos_token_id": [-7],
            "quantization_config": {"quant_method": "awq", "bits": 4},
            "rope_scaling": {"rope_type": "spiral", "factor": 2},
        }.items():
            with self.subTest(field):
                self.config_refused(changed("config.json", **{field: value}), field)

    def test_fields_that_are_missing(self):
        for field in ("architectures", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
            config = demo_json("config.json")
            del config[field]
            with self.subTest(field):
                self.config_refused(config, field)

    def test_numbers_that_json_lets_through(self):
        text = json.dumps(demo_json("config.json"))
        for number in ("1e400", "NaN", "-Infinity"):
            with self.subTest(number):
                self.config_refused(text.replace("1e-05", number).encode())

    def test_a_shape_that_the_weights_do_not_have(self):
        with model_dir(config=changed("config.json", hidden_size=256, head_dim=64)) as folder:
            self.model_refused(folder, "model.safetensors", "shape")

    def test_more_layers_than_the_weights_have(self):
        with model_dir(config=changed("config.json", num_hidden_layers=1024)) as folder:
            self.model_refused(folder, "model.safetensors", "model.layers.4.")

    def test_generation_config(self):
        for content in (b"[]", b"{", {"eos_token_id": "x"}):
            with self.subTest(content=content), model_dir(generation=content) as folder:
                self.model_refused(folder, "generation_config.json")

    def test_max_model_len_above_the_model(self):
        for role in (["worker", "--role", "both", "--cluster-scheduler", "127.0.0.1:9"], ["serve"]):
            with self.subTest(role=role[0]):
                self.refused([*role, "--model", DEMO, "--model-max-model-len", "999999"], "max_model_len", "2048")


class BadTokenizerTest(BadModelCase):
    def tokenizer_refused(self, content, *wanted):
        with model_dir(tokenizer=content) as folder:
            self.model_refused(folder, "tokenizer.json", *wanted, roles=("inspect", "worker", "gateway", "serve"))

    def test_not_json(self):
        for content in (
            b"{",
            b"[]",
            b"null",
            b"\xff",
            b"[" * 100_000,
            b'{"a":' * 100_000,
            demo("tokenizer.json")[:-50],
        ):
            with self.subTest(content=content[:20]):
                self.tokenizer_refused(content)

    def test_models(self):
        cases = {
            "model": {**demo_json("tokenizer.json"), "model": None},
            "model.vocab": changed_model(vocab=None),
            "model.merges": changed_model(merges=None),
            "merges[0]": changed_model(merges=[["nope\x1b[2J", "missing"]]),
            "type": changed_model(type="Wörterbuch"),
            "vocab": changed_model(vocab={"a": 2**70}, merges=[]),
            "id 0": changed_model(vocab={"a": 0, "b": 0}, merges=[]),
            "unk_token": changed_model(unk_token="nope"),
        }
        for field, content in cases.items():
            with self.subTest(field):
                self.tokenizer_refused(content, field)

    def test_components(self):
        for field, node in {
            "normalizer": {"type": "Scramble"},
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"},
            "post_processor": {"type": "TemplateProcessing", "single": []},
            "decoder": {"type": "Strip", "content": "", "start": 1, "stop": 0},
            "added_tokens": [{"id": -1, "content": "x"}],
        }.items():
            with self.subTest(field):
                self.tokenizer_refused({**demo_json("tokenizer.json"), field: node}, field)

    def test_tokenizer_config(self):
        for content in (
            b"{",
            b"[]",
            changed("tokenizer_config.json", eos_token="<nope>"),
            changed("tokenizer_config.json", chat_template=7),
        ):
            with self.subTest(content=content), model_dir(tokenizer_config=content) as folder:
                self.model_refused(folder, "tokenizer_config.json", roles=("inspect", "worker", "gateway", "serve"))


class BadTemplateTest(BadModelCase):
    def test_templates_that_do_not_parse(self):
        for source in (
            b"{% for m in messages %}",
            b"{{ 1 +",
            b"{% include '/etc/passwd' %}",
            b"{{ '" + b"x" * (2 << 20),
            b"{{ " + b"(" * 100_000,
        ):
            with self.subTest(source=source[:20]), model_dir(template=source) as folder:
                self.model_refused(folder, folder, "chat template", roles=TEXT_ROLES)

    # A template that parses and then fails concerns the requests that use it, as with other servers: they are
    # answered 400, the rest of the server works.
    def rendering_fails(self, source, *words):
        with model_dir(template=source) as folder, Serve(BINARY, ["--model", folder]) as serve:
            model = serve.model()
            started = time.monotonic()
            status, _, reply = serve.post(
                "/v1/chat/completions",
                {"model": model, "max_tokens": 4, "messages": [{"role": "user", "content": "Hi"}]},
            )
            self.assertEqual(status, 400, reply)
            self.assertLess(time.monotonic() - started, 10)
            for word in words:
                self.assertIn(word, reply["error"]["message"])
            reply = serve.post_json("/v1/completions", {"model": model, "prompt": "Hello", "max_tokens": 4})
            self.assertEqual(len(reply["choices"]), 1)

    def test_a_template_that_loops_for_ever_answers_400(self):
        self.rendering_fails(
            b"{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
            b"{% endfor %}{% endfor %}{% endfor %}",
            "chat template",
        )

    def test_a_template_that_writes_a_gigabyte_answers_400(self):
        self.rendering_fails(b"{{ 'x' * 1073741824 }}", "chat template")

    def test_a_template_that_calls_itself_answers_400(self):
        self.rendering_fails(b"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "chat template")


class VocabularyTest(unittest.TestCase):
    # Common with fine-tuned models: a padding token beyond the embedding. It serves; only a prompt that holds
    # such a token is refused.
    def test_a_tokenizer_larger_than_the_embedding_serves(self):
        tokenizer = demo_json("tokenizer.json")
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 1280, "content": "<|extra|>"})
        with model_dir(tokenizer=tokenizer) as folder, Serve(BINARY, ["--model", folder]) as serve:
            model = serve.model()
            body = {"model": model, "prompt": "Hello", "max_tokens": 4}
            self.assertEqual(serve.post("/v1/completions", body)[0], 200)
            for prompt in ([1280], "a <|extra|> b"):
                status, _, reply = serve.post("/v1/completions", {**body, "prompt": prompt})
                self.assertEqual(status, 400, reply)
                self.assertIn("1280", reply["error"]["message"])
            # What a user of the chat writes is text, never that token.
            chat = {"model": model, "max_tokens": 4, "messages": [{"role": "user", "content": "a <|extra|> b"}]}
            self.assertEqual(serve.post("/v1/chat/completions", chat)[0], 200)
            self.assertEqual(serve.post("/v1/completions", body)[0], 200)


if __name__ == "__main__":
    unittest.main()
