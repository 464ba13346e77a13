"""Files and batches through the official openai client."""

import io
import json
import unittest

from harness import eventually
from sdk_support import FACT, QUESTION, OpenAiCase, needs
from support import chat, completion


def lines(*requests):
    """OpenAI's batch input, as a file to upload. requests: (custom_id, url, body)."""
    text = "".join(
        json.dumps({"custom_id": name, "method": "POST", "url": url, "body": body}) + "\n" for name, url, body in requests
    )
    return "requests.jsonl", io.BytesIO(text.encode())


@needs("openai")
class BatchTest(OpenAiCase):
    def finished(self, batch):
        def done():
            now = self.client.batches.retrieve(batch.id)
            return now if now.status in ("completed", "failed", "expired", "cancelled") else None

        return eventually(done, 120, f"batch {batch.id} is finished")

    def results(self, file_id):
        text = self.client.files.content(file_id).text
        rows = [json.loads(line) for line in text.splitlines()]
        return {row["custom_id"]: row for row in rows}

    def run_batch(self, *requests, endpoint="/v1/chat/completions"):
        file = self.client.files.create(file=lines(*requests), purpose="batch")
        batch = self.client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h")
        return self.finished(batch)

    def test_a_file_comes_back_as_it_was_sent(self):
        import openai

        name, data = lines(("a", "/v1/chat/completions", chat(self.model, 1)))
        sent = data.getvalue()
        file = self.client.files.create(file=(name, data), purpose="batch")
        self.assertEqual((file.object, file.purpose, file.filename, file.bytes), ("file", "batch", name, len(sent)))
        self.assertEqual(self.client.files.content(file.id).read(), sent)
        self.assertEqual(self.client.files.retrieve(file.id).id, file.id)
        self.assertIn(file.id, [item.id for item in self.client.files.list()])
        gone = self.client.files.delete(file.id)
        self.assertTrue(gone.deleted)
        with self.assertRaises(openai.NotFoundError):
            self.client.files.retrieve(file.id)
        with self.assertRaises(openai.NotFoundError):
            self.client.files.content(file.id)

    def test_each_request_gets_what_it_gets_online(self):
        requests = [(f"r{i}", "/v1/chat/completions", chat(self.model, i % 4)) for i in range(12)]
        batch = self.run_batch(*requests)
        self.assertEqual(batch.status, "completed", batch.errors)
        counts = batch.request_counts
        self.assertEqual((counts.total, counts.completed, counts.failed), (12, 12, 0))
        self.assertIsNone(batch.error_file_id)
        rows = self.results(batch.output_file_id)
        self.assertEqual(set(rows), {name for name, _, _ in requests})
        for name, _, body in requests[:4]:
            online = self.client.chat.completions.create(**body)
            row = rows[name]
            self.assertEqual((row["response"]["status_code"], row["error"]), (200, None))
            self.assertTrue(row["id"] and row["response"]["request_id"])
            self.assertEqual(
                row["response"]["body"]["choices"][0]["message"]["content"], online.choices[0].message.content
            )

    def test_the_other_endpoints(self):
        text = self.run_batch(("a", "/v1/completions", completion(self.model, 1, 8)), endpoint="/v1/completions")
        self.assertEqual(text.status, "completed", text.errors)
        body = self.results(text.output_file_id)["a"]["response"]["body"]
        self.assertEqual(body["usage"]["completion_tokens"], 8)
        vector = self.run_batch(
            ("a", "/v1/embeddings", {"model": self.model, "input": FACT}), endpoint="/v1/embeddings"
        )
        self.assertEqual(vector.status, "completed", vector.errors)
        body = self.results(vector.output_file_id)["a"]["response"]["body"]
        self.assertEqual(len(body["data"]), 1)
        answer = self.run_batch(
            ("a", "/v1/responses", {"model": self.model, "input": f"{FACT} {QUESTION}", "temperature": 0}),
            endpoint="/v1/responses",
        )
        self.assertEqual(answer.status, "completed", answer.errors)
        body = self.results(answer.output_file_id)["a"]["response"]["body"]
        self.assertEqual(body["output"][0]["content"][0]["text"], FACT)

    def test_requests_that_fail_are_in_the_error_file(self):
        batch = self.run_batch(
            ("good", "/v1/chat/completions", chat(self.model, 1)),
            ("bad", "/v1/chat/completions", chat(self.model, 1, temperature=99)),
        )
        self.assertEqual(batch.status, "completed")
        self.assertEqual((batch.request_counts.completed, batch.request_counts.failed), (1, 1))
        self.assertEqual(set(self.results(batch.output_file_id)), {"good"})
        row = self.results(batch.error_file_id)["bad"]
        self.assertEqual(row["response"]["status_code"], 400)
        self.assertEqual(row["response"]["body"]["error"]["param"], "temperature")

    def test_a_file_that_is_no_batch_fails_and_says_why(self):
        import openai

        file = self.client.files.create(file=("x.jsonl", io.BytesIO(b'{"custom_id": "a"\n')), purpose="batch")
        try:
            batch = self.client.batches.create(
                input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
            )
        except openai.BadRequestError as error:
            self.assertEqual(error.param, "input_file_id")
            return
        batch = self.finished(batch)
        self.assertEqual(batch.status, "failed")
        self.assertEqual(batch.errors.data[0].line, 1)
        self.assertTrue(batch.errors.data[0].message)

    def test_a_batch_can_be_listed_and_cancelled(self):
        import openai

        requests = [(f"r{i}", "/v1/completions", completion(self.model, i, 400)) for i in range(200)]
        file = self.client.files.create(file=lines(*requests), purpose="batch")
        batch = self.client.batches.create(
            input_file_id=file.id, endpoint="/v1/completions", completion_window="24h", metadata={"team": "doors"}
        )
        self.assertEqual((batch.object, batch.metadata), ("batch", {"team": "doors"}))
        self.assertIn(batch.id, [item.id for item in self.client.batches.list(limit=100)])
        self.client.batches.cancel(batch.id)
        batch = self.finished(batch)
        self.assertEqual(batch.status, "cancelled")
        self.assertLess(batch.request_counts.completed, 200)
        with self.assertRaises(openai.NotFoundError):
            self.client.batches.retrieve("batch_0")
        for fields, param in (
            ({"endpoint": "/v1/images"}, "endpoint"),
            ({"input_file_id": "file-0"}, "input_file_id"),
            ({"completion_window": "7d"}, "completion_window"),
        ):
            good = {"input_file_id": file.id, "endpoint": "/v1/completions", "completion_window": "24h"}
            with self.subTest(param=param):
                with self.assertRaises(openai.APIStatusError) as caught:
                    self.client.batches.create(**{**good, **fields})
                self.assertIn(caught.exception.status_code, (400, 404))
                self.assertEqual(caught.exception.param, param)


if __name__ == "__main__":
    unittest.main()
