"""Calls litellm as the lines of its input say, for test_sdk_litellm.py: litellm needs an older openai package than the
other tests, so it has an interpreter of its own. A line in: {"call": function, "fields": {...}}. A line out:
{"value": ...}, of a stream the list of its chunks, or {"error": class, "status", "message"}."""

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network for prices

# Whatever the package prints itself must not end up between our lines.
out, sys.stdout = sys.stdout, sys.stderr

import litellm  # noqa: E402

litellm.telemetry = False
litellm.suppress_debug_info = True


def call(name, fields):
    reply = getattr(litellm, name)(**fields)
    if fields.get("stream"):
        chunks = list(reply)
        whole = litellm.stream_chunk_builder(chunks)
        return {"chunks": [chunk.model_dump() for chunk in chunks], "whole": whole.model_dump()}
    return reply.model_dump()


for line in sys.stdin:
    request = json.loads(line)
    try:
        answer = {"value": call(request["call"], request["fields"])}
    except Exception as error:
        answer = {
            "error": type(error).__name__,
            "status": getattr(error, "status_code", None),
            "message": str(error),
        }
    print(json.dumps(answer, default=str), file=out, flush=True)
