"""server/gateway/API.md is what clients read: it names every field of OpenAI's description, and the server holds to it."""

import json
import os
import re
import unittest

from support import ROOT, ServeCase

PAGE = os.path.join(ROOT, "server", "gateway", "API.md")
OPENAPI = os.path.join(ROOT, "..", "shared", "data", "openapi", "openai_inference_subset.json")
STATES = {"served", "refused", "no effect"}

# Path -> the schema of its request in OpenAI's description.
SCHEMAS = {
    "/v1/chat/completions": "CreateChatCompletionRequest",
    "/v1/completions": "CreateCompletionRequest",
    "/v1/embeddings": "CreateEmbeddingRequest",
    "/v1/responses": "CreateResponse",
    "/v1/batches": "CreateBatchRequest",
    "/v1/files": "CreateFileRequest",
}
SMALLEST = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 1},
    "/v1/completions": {"prompt": "Hello", "max_tokens": 1},
    "/v1/embeddings": {"input": "Hello"},
    "/v1/responses": {"input": "Hello!", "max_output_tokens": 1},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 1},
}


def sections():
    """{path: {field: state}} of the page's tables whose heads are | field | status | ..."""
    out, path, columns = {}, None, None
    with open(PAGE) as file:
        for line in file:
            if line.startswith("#"):
                found = re.search(r"`(?:POST )?(/v1/[a-z/_]+)`", line)
                path, columns = (found.group(1) if found else None), None
                continue
            if not line.startswith("|"):
                columns = None
                continue
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if columns is None:
                columns = cells
            elif path and columns[:2] == ["field", "status"] and not set(cells[0]) <= set("-: "):
                for field in re.findall(r"`([^`]+)`", cells[0]):
                    out.setdefault(path, {})[field] = cells[1]
    return out


def properties(schemas, schema, seen=()):
    """{field: its schema}, through references and compositions."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[-1]
        return {} if name in seen else properties(schemas, schemas[name], seen + (name,))
    out = {}
    for key in ("allOf", "anyOf", "oneOf"):
        for part in schema.get(key, []):
            out.update(properties(schemas, part, seen))
    out.update(schema.get("properties", {}))
    return out


class PageTest(unittest.TestCase):
    def test_every_state_is_one_that_the_page_explains(self):
        for path, fields in sections().items():
            for field, state in fields.items():
                self.assertIn(state, STATES, f"{path} {field}")

    def test_every_field_of_openais_description_is_on_the_page(self):
        if not os.path.exists(OPENAPI):
            self.skipTest(f"{OPENAPI} is not there")
        with open(OPENAPI) as file:
            schemas = json.load(file)["components"]["schemas"]
        page = sections()
        for path, name in SCHEMAS.items():
            with self.subTest(path):
                missing = set(properties(schemas, {"$ref": name})) - set(page.get(path, {}))
                self.assertEqual(missing, set())

    def test_every_field_that_the_gateway_knows_is_on_the_page(self):
        states = {"Served": "served", "Taken": "no effect", "Refused": "refused"}
        with open(os.path.join(ROOT, "server", "gateway", "openai_fields.cc")) as file:
            known = re.findall(r'\{"(\w+)", k(Chat|Text|Both), k(Served|Taken|Refused)', file.read())
        self.assertGreater(len(known), 100)
        page = sections()["/v1/chat/completions"]
        for field, endpoint, use in known:
            if endpoint != "Text":
                self.assertEqual(page.get(field), states[use], field)


class ServerTest(ServeCase):
    def refusal(self, path, field, value):
        body = {"model": self.model, **SMALLEST[path], field: value}
        status, _, reply = self.serve.post(path, body)
        error = reply.get("error", {})
        # Anthropic's errors have no param: their message begins with it.
        named = error.get("param") or str(error.get("message"))
        return status, named

    def test_no_field_on_the_page_is_ignored(self):
        """Each is read: what it can never be is a 400 that names it."""
        for path, fields in sections().items():
            if path not in SMALLEST:
                continue
            for field in fields:
                if "." in field or "[" in field:
                    continue
                with self.subTest(path=path, field=field):
                    # No field may be this list; objects and lists of them are wrong where numbers and texts belong.
                    status, named = self.refusal(path, field, [[{"wrong": [7]}]])
                    self.assertEqual((status, named[: len(field)]), (400, field))

    def test_what_the_page_calls_refused_is_refused_as_such(self):
        for path, fields in sections().items():
            if path not in SMALLEST:
                continue
            for field, state in fields.items():
                if state != "refused" or "." in field or "[" in field:
                    continue
                with self.subTest(path=path, field=field):
                    status, _, reply = self.serve.post(
                        path, {"model": self.model, **SMALLEST[path], field: {"anything": 1}}
                    )
                    self.assertEqual(status, 400)
                    if "code" in reply["error"]:
                        self.assertEqual(reply["error"]["code"], "unsupported_parameter")


if __name__ == "__main__":
    unittest.main()
