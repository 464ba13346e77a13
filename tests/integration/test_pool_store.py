"""`tidepool store` by itself: before any worker, and beside a cluster of another model; and what tenants may hold."""

import hashlib
import os
import tempfile
import unittest

from harness import Serve, eventually
from roles import MODEL, Role, cluster_of
from support import BINARY, EXACT, chat


class StoreModelTest(unittest.TestCase):
    def setUp(self):
        self.dir = self.enterContext(tempfile.TemporaryDirectory(prefix="tidepool-store-"))
        self.env = {"XDG_RUNTIME_DIR": self.dir, "TIDEPOOL_CLUSTER_TOKEN": "0123456789abcdef", "TIDEPOOL_MODEL_NAME": "demo"}
        self.scheduler = self.start("scheduler", "--scheduler-listen", "127.0.0.1:0")
        self.env["TIDEPOOL_CLUSTER_SCHEDULER"] = self.scheduler.info["grpc"]

    def start(self, name, *args, ready_seconds=60):
        return self.enterContext(Role(name, [name, *args], self.env, self.dir, ready_seconds))

    def test_store_with_a_model_starts_before_any_worker_and_keeps_none_of_them_out(self):
        store = self.start("store", "--store-model", MODEL)
        self.assertEqual(store.readyz()[0], 200)
        worker = self.start("worker", "--role", "both", "--model", MODEL)
        self.assertEqual(worker.readyz()[0], 200)
        self.assertEqual(store.readyz()[0], 200)

    def test_store_of_another_layout_is_refused_with_the_difference(self):
        self.start("worker", "--role", "both", "--model", MODEL)
        store = self.start("store", "--store-model", MODEL, "--kv-block-tokens", "16", ready_seconds=0)

        def refused():
            status, body = store.readyz()
            return status == 503 and "kv.block_tokens" in body

        eventually(refused, 10, "/readyz says that kv.block_tokens differs")

    def test_store_that_came_first_gives_way_to_the_workers_model(self):
        store = self.start("store", "--store-model", MODEL, "--kv-block-tokens", "16")
        self.start("worker", "--role", "both", "--model", MODEL)
        eventually(lambda: store.readyz()[0] == 503, 10, "the store is refused")
        self.assertIn("kv.block_tokens", store.readyz()[1])

    def test_a_model_that_is_not_there_is_named(self):
        store = self.start("store", "--store-model", os.path.join(self.dir, "none"), ready_seconds=0)
        self.assertNotEqual(store.process.wait(20), 0)
        self.assertIn("store.model", store.log())


class TenantQuotaTest(unittest.TestCase):
    def test_each_tenant_holds_what_its_own_quota_says(self):
        keys = {tenant: f"key-of-{tenant}" for tenant in ("small", "large")}
        listed = ",".join(f"{hashlib.sha256(key.encode()).hexdigest()}:{tenant}" for tenant, key in keys.items())
        env = {"TIDEPOOL_GATEWAY_API_KEYS": listed, "TIDEPOOL_KV_TENANT_QUOTAS": "small:1MiB,large:0"}
        args = [*EXACT, "--kv-tenant-quota-bytes", "2MiB"]
        with Serve(BINARY, args, env) as serve:
            for seed in range(8):
                for key in keys.values():
                    status, _, reply = serve.post(
                        "/v1/chat/completions", chat("demo", seed), headers={"Authorization": f"Bearer {key}"}
                    )
                    self.assertEqual(status, 200, reply)
            rows = [row for row in serve.ctl("kv", "stats", "--tenants") if row["role"] == "prefill"]
            held = {row["tenant"]: row for row in rows}
            self.assertEqual(held["small"]["quota_bytes"], 1 << 20)
            self.assertEqual(held["large"]["quota_bytes"], 0)
            # Eight prompts of ten blocks each are 5 MiB.
            self.assertLessEqual(held["small"]["host_bytes"], 1 << 20)
            self.assertGreater(held["large"]["host_bytes"], 4 << 20)

    def test_a_quota_of_less_than_a_block_is_one_block_and_said_by_name(self):
        with tempfile.TemporaryDirectory(prefix="tidepool-quota-") as directory, Serve(BINARY) as serve:
            env = {**cluster_of(serve), "TIDEPOOL_KV_TENANT_QUOTAS": "team-a:1KiB"}
            with Role("worker", ["worker", "--role", "decode"], env, directory) as worker:
                self.assertIn("kv.tenant_quotas of team-a is 1024 bytes, less than one block", worker.log())


if __name__ == "__main__":
    unittest.main()
