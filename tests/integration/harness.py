"""A real `tidepool serve` on free ports, for integration tests and tools/check_run.py. Standard library only."""

import collections
import http.client
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request


class ServeFailed(Exception):
    """`tidepool serve` did not start, or ended when it should not."""


def alive(pid):
    """True while the process runs (a zombie has ended)."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def eventually(predicate, seconds, what):
    """Polls until predicate() is true and returns its value; AssertionError at the deadline."""
    deadline = time.monotonic() + seconds
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.02)


def parse_metrics(text):
    """Prometheus text -> {name: {((label, value), ...): number}}."""
    out = collections.defaultdict(dict)
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        name_and_labels, _, value = line.rpartition(" ")
        name, _, labels = name_and_labels.partition("{")
        pairs = []
        for pair in filter(None, labels.rstrip("}").split('",')):
            key, _, label = pair.partition('="')
            pairs.append((key, label.rstrip('"')))
        out[name][tuple(sorted(pairs))] = float(value)
    return out


class Serve:
    """One `tidepool serve`. Context manager: starts, waits until it is ready, and stops whatever is left."""

    def __init__(self, binary, args=(), env=None, ready_seconds=90):
        self.binary = binary
        self.args = list(args)
        self.env = dict(env or {})
        self.ready_seconds = ready_seconds
        self.dir = tempfile.mkdtemp(prefix="tidepool-")
        self.log_path = os.path.join(self.dir, "log")
        self.process = None
        self.info = {}

    def __enter__(self):
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind, value, trace):
        if kind is not None:
            self.print_log()
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        shutil.rmtree(self.dir, ignore_errors=True)

    def _start(self):
        env = {k: v for k, v in os.environ.items() if not k.startswith("TIDEPOOL_")}
        env.update(
            XDG_RUNTIME_DIR=self.dir,
            XDG_STATE_HOME=self.dir,
            TIDEPOOL_GATEWAY_HTTP_LISTEN="127.0.0.1:0",
            TIDEPOOL_GATEWAY_GRPC_LISTEN="127.0.0.1:0",
            TIDEPOOL_GATEWAY_METRICS_LISTEN="127.0.0.1:0",
        )
        env.update(self.env)
        read_end, write_end = os.pipe()
        env["TIDEPOOL_READY_FD"] = str(write_end)
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                [self.binary, "serve", *self.args],
                env=env,
                stdin=subprocess.DEVNULL,  # with a terminal SIGHUP would mean that it is gone
                stdout=log,
                stderr=log,
                pass_fds=[write_end],
            )
        os.close(write_end)
        try:
            self.info = self._read_ready(read_end)
        finally:
            os.close(read_end)
        self.http = self.info["http"]
        self.grpc = self.info["grpc"]
        try:
            eventually(lambda: self.get("/readyz", check=False)[0] == 200, 10, "/readyz answers 200")
        except AssertionError as error:
            self.print_log()
            raise ServeFailed(str(error)) from error

    def _read_ready(self, fd):
        deadline = time.monotonic() + self.ready_seconds
        text = b""
        while not text.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([fd], [], [], left)[0]:
                self.print_log()
                raise ServeFailed(f"tidepool serve was not ready within {self.ready_seconds} s")
            part = os.read(fd, 4096)
            if not part:
                code = self.process.wait(30)
                self.print_log()
                raise ServeFailed(f"tidepool serve ended with exit code {code} before it was ready")
            text += part
        words = text.decode().split()
        assert words[0] == "READY", text
        return dict(word.split("=", 1) for word in words[1:])

    def log(self):
        with open(self.log_path, errors="replace") as log:
            return log.read()

    def print_log(self):
        if os.path.exists(self.log_path):
            sys.stderr.write("---- log of tidepool serve\n" + self.log() + "----\n")

    # Processes

    def children(self):
        """{name: {pid, state, restarts, ready}} as `tidepool ctl` sees it."""
        with open(os.path.join(self.dir, "tidepool", f"serve-{self.process.pid}.json")) as file:
            return {child["name"]: child for child in json.load(file)["children"]}

    def kill(self, name, signal_number=signal.SIGKILL):
        """Sends a signal to a child; returns the pid that it had."""
        pid = self.children()[name]["pid"]
        os.kill(pid, signal_number)
        return pid

    def wait_restarted(self, name, old_pid, seconds=30):
        def back():
            child = self.children()[name]
            return child["state"] == "ready" and child["pid"] != old_pid

        eventually(back, seconds, f"{name} is ready again")

    def ctl(self, *args):
        """`tidepool ctl ARGS -o json`, parsed."""
        env = dict(os.environ, XDG_RUNTIME_DIR=self.dir)
        done = subprocess.run(
            [self.binary, "ctl", *args, "-o", "json"], env=env, capture_output=True, text=True, timeout=30
        )
        if done.returncode != 0:
            raise AssertionError(f"ctl {args}: exit code {done.returncode}: {done.stderr}")
        return json.loads(done.stdout)

    # HTTP

    def get(self, path, check=True, address=None, timeout=10):
        """(status, body) of a GET."""
        try:
            with urllib.request.urlopen(f"http://{address or self.http}{path}", timeout=timeout) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            if check:
                raise
            return error.code, error.read().decode()
        except OSError:
            if check:
                raise
            return 0, ""

    def post(self, path, body, timeout=60, headers=None):
        """(status, headers, parsed body) of a POST; errors are answers, too."""
        host, port = self.http.rsplit(":", 1)
        connection = http.client.HTTPConnection(host, int(port), timeout=timeout)
        try:
            connection.request(
                "POST", path, json.dumps(body), {"Content-Type": "application/json", **(headers or {})}
            )
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), json.loads(response.read())
        finally:
            connection.close()

    def post_json(self, path, body, timeout=60):
        status, _, reply = self.post(path, body, timeout)
        if status != 200:
            self.print_log()
            raise ServeFailed(f"POST {path}: HTTP {status}: {json.dumps(reply)}")
        return reply

    def model(self):
        return json.loads(self.get("/v1/models")[1])["data"][0]["id"]

    def stream(self, path, body, timeout=60):
        """Opens a streaming POST; an open Stream."""
        return Stream(self.http, path, dict(body, stream=True), timeout)

    # Metrics

    def metric_addresses(self):
        """{process: host:port of its /metrics}, of every process."""
        out = {
            name: child["ready"].get("metrics") or child["ready"]["http"] for name, child in self.children().items()
        }
        out["serve"] = self.info["metrics"]
        return out

    def metrics(self, process):
        return parse_metrics(self.get("/metrics", address=self.metric_addresses()[process])[1])


class Stream:
    """A streamed answer: iterate over its parsed events ("[DONE]" last, as a string), or close it early."""

    def __init__(self, address, path, body, timeout):
        host, port = address.rsplit(":", 1)
        self.connection = http.client.HTTPConnection(host, int(port), timeout=timeout)
        self.connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        self.response = self.connection.getresponse()
        self.status = self.response.status

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.response.close()
        self.connection.close()

    def __iter__(self):
        while True:
            try:
                line = self.response.readline()
            except (http.client.HTTPException, ConnectionError):
                return  # cut: the last event tells that it is incomplete
            if not line:
                return
            line = line.decode().rstrip("\r\n")
            if not line.startswith("data: "):
                continue
            data = line[len("data: ") :]
            yield data if data == "[DONE]" else json.loads(data)
