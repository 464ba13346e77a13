"""/metrics of every process."""

import shutil
import subprocess
import unittest

from support import ServeCase, completion


class MetricsTest(ServeCase):
    def test_promtool_accepts_every_process(self):
        if shutil.which("promtool") is None:
            self.skipTest("promtool is not installed (Debian package prometheus)")
        self.serve.post_json("/v1/completions", completion(self.model, 1))
        addresses = self.serve.metric_addresses()
        self.assertEqual(set(addresses), {"scheduler", "prefill", "decode", "gateway", "serve"})
        for process, address in addresses.items():
            with self.subTest(process):
                text = self.serve.get("/metrics", address=address)[1]
                done = subprocess.run(
                    ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=30
                )
                self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    def test_every_process_is_ready_and_alive(self):
        for process, address in self.serve.metric_addresses().items():
            for path in ("/livez", "/readyz"):
                self.assertEqual(self.serve.get(path, address=address)[0], 200, f"{process} {path}")

    def test_tokens_are_counted(self):
        def tokens():
            return sum(self.serve.metrics("gateway")["tidepool_generation_tokens_total"].values())

        before = tokens()
        reply = self.serve.post_json("/v1/completions", completion(self.model, 2, tokens=10))
        self.assertEqual(tokens() - before, reply["usage"]["completion_tokens"])


if __name__ == "__main__":
    unittest.main()
