"""The configuration of a whole cluster in etcd: who writes it, who takes it, and what of it holds at once."""

import base64
import http.client
import json
import os
import shutil
import signal
import ssl
import subprocess
import tempfile
import unittest

from cluster_harness import Cluster, Etcd, needs_etcd
from front_door import make_certificates
from harness import Serve, eventually
from support import BINARY, chat, completion

SECONDS = 30  # for what takes milliseconds on an idle machine
MIB = 1 << 20


def etcd_post(etcd, path, body, context=None):
    """etcd's own HTTP API: what a person with etcdctl could do."""
    if context is None:
        connection = http.client.HTTPConnection(etcd.address, timeout=SECONDS)
    else:
        connection = http.client.HTTPSConnection(etcd.address, timeout=SECONDS, context=context)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode()
        if response.status != 200:
            raise AssertionError(f"{path}: {response.status} {text}")
        return json.loads(text)
    finally:
        connection.close()


def encoded(text):
    return base64.b64encode(text.encode()).decode()


class ClusterConfigTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        needs_etcd()
        cls.cluster = cls.enterClassContext(Cluster(schedulers=2, gateways=1, workers=("both", "both")))
        cls.seeds = iter(range(7000, 100_000))

    def setUp(self):
        self.cluster.wait_leader()
        self.apply("")

    def config(self, *words, text=None):
        """(exit code, stdout, stderr) of `ctl config`."""
        done = subprocess.run(
            [BINARY, "ctl", "config", *words], input=text, env=self.cluster.env, capture_output=True, text=True, timeout=60
        )
        return done.returncode, done.stdout, done.stderr

    def apply(self, text, wait=True, *words):
        """Its revision, once everybody has it."""
        code, out, err = self.config("apply", "-", "-o", "json", *words, text=text)
        self.assertEqual(code, 0, err)
        reply = json.loads(out)
        if wait:
            self.wait_revision(reply["revision"])
        return reply["revision"]

    def wait_revision(self, revision):
        def all_have():
            return all(r.metric("tidepool_config_cluster_revision") == revision for r in self.cluster.roles())

        eventually(all_have, SECONDS, f"every process has revision {revision}")

    def complete(self, **fields):
        return self.cluster.gateways[0].post("/v1/completions", completion("demo", next(self.seeds), tokens=2, **fields))

    def test_what_is_applied_is_shown_with_its_author_and_holds_everywhere(self):
        document = "# for all of us\nscheduler:\n  slo: {ttft: 10m}\nlog: {level: debug}\n"
        revision = self.apply(document)
        shown = json.loads(self.config("show", "-o", "json")[1])
        self.assertEqual(shown["revision"], revision)
        self.assertEqual(shown["document"], document)
        self.assertEqual(shown["fields"], {"scheduler.slo.ttft": "10m", "log.level": "debug"})
        self.assertIn("@", shown["by"])
        self.assertIn("# for all of us", self.config("show")[1])
        for role in self.cluster.roles():
            # Who, and of which revision: the audit of every process.
            eventually(lambda r=role: f"/tidepool/config@{revision}, by {shown['by']}" in r.log(), SECONDS, role.name)
            self.assertIn("log.level info -> debug", role.log())
        self.assertIn("scheduler.slo.ttft 0s -> 10m", self.cluster.schedulers[0].log())
        rows = json.loads(self.config("show", "--effective", "-o", "json")[1])
        sources = {row["field"]: row["source"] for row in rows}
        self.assertEqual(sources["scheduler.slo.ttft"], f"/tidepool/config@{revision}:3")
        self.assertEqual(sources["scheduler.listen"], "TIDEPOOL_SCHEDULER_LISTEN")

    def test_diff_says_what_would_change_and_when_it_would_hold(self):
        revision = self.apply("scheduler: {slo: {ttft: 10m}}\n")
        code, out, _ = self.config("diff", "-", "-o", "json", text="engine: {max_batch: 64}\n")
        self.assertEqual(code, 0)
        reply = json.loads(out)
        self.assertEqual(reply["revision"], revision)
        self.assertEqual(
            reply["changes"],
            [
                {"field": "engine.max_batch", "from": "(not given)", "to": "64", "holds": "after a restart"},
                {"field": "scheduler.slo.ttft", "from": "10m", "to": "(not given)", "holds": "at once"},
            ],
        )
        self.assertEqual(json.loads(self.config("show", "-o", "json")[1])["revision"], revision)

    def test_a_document_that_is_wrong_is_refused_before_it_is_written(self):
        revision = self.apply("scheduler: {max_inflight: 100}\n")
        for text, says in (
            ("scheduler:\n  placment: tidepool\n", "-:2:3: unknown key 'placment' in scheduler; did you mean 'placement'?"),
            ("kv:\n  host_bytes: 1GiB\n", "-:2: kv.host_bytes cannot be set for the whole cluster: it is of one machine"),
            ("scheduler:\n  slo:\n    ttft: soon\n", "-:3:11: scheduler.slo.ttft 'soon' is not a duration"),
            ("gateway: {api_keys: [{key_sha256: a, tenant: b}]}\n", "gateway.api_keys cannot be set for the whole cluster"),
        ):
            with self.subTest(text=text):
                code, _, err = self.config("apply", "-", text=text)
                self.assertEqual(code, 2, err)
                self.assertIn(says, err)
        self.assertEqual(json.loads(self.config("show", "-o", "json")[1])["revision"], revision)

    def test_two_who_apply_at_once_do_not_overwrite_each_other(self):
        first = self.apply("scheduler: {max_inflight: 100}\n")
        self.apply("scheduler: {max_inflight: 200}\n")
        code, _, err = self.config("apply", "-", "--revision", str(first), text="scheduler: {max_inflight: 300}\n")
        self.assertEqual(code, 1, err)
        self.assertIn(f"and not of {first} any more", err)
        shown = json.loads(self.config("show", "-o", "json")[1])
        self.assertEqual(shown["fields"], {"scheduler.max_inflight": "200"})

    def test_limits_of_tenants_hold_at_once_and_are_taken_back_at_once(self):
        self.assertEqual(self.complete()[0], 200)
        self.apply("gateway: {tenant_limits: {tokens_per_minute: 1}}\n")
        status = [self.complete()[0] for _ in range(3)]
        self.assertIn(429, status)
        self.apply("")
        self.assertEqual(self.complete()[0], 200)

    def test_objectives_and_limits_of_the_scheduler_hold_at_once_and_for_the_next_leader(self):
        # Nothing is that fast.
        self.apply("scheduler: {slo: {ttft: 1ms}}\n")
        eventually(lambda: self.complete()[0] == 429, SECONDS, "a request is refused")
        leader = self.cluster.wait_leader()
        leader.kill()
        try:
            eventually(lambda: self.cluster.leader() not in (None, leader), SECONDS, "another leads")
            eventually(lambda: self.complete()[0] == 429, SECONDS, "a request is refused")
        finally:
            leader.start()
        self.apply("")
        eventually(lambda: self.complete()[0] == 200, SECONDS, "a request is served")

    def test_quotas_of_tenants_hold_at_once_for_what_is_there_too(self):
        for _ in range(8):
            self.assertEqual(self.complete()[0], 200)

        def tenants():
            return [row for row in self.cluster.ctl("kv", "stats", "--tenants") if row["tenant"] == "default"]

        self.assertGreater(max(row["host_bytes"] for row in tenants()), MIB)
        self.apply("kv: {tenant_quotas: {default: 1MiB}}\n")
        for row in tenants():
            self.assertEqual(row["quota_bytes"], MIB)
            self.assertLessEqual(row["host_bytes"], MIB)
        self.assertEqual(self.complete()[0], 200)
        self.apply("")
        self.assertEqual({row["quota_bytes"] for row in tenants()}, {0})

    def test_a_quota_of_less_than_a_block_is_one_block_and_is_warned_of_also_by_who_starts_with_it(self):
        revision = self.apply("kv: {tenant_quotas: {default: 1KiB}}\n")
        worker = self.cluster.workers[0]
        warning = "kv.tenant_quotas of default is 1024 bytes, less than one block"
        self.assertIn(warning, worker.log())
        warned = worker.log().count(warning)
        worker.stop()
        worker.start()
        self.assertEqual(worker.metric("tidepool_config_cluster_revision"), revision)
        self.assertGreater(worker.log().count(warning), warned)

        def rows():
            self.assertEqual(self.complete()[0], 200)
            return [row for row in self.cluster.ctl("kv", "stats", "--tenants") if row["tenant"] == "default"]

        for row in eventually(rows, SECONDS, "the tenant holds a block"):
            self.assertGreater(row["quota_bytes"], 1024)
            self.assertLessEqual(row["host_bytes"], row["quota_bytes"])

    def test_a_scheduler_refuses_to_lose_workers_between_two_of_their_reports(self):
        revision = self.apply("")
        code, _, err = self.config("apply", "-", text="scheduler: {worker_timeout: 200ms}\n")
        self.assertEqual(code, 2, err)
        self.assertIn("under three report intervals", err)
        # It goes with what stands beside it, but not with workers that report as before.
        self.apply("scheduler: {worker_timeout: 120ms}\nworker: {report_interval: 40ms}\n", wait=False)
        leader = self.cluster.wait_leader()
        eventually(lambda: leader.metric("tidepool_config_cluster_refused") == 1, SECONDS, "it is refused")
        self.assertEqual(leader.metric("tidepool_config_cluster_revision"), revision)
        self.assertEqual(self.complete()[0], 200)

    def test_a_terminal_is_not_driven_by_what_somebody_wrote(self):
        value = encoded("# \x1b[2J\nscheduler: {max_inflight: 9}\n")
        etcd_post(self.cluster.etcd, "/v3/kv/put", {"key": encoded("/tidepool/config"), "value": value})
        _, out, _ = self.config("show")
        self.assertNotIn("\x1b", out)
        self.assertIn("scheduler: {max_inflight: 9}\n", out)

    def test_what_needs_a_restart_is_counted_until_the_restart(self):
        worker, other = self.cluster.workers
        self.apply("engine: {max_batch: 16}\n")
        for role in self.cluster.workers:
            eventually(lambda r=role: r.metric("tidepool_config_restart_needed") == 1, SECONDS, role.name)
            self.assertIn("restart this process to take engine.max_batch 32 -> 16", role.log())
        self.assertEqual(self.cluster.gateways[0].metric("tidepool_config_restart_needed"), 0)
        worker.stop()
        worker.start()
        self.assertEqual(worker.metric("tidepool_config_restart_needed"), 0)
        self.assertEqual(other.metric("tidepool_config_restart_needed"), 1)
        self.apply("")
        eventually(lambda: other.metric("tidepool_config_restart_needed") == 0, SECONDS, "all as before")
        self.assertEqual(worker.metric("tidepool_config_restart_needed"), 1)
        worker.stop()
        worker.start()

    def test_what_somebody_wrote_past_ctl_is_refused_if_it_is_broken_and_the_last_good_one_stays(self):
        good = self.apply("gateway: {tenant_limits: {tokens_per_minute: 1}}\n")
        key = encoded("/tidepool/config")
        etcd_post(self.cluster.etcd, "/v3/kv/put", {"key": key, "value": encoded("gateway: [broken\n")})
        for role in self.cluster.roles():
            eventually(lambda r=role: r.metric("tidepool_config_cluster_refused") == 1, SECONDS, role.name)
            self.assertEqual(role.metric("tidepool_config_cluster_revision"), good)
            self.assertIn("not YAML", role.log())
        self.assertIn(429, [self.complete()[0] for _ in range(3)])
        code, out, err = self.config("show")
        self.assertEqual(code, 2)
        self.assertIn("written past", out)
        self.assertIn("not YAML", err)
        self.assertEqual(self.config("show", "-o", "json")[0], 2)
        # It can be replaced, by hand or by ctl.
        self.apply("")
        self.assertEqual(self.complete()[0], 200)
        for role in self.cluster.roles():
            self.assertEqual(role.metric("tidepool_config_cluster_refused"), 0)

    def test_without_etcd_the_last_one_stays(self):
        self.apply("gateway: {tenant_limits: {tokens_per_minute: 1}}\n")
        self.cluster.etcd.kill()
        try:
            self.assertIn(429, [self.complete()[0] for _ in range(3)])
            code, _, err = self.config("apply", "-", text="")
            self.assertEqual(code, 1, err)
        finally:
            self.cluster.etcd.start()
        self.apply("")
        self.assertEqual(self.complete()[0], 200)

    def test_ctl_kv_answers_from_those_who_answer_and_says_who_does_not(self):
        # So that the one that stands still stays listed.
        self.apply("scheduler: {worker_timeout: 10m}\n")
        stopped, other = self.cluster.workers
        stopped.kill(signal.SIGSTOP)
        try:
            block = ",".join(map(str, range(1, 33)))  # less than a block would be a mistake of ours
            for words in (["kv"], ["kv", "stats"], ["kv", "where", "--all"], ["kv", "lookup", "--tokens", block]):
                with self.subTest(words=words):
                    done = self.ctl(*words)
                    self.assertEqual(done.returncode, 0, done.stderr)
                    self.assertLessEqual({row["worker"] for row in json.loads(done.stdout)}, {other.name})
                    missing = json.loads(done.stderr)["unreachable"]
                    self.assertEqual([m["worker"] for m in missing], [stopped.name])
                    self.assertIn(stopped.name, missing[0]["reason"])
            # An order that some have not got is not done.
            done = self.ctl("kv", "unpin", "--session", "1")
            self.assertEqual(done.returncode, 1, done.stderr)
            self.assertIn(stopped.name, done.stderr)
            self.assertEqual(self.ctl("kv", "stats", "--worker", stopped.name).returncode, 1)
            other.kill(signal.SIGSTOP)
            self.assertEqual(self.ctl("kv").returncode, 1)
        finally:
            for worker in self.cluster.workers:
                worker.kill(signal.SIGCONT)

    def ctl(self, *words):
        command = [BINARY, "ctl", "--timeout", "3s", *words, "-o", "json"]
        return subprocess.run(command, env=self.cluster.env, capture_output=True, text=True, timeout=60)


class TlsEtcd(Etcd):
    """An etcd that speaks TLS alone, with clients that its authority vouches for."""

    def __init__(self, folder):
        super().__init__(folder)
        self.folder = folder
        make_certificates(folder, "etcd")
        self.context = ssl.create_default_context(cafile=self.file("ca.pem"))
        self.context.load_cert_chain(self.file("client.pem"), self.file("client.key"))

    def file(self, name):
        return os.path.join(self.folder, name)

    def start(self):
        client, peer = f"https://{self.address}", f"http://{self.peer}"
        self.spawn(
            ["etcd", "--name", "a", "--data-dir", self.data, "--listen-client-urls", client]
            + ["--advertise-client-urls", client, "--listen-peer-urls", peer]
            + ["--initial-advertise-peer-urls", peer, "--initial-cluster", "a=" + peer]
            + ["--cert-file", self.file("cert.pem"), "--key-file", self.file("key.pem")]
            + ["--trusted-ca-file", self.file("ca.pem"), "--client-cert-auth"]
        )
        eventually(self._healthy, SECONDS, "etcd answers")

    def _healthy(self):
        try:
            self.post("/v3/maintenance/status", {})
            return True
        except (OSError, http.client.HTTPException, AssertionError):
            return False

    def post(self, path, body):
        return etcd_post(self, path, body, self.context)

    def add_user(self, name, password, prefix):
        """`name` may read and write what begins with `prefix`; from now on nobody may do anything without a name."""
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        self.post("/v3/auth/user/add", {"name": "root", "password": "of root"})
        self.post("/v3/auth/user/grant", {"user": "root", "role": "root"})
        self.post("/v3/auth/role/add", {"name": "cluster"})
        permission = {"permType": "READWRITE", "key": encoded(prefix), "range_end": encoded(end)}
        self.post("/v3/auth/role/grant", {"name": "cluster", "perm": permission})
        self.post("/v3/auth/user/add", {"name": name, "password": password})
        self.post("/v3/auth/user/grant", {"user": name, "role": "cluster"})
        self.post("/v3/auth/enable", {})


class GuardedCluster(Cluster):
    """A cluster whose etcd speaks TLS and knows one user, which owns /tidepool/ and nothing else."""

    def __init__(self):
        super().__init__(schedulers=1, gateways=1, workers=("both",))
        self.etcd = TlsEtcd(self.folder)
        self.env.update(
            TIDEPOOL_CLUSTER_ETCD=self.etcd.address,
            TIDEPOOL_CLUSTER_ETCD_CA=self.etcd.file("ca.pem"),
            TIDEPOOL_CLUSTER_ETCD_CERT=self.etcd.file("client.pem"),
            TIDEPOOL_CLUSTER_ETCD_KEY=self.etcd.file("client.key"),
            TIDEPOOL_CLUSTER_ETCD_USER="tidepool",
            TIDEPOOL_CLUSTER_ETCD_PASSWORD="a good password",
        )
        start = self.etcd.start

        def start_with_user():
            start()
            self.etcd.add_user("tidepool", "a good password", "/tidepool/")

        self.etcd.start = start_with_user


class GuardedEtcdTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        needs_etcd()
        if shutil.which("openssl") is None:
            raise unittest.SkipTest("openssl is not installed")
        cls.cluster = cls.enterClassContext(GuardedCluster())

    def test_a_cluster_meets_in_an_etcd_with_tls_and_a_user(self):
        status, reply = self.cluster.gateways[0].post("/v1/completions", completion("demo", 1, tokens=2))
        self.assertEqual(status, 200, reply)
        roles = sorted(member["role"] for member in self.cluster.ctl("status")["members"])
        self.assertEqual(roles, ["both", "gateway", "scheduler"])
        done = subprocess.run(
            [BINARY, "ctl", "config", "apply", "-", "-o", "json"],
            input="scheduler: {max_inflight: 9}\n", env=self.cluster.env, capture_output=True, text=True, timeout=60,
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        revision = json.loads(done.stdout)["revision"]
        for role in self.cluster.roles():
            eventually(lambda r=role: r.metric("tidepool_config_cluster_revision") == revision, SECONDS, role.name)

    def test_without_the_password_or_the_certificate_nobody_gets_in_and_is_told_why(self):
        def ctl(**env):
            return subprocess.run(
                [BINARY, "ctl", "config", "show"],
                env=dict(self.cluster.env, **env), capture_output=True, text=True, timeout=60,
            )

        wrong = ctl(TIDEPOOL_CLUSTER_ETCD_PASSWORD="a guess")
        self.assertNotEqual(wrong.returncode, 0)
        self.assertIn("etcd refuses the user", wrong.stderr)
        self.assertNotIn("a guess", wrong.stderr)
        strange = tempfile.mkdtemp(prefix="tidepool-ca-")
        self.addCleanup(shutil.rmtree, strange)
        make_certificates(strange, "etcd")
        self.assertEqual(ctl(TIDEPOOL_CLUSTER_ETCD_CA=os.path.join(strange, "ca.pem")).returncode, 1)
        foreign = ctl(TIDEPOOL_CLUSTER_ETCD_PREFIX="/others")
        self.assertEqual(foreign.returncode, 2, foreign.stderr)
        self.assertIn("permission denied", foreign.stderr)


class ReloadTest(unittest.TestCase):
    """One machine: what can change while `serve` runs does when its file is read again."""

    def setUp(self):
        self.folder = self.enterContext(tempfile.TemporaryDirectory(prefix="tidepool-reload-"))
        self.file = os.path.join(self.folder, "tidepool.yaml")
        self.write("kv: {tenant_quota_bytes: 8MiB}\n")
        self.serve = self.enterContext(Serve(BINARY, ["--config", self.file]))

    def write(self, text):
        with open(self.file, "w") as file:
            file.write(text)

    def quotas(self):
        return {row["quota_bytes"] for row in self.serve.ctl("kv", "stats", "--tenants")}

    def restart_needed(self):
        return sum(self.serve.metrics("serve").get("tidepool_config_restart_needed", {}).values())

    def test_quotas_and_objectives_hold_at_once_and_what_does_not_is_named(self):
        self.serve.post_json("/v1/chat/completions", chat("demo", 1))
        self.assertEqual(self.quotas(), {8 * MIB})
        self.write("kv: {tenant_quota_bytes: 2MiB}\nengine: {max_batch: 8}\n")
        asked = self.serve.ctl("config", "reload")
        self.assertEqual({row["process"] for row in asked}, {"gateway", "scheduler", "prefill", "decode"})
        eventually(lambda: self.quotas() == {2 * MIB}, SECONDS, "the quotas hold")
        self.assertEqual(self.restart_needed(), 1)
        self.assertIn("restart this process to take engine.max_batch 32 -> 8", self.serve.log())
        # A child that starts again has what holds, not what its parent was started with.
        old = self.serve.kill("prefill")
        self.serve.wait_restarted("prefill", old)
        self.serve.post_json("/v1/chat/completions", chat("demo", 2))
        eventually(lambda: self.quotas() == {2 * MIB}, SECONDS, "the quotas hold")
        # Out of the file is back at the default.
        self.write("")
        os.kill(self.serve.process.pid, signal.SIGHUP)
        eventually(lambda: self.quotas() == {0}, SECONDS, "there are no quotas")
        self.assertEqual(self.restart_needed(), 0)

    def test_a_broken_file_changes_nothing(self):
        self.serve.post_json("/v1/chat/completions", chat("demo", 1))
        self.write("kv: {tenant_quota_bytes: lots}\n")
        os.kill(self.serve.process.pid, signal.SIGHUP)
        eventually(lambda: "tenant_quota_bytes 'lots' is not a size" in self.serve.log(), SECONDS, "it is refused")
        self.assertEqual(self.quotas(), {8 * MIB})
        self.assertEqual(self.serve.get("/readyz")[0], 200)


if __name__ == "__main__":
    unittest.main()
