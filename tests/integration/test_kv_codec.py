"""KV codecs end to end: blocks go encoded over the wire and to the disk, and the answers are still there."""

import tempfile
import unittest

from harness import Serve, eventually
from support import BINARY, EXACT, passage


def total(metrics, name, **labels):
    wanted = set(labels.items())
    return sum(value for pairs, value in metrics.get(name, {}).items() if wanted <= set(pairs))


class CodecCase(unittest.TestCase):
    def start(self, codec, **env):
        # On one host blocks would be read where they lie: nothing to encode.
        env = {"TIDEPOOL_KV_CODEC": codec, "TIDEPOOL_TRANSPORT_SHARE_ARENA": "false", **env}
        return self.enterContext(Serve(BINARY, EXACT, env))

    def ask(self, serve, seed):
        body = {
            "model": serve.model(),
            "messages": [{"role": "user", "content": passage(seed)}],
            "max_tokens": 24,
            "temperature": 0,
        }
        return serve.post_json("/v1/chat/completions", body)["choices"][0]["message"]["content"]


class WireTest(CodecCase):
    def test_blocks_travel_encoded_and_the_answer_is_still_read_from_them(self):
        exact = self.ask(self.start("none"), 3)
        for codec in ("int8", "cachegen-2"):
            with self.subTest(codec=codec):
                serve = self.start(codec)
                self.assertEqual(self.ask(serve, 3), exact)
                sent = serve.metrics("prefill")
                raw = total(sent, "tidepool_kv_codec_bytes_total", place="wire", form="raw")
                coded = total(sent, "tidepool_kv_codec_bytes_total", place="wire", form="coded")
                self.assertGreater(raw, 0)
                self.assertLess(coded, raw * 0.55)
                self.assertEqual(total(sent, "tidepool_kv_codec_failures_total"), 0)
                self.assertEqual(total(serve.metrics("decode"), "tidepool_kv_codec_failures_total"), 0)

    def test_nothing_is_encoded_unless_asked_for(self):
        serve = self.start("none")
        self.ask(serve, 4)
        self.assertEqual(total(serve.metrics("prefill"), "tidepool_kv_codec_bytes_total"), 0)


class DiskTest(CodecCase):
    def test_blocks_lie_encoded_on_the_disk_and_come_back_after_a_restart(self):
        with tempfile.TemporaryDirectory(prefix="tidepool-codec-") as path:
            env = {"TIDEPOOL_KV_DISK_PATH": path, "TIDEPOOL_KV_DISK_BYTES": "64MiB", "TIDEPOOL_KV_LOAD": "always"}
            serve = self.start("cachegen-3", **env)
            before = self.ask(serve, 5)

            def stored():
                coded = total(serve.metrics("prefill"), "tidepool_kv_codec_bytes_total", place="disk", form="coded")
                raw = total(serve.metrics("prefill"), "tidepool_kv_codec_bytes_total", place="disk", form="raw")
                queued = total(serve.metrics("prefill"), "tidepool_worker_store_queue_blocks")
                return queued == 0 and raw > 0 and (raw, coded)

            raw, coded = eventually(stored, 20, "blocks are stored")
            self.assertLess(coded, raw * 0.35)
            pid = serve.kill("prefill")
            serve.wait_restarted("prefill", pid)
            self.assertEqual(self.ask(serve, 5), before)
            self.assertEqual(total(serve.metrics("prefill"), "tidepool_kv_codec_failures_total"), 0)


if __name__ == "__main__":
    unittest.main()
