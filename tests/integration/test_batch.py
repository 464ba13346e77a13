"""Batches: `tidepool run-batch`, and /v1/files with /v1/batches on the gateway."""

import hashlib
import http.client
import json
import os
import random
import signal
import stat
import subprocess
import tempfile
import threading
import time
import unittest

from harness import Serve, alive, eventually
from support import BINARY, EXACT, ServeCase, passage


def line(custom_id, prompt, url="/v1/completions", **body):
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True, **body}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


def lines(count, tokens=8, prefix=""):
    return [line(f"line-{i}", f"{prefix}Say the number {i}.", max_tokens=tokens) for i in range(count)]


def text_of_file(path):
    with open(path) as file:
        return file.read()


def read_output(path):
    """{custom_id: line} of an output; every line is whole, and no custom_id is there twice."""
    out = {}
    text = text_of_file(path)
    assert text == "" or text.endswith("\n"), "the last line is torn"
    for row in text.splitlines():
        answer = json.loads(row)
        key = answer["custom_id"] if answer["custom_id"] is not None else answer["error"]["line"]
        assert key not in out, f"{key} is there twice"
        out[key] = answer
    return out


class RunBatch(ServeCase):
    """`run-batch --endpoint` against a running serve."""

    args = EXACT

    def setUp(self):
        self.dir = self.enterContext(tempfile.TemporaryDirectory())
        self.input = os.path.join(self.dir, "in.jsonl")
        self.output = os.path.join(self.dir, "out.jsonl")

    def write(self, rows, path=None):
        with open(path or self.input, "w") as file:
            file.write("\n".join(rows) + "\n")

    def command(self, *args):
        return [BINARY, "run-batch", "-i", self.input, "-o", self.output, "--endpoint", f"http://{self.serve.http}", *args]

    def run_batch(self, *args, env=None):
        return subprocess.run(
            self.command(*args), capture_output=True, text=True, timeout=120, env=dict(os.environ, **(env or {}))
        )

    def test_every_line_is_answered_as_the_endpoint_answers(self):
        rows = lines(20)
        chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "temperature": 0}
        rows.append(
            json.dumps({"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions", "body": chat})
        )
        self.write(rows)
        done = self.run_batch()
        self.assertEqual(done.returncode, 0, done.stderr)
        output = read_output(self.output)
        self.assertEqual(len(output), 21)
        answer = output["line-3"]
        self.assertIsNone(answer["error"])
        self.assertEqual(answer["response"]["status_code"], 200)
        self.assertTrue(answer["response"]["request_id"])
        direct = self.serve.post_json("/v1/completions", json.loads(rows[3])["body"])
        self.assertEqual(answer["response"]["body"]["choices"][0]["text"], direct["choices"][0]["text"])
        self.assertEqual(output["chat"]["response"]["body"]["object"], "chat.completion")
        self.assertEqual(stat.S_IMODE(os.stat(self.output).st_mode), 0o600)

    def test_errors_are_lines_and_the_exit_code_tells(self):
        good = lines(2)
        self.write(
            [
                good[0],
                "this is no JSON",
                line("long", "x", max_tokens=10**7),
                json.dumps({"custom_id": "where", "method": "POST", "url": "/v1/moon", "body": {}}),
                good[1],
                line("streamed", "x", stream=True),
            ]
        )
        done = self.run_batch()
        self.assertEqual(done.returncode, 1, done.stderr)
        output = read_output(self.output)
        self.assertEqual(len(output), 6)
        self.assertEqual(output["line-0"]["response"]["status_code"], 200)
        self.assertEqual(output["line-1"]["response"]["status_code"], 200)
        self.assertEqual(output[2]["error"]["code"], "invalid_json_line")
        self.assertEqual(output["long"]["response"]["status_code"], 400)
        self.assertEqual(output["long"]["response"]["body"]["error"]["param"], "max_tokens")
        self.assertEqual(output["where"]["error"]["code"], "invalid_url")
        self.assertIn("stream", output["streamed"]["error"]["message"])
        # Started again there is nothing to do, and the failures still tell.
        before = text_of_file(self.output)
        self.assertEqual(self.run_batch().returncode, 1)
        self.assertEqual(text_of_file(self.output), before)

    def test_killed_at_any_moment_it_loses_and_repeats_nothing(self):
        count = 500
        self.write(lines(count, tokens=24) + ["not json"])
        rng = random.Random(4)
        kills = 0
        while True:
            process = subprocess.Popen(
                self.command("--concurrency", "8"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            try:
                process.wait(rng.uniform(0.05, 0.4) if kills < 12 else 120)
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
        self.assertGreaterEqual(kills, 4)
        self.assertEqual(process.returncode, 1)  # "not json"
        output = read_output(self.output)
        self.assertEqual(set(output), {f"line-{i}" for i in range(count)} | {count + 1})

    def test_a_signal_stops_it_in_order(self):
        self.write(lines(300, tokens=16))
        process = subprocess.Popen(self.command("--concurrency", "4"), stderr=subprocess.PIPE, text=True)
        eventually(lambda: os.path.exists(self.output) and os.path.getsize(self.output) > 0, 30, "a first answer")
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=30)
        self.assertEqual(process.returncode, 1)
        self.assertIn("lines left", stderr)
        self.assertLess(len(read_output(self.output)), 300)
        self.assertEqual(self.run_batch().returncode, 0)
        self.assertEqual(len(read_output(self.output)), 300)

    def test_ordered_output_follows_the_input(self):
        rows = lines(40)
        random.Random(1).shuffle(rows)
        self.write(rows)
        done = self.run_batch("--ordered")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(list(read_output(self.output)), [json.loads(row)["custom_id"] for row in rows])
        self.assertFalse(os.path.exists(self.output + ".unordered"))
        before = text_of_file(self.output)
        self.assertEqual(self.run_batch("--ordered").returncode, 0)
        self.assertEqual(text_of_file(self.output), before)

    def test_usage_errors_are_exit_code_2_and_touch_nothing(self):
        rows = lines(3)
        self.write(rows + [rows[1]])
        done = self.run_batch()
        self.assertEqual(done.returncode, 2)
        self.assertIn(":4:", done.stderr)
        self.assertIn("line 2", done.stderr)
        self.assertFalse(os.path.exists(self.output))

        self.write(rows)
        with open(self.output, "w") as file:
            file.write("precious\n")
        self.assertEqual(self.run_batch().returncode, 2)
        self.assertEqual(text_of_file(self.output), "precious\n")
        os.unlink(self.output)

        self.assertEqual(self.run_batch().returncode, 0)
        self.write(lines(4))
        done = self.run_batch()
        self.assertEqual(done.returncode, 2)
        self.assertIn("another input", done.stderr)
        self.assertEqual(len(read_output(self.output)), 3)

        os.unlink(self.input)
        self.assertEqual(self.run_batch().returncode, 2)
        self.assertEqual(self.run_batch("--api-key-env", "NO_SUCH_VARIABLE").returncode, 2)
        self.write(rows)
        self.assertEqual(self.run_batch("--engine-threads", "1").returncode, 2)

    def test_a_second_run_on_the_same_output_is_refused(self):
        self.write(lines(300, tokens=16))
        first = subprocess.Popen(self.command("--concurrency", "2"), stderr=subprocess.DEVNULL)
        try:
            eventually(lambda: os.path.exists(self.output) and os.path.getsize(self.output) > 0, 30, "a first answer")
            second = self.run_batch()
            self.assertEqual(second.returncode, 2)
            self.assertIn("another process", second.stderr)
        finally:
            first.kill()
            first.wait()

    def test_an_endpoint_that_comes_late_is_waited_for(self):
        self.write(lines(2))
        args = ["--endpoint", "http://127.0.0.1:9", "--retry-for", "1s"]
        done = subprocess.run(
            [BINARY, "run-batch", "-i", self.input, "-o", self.output, *args],
            capture_output=True,
            text=True,
            timeout=60,
        )
        self.assertEqual(done.returncode, 1)
        self.assertEqual(os.path.getsize(self.output), 0)
        self.assertEqual(self.run_batch().returncode, 0)


class RunBatchCluster(unittest.TestCase):
    """`run-batch` with a cluster of its own."""

    def setUp(self):
        self.dir = self.enterContext(tempfile.TemporaryDirectory())
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("TIDEPOOL_")}
        self.env.update(XDG_RUNTIME_DIR=self.dir, XDG_STATE_HOME=self.dir)
        self.input = os.path.join(self.dir, "in.jsonl")
        self.output = os.path.join(self.dir, "out.jsonl")
        with open(self.input, "w") as file:
            file.write("\n".join(lines(400, tokens=16)) + "\n")

    def command(self):
        return [BINARY, "run-batch", "-i", self.input, "-o", self.output]

    def serves(self):
        folder = os.path.join(self.dir, "tidepool")
        out = []
        for name in os.listdir(folder) if os.path.isdir(folder) else []:
            if name.endswith(".json"):
                with open(os.path.join(folder, name)) as file:
                    runtime = json.load(file)
                out += [runtime["pid"]] + [child["pid"] for child in runtime["children"]]
        return [pid for pid in out if pid and alive(pid)]

    def test_it_starts_a_cluster_and_takes_it_away_again(self):
        first = subprocess.Popen(self.command(), env=self.env, stderr=subprocess.PIPE, text=True)
        eventually(lambda: os.path.exists(self.output) and os.path.getsize(self.output) > 0, 60, "a first answer")
        pids = self.serves()
        self.assertEqual(len(pids), 5)
        first.kill()
        first.communicate()
        eventually(lambda: not any(alive(pid) for pid in pids), 30, "the cluster is gone with its command")
        done = subprocess.run(self.command(), env=self.env, capture_output=True, text=True, timeout=180)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(len(read_output(self.output)), 400)
        self.assertEqual(self.serves(), [])


class Api:
    """/v1/files and /v1/batches with one key."""

    def __init__(self, serve, key=None):
        self.serve = serve
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}

    def request(self, method, path, body=None, headers=None, timeout=60):
        host, port = self.serve.http.rsplit(":", 1)
        connection = http.client.HTTPConnection(host, int(port), timeout=timeout)
        try:
            connection.request(method, path, body, {**self.headers, **(headers or {})})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def json(self, method, path, body=None, status=200):
        data = None if body is None else json.dumps(body)
        got, answer = self.request(method, path, data, {"Content-Type": "application/json"})
        assert got == status, f"{method} {path}: {got} {answer!r}"
        return json.loads(answer)

    def upload(self, text, status=200, filename="in.jsonl", **fields):
        boundary = "----------------boundary"
        parts = {"purpose": "batch", **fields}
        body = "".join(
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
            for name, value in parts.items()
        )
        body += (
            f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{filename}"\r\n'
            "Content-Type: application/jsonl\r\n\r\n"
        )
        data = body.encode() + (text if isinstance(text, bytes) else text.encode()) + f"\r\n--{boundary}--\r\n".encode()
        got, answer = self.request(
            "POST", "/v1/files", data, {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        )
        assert got == status, f"POST /v1/files: {got} {answer!r}"
        return json.loads(answer)

    def create(self, rows, endpoint="/v1/completions", **fields):
        file = self.upload("\n".join(rows) + "\n")
        body = {"input_file_id": file["id"], "endpoint": endpoint, "completion_window": "24h", **fields}
        return self.json("POST", "/v1/batches", body)

    def batch(self, batch_id):
        return self.json("GET", f"/v1/batches/{batch_id}")

    def wait(self, batch_id, *statuses, seconds=90):
        def reached():
            try:
                batch = self.batch(batch_id)
            except (OSError, AssertionError):
                return None  # the gateway restarts
            return batch if batch["status"] in (statuses or ("completed",)) else None

        return eventually(reached, seconds, f"{batch_id} is {statuses or 'completed'}")

    def content(self, file_id):
        status, body = self.request("GET", f"/v1/files/{file_id}/content")
        assert status == 200, body
        out = {}
        for row in body.decode().splitlines():
            answer = json.loads(row)
            assert answer["custom_id"] not in out, "twice"
            out[answer["custom_id"]] = answer
        return out


class Batches(ServeCase):
    def setUp(self):
        self.api = Api(self.serve)

    def test_a_batch_from_upload_to_output(self):
        rows = lines(30) + [line("too-long", "x", max_tokens=10**7)]
        batch = self.api.create(rows, metadata={"team": "a"})
        self.assertEqual(batch["object"], "batch")
        self.assertIn(batch["status"], ("validating", "in_progress"))
        self.assertEqual(batch["expires_at"] - batch["created_at"], 24 * 3600)
        done = self.api.wait(batch["id"])
        self.assertEqual(done["request_counts"], {"total": 31, "completed": 30, "failed": 1})
        self.assertEqual(done["metadata"], {"team": "a"})
        self.assertIsNone(done["errors"])
        for field in ("in_progress_at", "finalizing_at", "completed_at"):
            self.assertGreaterEqual(done[field], done["created_at"])
        output = self.api.content(done["output_file_id"])
        self.assertEqual(set(output), {f"line-{i}" for i in range(30)})
        self.assertEqual(output["line-0"]["response"]["body"]["usage"]["completion_tokens"], 8)
        errors = self.api.content(done["error_file_id"])
        self.assertEqual(errors["too-long"]["response"]["status_code"], 400)
        file = self.api.json("GET", f"/v1/files/{done['output_file_id']}")
        self.assertEqual(file["purpose"], "batch_output")
        metrics = self.serve.metrics("gateway")
        self.assertGreaterEqual(metrics["tidepool_batch_lines_total"][(("result", "completed"),)], 30)
        self.assertEqual(metrics["tidepool_batch_inflight"][()], 0)

    def test_other_endpoints(self):
        chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        for url, body in (
            ("/v1/chat/completions", chat),
            ("/v1/embeddings", {"input": "a b c"}),
            ("/v1/responses", {"input": "Hello", "max_output_tokens": 16}),
        ):
            with self.subTest(url=url):
                row = json.dumps({"custom_id": "a", "method": "POST", "url": url, "body": body})
                done = self.api.wait(self.api.create([row], url)["id"])
                answer = self.api.content(done["output_file_id"] or done["error_file_id"])["a"]["response"]
                # As it is answered online, whatever this model can do.
                status, _, direct = self.serve.post(url, body)
                self.assertEqual(answer["status_code"], status)
                self.assertEqual(answer["body"].keys(), direct.keys())

    def test_a_wrong_input_fails_with_its_lines(self):
        rows = lines(3)
        batch = self.api.create([rows[0], "no json", rows[0], line("x", "y", url="/v1/chat/completions"), rows[2]])
        failed = self.api.wait(batch["id"], "failed")
        errors = {error["line"]: error["code"] for error in failed["errors"]["data"]}
        self.assertEqual(errors, {2: "invalid_json_line", 3: "duplicate_custom_id", 4: "mismatched_url"})
        self.assertIsNone(failed["output_file_id"])
        self.assertEqual(self.api.wait(self.api.create([""])["id"], "failed")["errors"]["data"][0]["code"], "empty_file")

    def test_what_is_wrong_with_a_request_is_named(self):
        file = self.api.upload("x\n")
        good = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        for change, param in (
            ({"completion_window": "1h"}, "completion_window"),
            ({"endpoint": "/v1/moon"}, "endpoint"),
            ({"input_file_id": None}, "input_file_id"),
            ({"metadata": {"a": 1}}, "metadata"),
            ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "seconds"),
        ):
            with self.subTest(param=param):
                error = self.api.json("POST", "/v1/batches", {**good, **change}, status=400)["error"]
                self.assertEqual(error["param"], param)
        self.api.json("POST", "/v1/batches", {**good, "input_file_id": "file-none"}, status=404)
        self.assertEqual(self.api.upload("x", status=400, purpose="fine-tune")["error"]["param"], "purpose")
        self.api.json("GET", "/v1/batches/batch_none", status=404)
        self.api.json("POST", "/v1/batches/batch_none/cancel", {}, status=404)
        for path in ("../tenant.json", "%2e%2e%2flock", "file-"):
            self.api.json("GET", f"/v1/files/{path}", status=404)
        for content_type in ("application/json", "multipart/form-data", "multipart/form-data; boundary=x"):
            status, _ = self.api.request("POST", "/v1/files", b"{}", {"Content-Type": content_type})
            self.assertEqual(status, 400)

    def test_files_are_listed_shown_and_deleted(self):
        ids = [self.api.upload(f"{i}\n", filename=f"f{i}.jsonl")["id"] for i in range(3)]
        listed = self.api.json("GET", "/v1/files?purpose=batch&order=asc")
        self.assertTrue(set(ids) <= {file["id"] for file in listed["data"]})
        page = self.api.json("GET", "/v1/files?limit=1&order=asc")
        self.assertEqual(len(page["data"]), 1)
        self.assertTrue(page["has_more"])
        following = self.api.json("GET", f"/v1/files?limit=1&order=asc&after={page['last_id']}")
        self.assertNotEqual(following["data"][0]["id"], page["data"][0]["id"])
        file = self.api.json("GET", f"/v1/files/{ids[1]}")
        self.assertEqual((file["object"], file["bytes"], file["filename"]), ("file", 2, "f1.jsonl"))
        self.assertEqual(self.api.request("GET", f"/v1/files/{ids[1]}/content"), (200, b"1\n"))
        self.assertTrue(self.api.json("DELETE", f"/v1/files/{ids[1]}")["deleted"])
        self.api.json("GET", f"/v1/files/{ids[1]}", status=404)
        self.api.json("GET", "/v1/files?limit=0", status=400)
        self.api.json("GET", "/v1/files?after=file-none", status=400)

    def test_a_file_larger_than_a_request_body_goes_through_the_disk(self):
        def peak_kib():
            with open(f"/proc/{self.serve.children()['gateway']['pid']}/status") as status:
                return int(next(row for row in status if row.startswith("VmHWM")).split()[1])

        self.api.upload("warm up")
        before = peak_kib()
        data = random.Random(2).randbytes(48 << 20)
        file = self.api.upload(data)
        self.assertEqual(file["bytes"], len(data))
        status, got = self.api.request("GET", f"/v1/files/{file['id']}/content")
        self.assertEqual(status, 200)
        self.assertTrue(got == data)
        self.assertLess(peak_kib() - before, 16 << 10)
        self.api.json("DELETE", f"/v1/files/{file['id']}")

    def test_batches_are_listed_in_pages(self):
        ids = {self.api.create(lines(1))["id"] for _ in range(3)}
        seen, after = [], ""
        while True:
            page = self.api.json("GET", f"/v1/batches?limit=2{after}")
            seen += [batch["id"] for batch in page["data"]]
            if not page["has_more"]:
                break
            after = f"&after={page['last_id']}"
        self.assertTrue(ids <= set(seen))
        self.assertEqual(len(seen), len(set(seen)))

    def test_a_cancelled_batch_keeps_what_it_has(self):
        batch = self.api.create(lines(400, tokens=32))
        eventually(lambda: self.api.batch(batch["id"])["request_counts"]["completed"] > 0, 60, "a first answer")
        busy = self.api.json("DELETE", f"/v1/files/{batch['input_file_id']}", status=400)
        self.assertIn("cancel", busy["error"]["message"])
        self.assertIn(self.api.json("POST", f"/v1/batches/{batch['id']}/cancel")["status"], ("cancelling", "cancelled"))
        done = self.api.wait(batch["id"], "cancelled")
        counts = done["request_counts"]
        self.assertLess(counts["completed"], 400)
        self.assertEqual(len(self.api.content(done["output_file_id"])), counts["completed"])
        self.api.json("POST", f"/v1/batches/{batch['id']}/cancel", status=400)
        self.api.json("DELETE", f"/v1/files/{batch['input_file_id']}")

    def test_a_killed_gateway_goes_on_where_it_was(self):
        batch = self.api.create(lines(300, tokens=12))
        for round_number in range(3):
            target = 60 * (round_number + 1)

            def far_enough():
                try:
                    now = self.api.batch(batch["id"])
                except (OSError, AssertionError):
                    return False
                return now["request_counts"]["completed"] >= target or now["status"] == "completed"

            eventually(far_enough, 60, f"{target} lines are answered")
            pid = self.serve.kill("gateway")
            self.serve.wait_restarted("gateway", pid)
        done = self.api.wait(batch["id"])
        self.assertEqual(done["request_counts"], {"total": 300, "completed": 300, "failed": 0})
        self.assertEqual(set(self.api.content(done["output_file_id"])), {f"line-{i}" for i in range(300)})
        self.assertIsNone(done["error_file_id"])


class BatchesYield(ServeCase):
    """A saturating batch beside online requests."""

    env = {"TIDEPOOL_GATEWAY_BATCH_MAX_INFLIGHT": "16", "TIDEPOOL_GATEWAY_MAX_INFLIGHT": "16"}

    def test_online_requests_are_served_while_a_batch_runs(self):
        api = Api(self.serve)
        batch = api.create(lines(2000, tokens=48))

        def inflight():
            return self.serve.metrics("gateway")["tidepool_batch_inflight"][()]

        eventually(lambda: inflight() >= 12, 60, "the batch fills its room")
        results, low = [], []
        stop = threading.Event()

        def client(seed):
            while not stop.is_set():
                began = time.monotonic()
                status, _, body = self.serve.post(
                    "/v1/completions", {"prompt": passage(seed, 4), "max_tokens": 16, "ignore_eos": True}
                )
                results.append((status, time.monotonic() - began, body))

        threads = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        # All sixteen places may be taken by online requests: none of them is the batch's.
        eventually(lambda: low.append(inflight()) or low[-1] <= 8, 30, "the batch makes room")
        eventually(lambda: len(results) >= 40, 60, "online requests are answered")
        stop.set()
        for thread in threads:
            thread.join()
        self.assertEqual([body for status, _, body in results if status != 200], [])
        eventually(lambda: inflight() >= 12, 60, "the batch takes its room again")
        api.json("POST", f"/v1/batches/{batch['id']}/cancel")
        done = api.wait(batch["id"], "cancelled")
        self.assertEqual(done["request_counts"]["failed"], 0)


KEYS = {"key-of-a": "team-a", "key-of-b": "team-b"}


class BatchesOfTenants(ServeCase):
    env = {
        "TIDEPOOL_GATEWAY_API_KEYS": ",".join(
            f"{hashlib.sha256(key.encode()).hexdigest()}:{tenant}" for key, tenant in KEYS.items()
        ),
        "TIDEPOOL_GATEWAY_BATCH_MAX_FILES": "4",
        "TIDEPOOL_GATEWAY_BATCH_MAX_FILE_BYTES": "64KiB",
        "TIDEPOOL_GATEWAY_BATCH_MAX_TENANT_BYTES": "128KiB",
        "TIDEPOOL_GATEWAY_BATCH_MAX_LINES": "100",
        "TIDEPOOL_GATEWAY_BATCH_MAX_BATCHES": "1",
    }

    @classmethod
    def setUpClass(cls):
        cls.serve = cls.enterClassContext(Serve(BINARY, cls.args, cls.env))

    def setUp(self):
        self.a, self.b = (Api(self.serve, key) for key in KEYS)
        for api in (self.a, self.b):
            for file in api.json("GET", "/v1/files")["data"]:
                eventually(
                    lambda api=api, file=file: api.request("DELETE", f"/v1/files/{file['id']}")[0] == 200,
                    30,
                    "the file is free",
                )

    def test_tenants_do_not_see_each_other(self):
        batch = self.a.create(lines(5))
        file = batch["input_file_id"]
        done = self.a.wait(batch["id"])
        for path in (
            f"/v1/files/{file}",
            f"/v1/files/{file}/content",
            f"/v1/files/{done['output_file_id']}/content",
            f"/v1/batches/{batch['id']}",
        ):
            self.b.json("GET", path, status=404)
        self.b.json("DELETE", f"/v1/files/{file}", status=404)
        self.b.json("POST", f"/v1/batches/{batch['id']}/cancel", status=404)
        other = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
        self.b.json("POST", "/v1/batches", other, status=404)
        self.assertEqual(self.b.json("GET", "/v1/files")["data"], [])
        self.assertEqual(self.b.json("GET", "/v1/batches")["data"], [])
        Api(self.serve).json("GET", "/v1/files", status=401)

    def test_what_is_stored_is_the_owners_alone(self):
        self.a.upload("secret\n")
        for folder, _, names in os.walk(os.path.join(self.serve.dir, "tidepool", "batch")):
            self.assertEqual(stat.S_IMODE(os.stat(folder).st_mode), 0o700, folder)
            for name in names:
                self.assertEqual(stat.S_IMODE(os.stat(os.path.join(folder, name)).st_mode), 0o600, name)
                self.assertNotIn("in.jsonl", name)

    def test_limits_are_named(self):
        self.assertEqual(self.a.upload("x" * 70_000, status=413)["error"]["code"], "file_too_large")
        self.a.upload("x" * 60_000)
        self.a.upload("x" * 60_000)
        self.assertEqual(self.a.upload("x" * 60_000, status=400)["error"]["code"], "storage_limit_reached")
        self.b.upload("x" * 60_000)  # another tenant's room is its own
        self.a.upload("x")
        self.a.upload("x")
        self.assertIn("no more than 4", self.a.upload("x", status=400)["error"]["message"])

    def test_too_many_lines_and_too_many_batches(self):
        failed = self.a.wait(self.a.create(lines(101))["id"], "failed")
        self.assertEqual(failed["errors"]["data"][0]["code"], "too_many_lines")
        busy = self.a.create(lines(100, tokens=64))
        other = {"input_file_id": busy["input_file_id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        self.a.json("POST", "/v1/batches", other, status=429)
        self.a.json("POST", f"/v1/batches/{busy['id']}/cancel")
        self.a.wait(busy["id"], "cancelled")


class BatchesOff(ServeCase):
    env = {"TIDEPOOL_GATEWAY_BATCH_DIR": "off"}

    def test_the_fix_is_named(self):
        error = Api(self.serve).json("GET", "/v1/batches", status=501)["error"]
        self.assertEqual(error["code"], "batches_disabled")
        self.assertIn("gateway.batch_dir", error["message"])


if __name__ == "__main__":
    unittest.main()
