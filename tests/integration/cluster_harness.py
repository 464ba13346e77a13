"""A cluster of single roles that meet in a real etcd, all on loopback of this machine. Standard library only."""

import contextlib
import http.client
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest

from harness import Stream, eventually, parse_metrics
from support import BINARY, ROOT

DEMO = os.path.join(ROOT, "tools", "demo_model", "model")
READY_SECONDS = 90


def free_port():
    """A port that was free a moment ago: etcd does not tell which it was given."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Process:
    """One process with its log in `folder`."""

    def __init__(self, folder, name):
        self.name = name
        self.log_path = os.path.join(folder, name + ".log")
        self.process = None

    def spawn(self, command, **kwargs):
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, **kwargs)

    @property
    def pid(self):
        return self.process.pid

    def log(self):
        with open(self.log_path, errors="replace") as log:
            return log.read()

    def kill(self, number=signal.SIGKILL):
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait()

    def stop(self, seconds=15):
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGCONT)
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Etcd(Process):
    """One etcd member; starts again on the same ports, with its data or without."""

    def __init__(self, folder, namespaces=None):
        super().__init__(folder, "etcd")
        self.data = os.path.join(folder, "etcd-data")
        if namespaces is None:
            self.before = []
            self.address, self.peer = (f"127.0.0.1:{free_port()}" for _ in range(2))
        else:
            host = namespaces.add("etcd")
            self.before = namespaces.command("etcd")
            self.address, self.peer = host + ":2379", host + ":2380"

    def start(self):
        client, peer = f"http://{self.address}", f"http://{self.peer}"
        self.spawn(
            [*self.before, "etcd", "--name", "a", "--data-dir", self.data, "--listen-client-urls", client]
            + ["--advertise-client-urls", client, "--listen-peer-urls", peer]
            + ["--initial-advertise-peer-urls", peer, "--initial-cluster", "a=" + peer]
        )
        eventually(self._healthy, 30, "etcd answers")

    def _healthy(self):
        try:
            connection = http.client.HTTPConnection(self.address, timeout=2)
            connection.request("GET", "/health")
            return json.loads(connection.getresponse().read()).get("health") == "true"
        except (OSError, ValueError):
            return False


class Role(Process):
    """`tidepool ROLE`; knows where it listens once it is ready."""

    def __init__(self, cluster, name, words):
        super().__init__(cluster.folder, name)
        self.cluster = cluster
        self.words = words
        self.info = {}

    def start(self, wait=True):
        read_end, write_end = os.pipe()
        before, more = self.cluster.placed(self.name)
        env = dict(self.cluster.env, **more, TIDEPOOL_READY_FD=str(write_end))
        self.spawn([*before, BINARY, *self.words], env=env, pass_fds=[write_end])
        os.close(write_end)
        self.ready_fd = read_end
        if wait:
            self.wait_ready()
        return self

    def wait_ready(self, seconds=READY_SECONDS):
        deadline = time.monotonic() + seconds
        text = b""
        try:
            while not text.endswith(b"\n"):
                left = deadline - time.monotonic()
                if left <= 0 or not select.select([self.ready_fd], [], [], left)[0]:
                    raise AssertionError(f"{self.name} was not ready within {seconds} s:\n{self.log()}")
                part = os.read(self.ready_fd, 4096)
                if not part:
                    raise AssertionError(f"{self.name} ended before it was ready:\n{self.log()}")
                text += part
        finally:
            os.close(self.ready_fd)
        self.info = dict(word.split("=", 1) for word in text.decode().split()[1:])

    # HTTP, of a gateway; of others metrics and health.

    def post(self, path, body, timeout=60):
        """(status, parsed body)."""
        host, port = self.info["http"].rsplit(":", 1)
        connection = http.client.HTTPConnection(host, int(port), timeout=timeout)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def get(self, path, address=None):
        host, port = (address or self.info.get("metrics") or self.info["http"]).rsplit(":", 1)
        connection = http.client.HTTPConnection(host, int(port), timeout=10)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def stream(self, path, body, timeout=60):
        return Stream(self.info["http"], path, dict(body, stream=True), timeout)

    def metrics(self):
        return parse_metrics(self.get("/metrics")[1])

    def metric(self, name):
        return sum(self.metrics().get(name, {}).values())


class Cluster:
    """Context manager: etcd, schedulers, workers and gateways, all ready; with `namespaces` each in one of its own."""

    def __init__(
        self, schedulers=3, gateways=2, workers=("prefill", "prefill", "decode", "decode"), args=(), namespaces=None
    ):
        self.namespaces = namespaces
        self.folder = tempfile.mkdtemp(prefix="tidepool-cluster-")
        self.args = list(args)
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("TIDEPOOL_")}
        self.etcd = Etcd(self.folder, namespaces)
        self.env.update(
            TIDEPOOL_CLUSTER_ETCD=self.etcd.address,
            TIDEPOOL_CLUSTER_TOKEN="a token of sixteen characters",
            TIDEPOOL_SCHEDULER_LISTEN="127.0.0.1:0",
            TIDEPOOL_GATEWAY_HTTP_LISTEN="127.0.0.1:0",
            TIDEPOOL_GATEWAY_GRPC_LISTEN="127.0.0.1:0",
            TIDEPOOL_GATEWAY_METRICS_LISTEN="127.0.0.1:0",
            TIDEPOOL_MODEL_PATH=DEMO,
            TIDEPOOL_MODEL_NAME="demo",
            TIDEPOOL_ENGINE_THREADS="1",
            XDG_RUNTIME_DIR=self.folder,
            XDG_STATE_HOME=self.folder,
        )
        self.schedulers = [Role(self, f"scheduler-{i}", ["scheduler", *self.args]) for i in range(schedulers)]
        self.workers = [self.worker(f"{role}-{i}", role) for i, role in enumerate(workers)]
        self.gateways = [Role(self, f"gateway-{i}", ["gateway", *self.args]) for i in range(gateways)]

    def placed(self, name):
        """(what stands before its command, environment) of the process of this name."""
        if self.namespaces is None:
            return [], {}
        host = self.namespaces.add(name)
        listen = ["SCHEDULER_LISTEN", "GATEWAY_HTTP_LISTEN", "GATEWAY_GRPC_LISTEN", "WORKER_LISTEN"]
        listen += [role + "_METRICS_LISTEN" for role in ("SCHEDULER", "GATEWAY", "WORKER")]
        env = {"TIDEPOOL_" + field: host + ":0" for field in listen}
        # Nobody but the test has a route there.
        env.update(TIDEPOOL_TRANSPORT_NET_DEVICES="eth0", TIDEPOOL_GATEWAY_ALLOW_UNAUTHENTICATED="true")
        return self.namespaces.command(name), env

    def worker(self, name, role, *more):
        return Role(self, name, ["worker", "--role", role, "--worker-id", name, *self.args, *more])

    def roles(self):
        return self.schedulers + self.workers + self.gateways

    def __enter__(self):
        try:
            self.etcd.start()
            for role in self.roles():
                role.start(wait=False)
            for role in self.roles():
                role.wait_ready()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, kind, value, trace):
        if kind is not None and not issubclass(kind, unittest.SkipTest):
            self.print_logs()
        running = [role for role in self.roles() if role.process is not None and role.process.poll() is None]
        for role in reversed(running):
            role.process.send_signal(signal.SIGCONT)
            role.process.send_signal(signal.SIGTERM)
        for role in running:
            role.stop()
        with contextlib.suppress(ProcessLookupError):
            self.etcd.stop(5)
        shutil.rmtree(self.folder, ignore_errors=True)

    def print_logs(self):
        for role in self.roles():
            if os.path.exists(role.log_path):
                sys.stderr.write(f"---- {role.name}\n{role.log()[-6000:]}")

    def leader(self):
        """The scheduler that leads, as it says itself; None while there is not exactly one."""
        leading = []
        for scheduler in self.schedulers:
            if scheduler.process.poll() is None:
                with contextlib.suppress(OSError, http.client.HTTPException):
                    if scheduler.metric("tidepool_cluster_leading") == 1:
                        leading.append(scheduler)
        return leading[0] if len(leading) == 1 else None

    def wait_leader(self, seconds=15):
        return eventually(self.leader, seconds, "one scheduler leads")

    def ctl(self, *words):
        """`tidepool ctl WORDS -o json` by way of etcd, parsed."""
        done = subprocess.run(
            [BINARY, "ctl", *words, "-o", "json"], env=self.env, capture_output=True, text=True, timeout=30
        )
        if done.returncode != 0:
            raise AssertionError(f"ctl {words}: exit code {done.returncode}: {done.stderr}")
        return json.loads(done.stdout)


def needs_etcd():
    if shutil.which("etcd") is None:
        raise unittest.SkipTest("etcd is not installed (Debian: etcd-server)")
