"""Does the prompt cache tell one tenant what another has sent? The audit of Gu et al., arXiv:2502.07776.

A victim sends a prompt; an attacker sends its first 95 % with a new end. If that is answered faster than a fresh
prompt, the cache is shared. Times are compared by a one-sided two-sample Kolmogorov-Smirnov test; what is exact
(cached tokens, hit counters) decides, and the times confirm it. Within one tenant the same must be detected, or the
audit would prove nothing.
"""

import bisect
import http.client
import json
import math
import os
import random
import tempfile
import time
import unittest

from front_door import digest, replace_file
from harness import Serve
from support import BINARY

SAMPLES = 250
SAMPLES_AGAIN = 1000  # where times seem to differ: chance does not repeat itself
TOKENS = 512
SHARED = int(TOKENS * 0.95)
DETECTED = 1e-8
CHANCE = 1e-3
KEYS = {"victim": "key-of-the-victim", "attacker": "key-of-the-attacker"}


def ks_p_value(smaller, larger):
    """How likely chance makes `smaller` look this much smaller: one-sided, by the asymptotic distribution."""
    a, b = sorted(smaller), sorted(larger)
    d = max(bisect.bisect_right(a, x) / len(a) - bisect.bisect_right(b, x) / len(b) for x in a)
    d = max(d, 0)
    return math.exp(-2 * d * d * len(a) * len(b) / (len(a) + len(b)))


class KsTest(unittest.TestCase):
    def test_critical_values_are_the_known_ones(self):
        def p(d):  # two samples of 250 whose distributions are d apart
            return ks_p_value([0] * round(250 * d) + [1] * (250 - round(250 * d)), [1] * 250)

        self.assertLess(p(0.272), 1e-8)
        self.assertGreater(p(0.268), 1e-8)
        self.assertLess(p(0.168), 1e-3)
        self.assertGreater(p(0.164), 1e-3)
        self.assertEqual(ks_p_value([2, 3], [0, 1]), 1)


class CacheAuditTest(unittest.TestCase):
    more_env = {}

    @classmethod
    def setUpClass(cls):
        folder = cls.enterClassContext(tempfile.TemporaryDirectory(prefix="tidepool-audit-"))
        path = os.path.join(folder, "keys.json")
        keys = [{"key_sha256": digest(key), "tenant": tenant} for tenant, key in KEYS.items()]
        replace_file(path, json.dumps({"keys": keys}))
        env = {"TIDEPOOL_GATEWAY_API_KEYS_FILE": path, "TIDEPOOL_GATEWAY_ACCESS_LOG": "off"}
        env.update(cls.more_env)
        cls.serve = cls.enterClassContext(Serve(BINARY, env=env))
        cls.connections = {}
        status, body = cls.call("victim", "/tokenize", {"prompt": " ".join("abcdefghijklmnopqrstuvwxyz")})
        assert status == 200, body
        cls.letters = sorted(set(body["tokens"]))
        assert len(cls.letters) >= 20, cls.letters

    @classmethod
    def call(cls, tenant, path, body):
        connection = cls.connections.get(tenant)
        if connection is None:
            host, port = cls.serve.http.rsplit(":", 1)
            connection = cls.connections[tenant] = http.client.HTTPConnection(host, int(port), timeout=60)
        headers = {"Authorization": "Bearer " + KEYS[tenant], "Content-Type": "application/json"}
        connection.request("POST", path, json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())

    def setUp(self):
        self.rng = random.Random(20250207)

    def prompt(self, tokens):
        return [self.rng.choice(self.letters) for _ in range(tokens)]

    def send(self, tenant, prompt, **more):
        """(client's seconds, server's seconds, cached tokens) of one request for one token."""
        body = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "return_trace": True, **more}
        before = time.perf_counter()
        status, reply = self.call(tenant, "/v1/completions", body)
        seconds = time.perf_counter() - before
        self.assertEqual(status, 200, reply)
        cached = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
        return seconds, reply["tidepool_trace"]["ttft_ms"], cached

    def hits(self):
        return self.serve.metrics("gateway")["tidepool_prompt_tokens_total"][(("source", "cached"),)]

    def audit(self, victim, attacker, samples):
        """p-values of the client's and the server's times, and the attacker's cached tokens, hit and miss."""
        times = {True: ([], []), False: ([], [])}
        cached = {True: set(), False: set()}
        order = [True, False] * samples
        self.rng.shuffle(order)
        for hit in order:
            prompt = self.prompt(TOKENS)
            if hit:
                self.send(victim, prompt)
                prompt = prompt[:SHARED] + self.prompt(TOKENS - SHARED)
            client, server, tokens = self.send(attacker, prompt)
            times[hit][0].append(client)
            times[hit][1].append(server)
            cached[hit].add(tokens)
        return [ks_p_value(times[True][side], times[False][side]) for side in (0, 1)], cached

    def test_within_a_tenant_the_cache_is_detected(self):
        p, cached = self.audit("victim", "victim", SAMPLES)
        self.assertEqual(cached[False], {0})
        self.assertEqual(min(cached[True]) // 32 * 32, SHARED // 32 * 32)
        self.assertLess(p[0], DETECTED, "by the client's clock")
        self.assertLess(p[1], DETECTED, "by the server's clock")

    def test_across_tenants_it_is_not(self):
        before = self.hits()
        p, cached = self.audit("victim", "attacker", SAMPLES)
        if min(p) <= CHANCE:
            p, more = self.audit("victim", "attacker", SAMPLES_AGAIN)
            cached = {hit: cached[hit] | more[hit] for hit in cached}
        self.assertEqual(cached, {True: {0}, False: {0}})
        self.assertEqual(self.hits(), before, "not one token came from the cache")
        self.assertGreater(p[0], CHANCE, "by the client's clock")
        self.assertGreater(p[1], CHANCE, "by the server's clock")

    def test_the_victims_salt_does_not_open_its_cache(self):
        for salt in ("", "the victim's own"):
            more = {"cache_salt": salt} if salt else {}
            prompt = self.prompt(TOKENS)
            self.send("victim", prompt, **more)
            self.assertGreater(self.send("victim", prompt, **more)[2], 0, "the victim finds it again")
            for guess in ({}, {"cache_salt": "the victim's own"}, {"cache_salt": "victim"}):
                self.assertEqual(self.send("attacker", prompt, **guess)[2], 0, guess)
        # And it divides its own tenant's.
        prompt = self.prompt(TOKENS)
        self.send("victim", prompt, cache_salt="one")
        self.assertEqual(self.send("victim", prompt, cache_salt="two")[2], 0)


class WarmDiskAuditTest(CacheAuditTest):
    """The same with a disk tier that holds all that the victim sent, and a host tier too small to."""

    @classmethod
    def setUpClass(cls):
        disk = cls.enterClassContext(tempfile.TemporaryDirectory(prefix="tidepool-disk-"))
        cls.more_env = {
            "TIDEPOOL_KV_DISK_PATH": disk,
            "TIDEPOOL_KV_DISK_BYTES": "256MiB",
            "TIDEPOOL_KV_HOST_BYTES": "16MiB",
            "TIDEPOOL_KV_LOAD": "always",
        }
        super().setUpClass()


if __name__ == "__main__":
    unittest.main()
