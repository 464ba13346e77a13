"""Our schema compiler next to the JSON-Schema-Test-Suite and the `jsonschema` library.

For each schema of the suite that we compile: the instances that the suite calls invalid must have no spelling in the
grammar; those that it calls valid should have one (where not they are counted: under-acceptance, see
server/structured/README.md for what we leave out on purpose); and the documents that random walks through the token
masks write must be valid, as `jsonschema` sees it. Schemas of maskbench (real ones) the same. A table of counts by group
is printed. TIDEPOOL_STRUCTURED_WALKS (3), TIDEPOOL_STRUCTURED_SEED (7).
"""

import collections
import json
import os
import pathlib
import re
import subprocess
import unittest

from support import BINARY, ROOT

try:
    import jsonschema
    from jsonschema import validators
except ImportError:
    jsonschema = None

WALKS = int(os.environ.get("TIDEPOOL_STRUCTURED_WALKS", "3"))
SEED = int(os.environ.get("TIDEPOOL_STRUCTURED_SEED", "7"))
DRIVER = pathlib.Path(os.environ.get(
    "TIDEPOOL_STRUCTURED_DRIVER", pathlib.Path(BINARY).parent.parent / "tests/server/structured/structured_driver"))
DATA = pathlib.Path(ROOT).parent / "shared/data/json_schema"
SUITE = DATA / "JSON-Schema-Test-Suite/tests"

# ECMAScript's classes in Python's words: `pattern` is ECMA-262 in JSON Schema, and re has wider classes and a $ that
# matches before a last line feed.
ECMA = {
    "d": "0-9",
    "w": "A-Za-z0-9_",
    "s": "\t-\r \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff",
}
PROPERTIES = {"Letter": "^\\W\\d_", "digit": "\\d"}


def ecma(pattern):
    out, at, in_class = "", 0, False
    while at < len(pattern):
        c = pattern[at]
        if c == "\\" and at + 1 < len(pattern):
            e = pattern[at + 1]
            at += 2
            if e.lower() in ECMA:
                if in_class and e.isupper():
                    raise re.error("a negated class in a class")
                out += ECMA[e] if in_class else f"[{'^' if e.isupper() else ''}{ECMA[e.lower()]}]"
            elif e in "pP":
                end = pattern.index("}", at)
                inside = PROPERTIES.get(pattern[at + 1:end])
                if inside is None or in_class or e == "P":
                    raise re.error("a property")
                out += f"[{inside}]"
                at = end + 1
            elif e == "c":
                out += f"\\x{ord(pattern[at]) & 31:02x}"
                at += 1
            elif e == "u" and pattern[at:at + 1] == "{":
                end = pattern.index("}", at)
                out += re.escape(chr(int(pattern[at + 1:end], 16)))
                at = end + 1
            else:
                out += "/" if e == "/" else "\\" + e
            continue
        in_class = c == "[" or (in_class and c != "]")
        out += r"\Z" if c == "$" and not in_class else r"[^\n\r\u2028\u2029]" if c == "." and not in_class else c
        at += 1
    return out


def pattern_keyword(validator, pattern, instance, schema):
    if isinstance(instance, str) and not re.search(ecma(pattern), instance):
        yield jsonschema.ValidationError(f"{instance!r} does not match {pattern!r}")


def pattern_properties_keyword(validator, patterns, instance, schema):
    if not isinstance(instance, dict):
        return
    for pattern, sub in patterns.items():
        for name, value in instance.items():
            if re.search(ecma(pattern), name):
                yield from validator.descend(value, sub, path=name, schema_path=pattern)


def additional_properties_keyword(validator, rest, instance, schema):
    if not isinstance(instance, dict):
        return
    patterns = [ecma(p) for p in schema.get("patternProperties", {})]
    extra = [n for n in instance
             if n not in schema.get("properties", {}) and not any(re.search(p, n) for p in patterns)]
    if rest is False:
        if extra:
            yield jsonschema.ValidationError(f"{extra} may not be there")
    elif isinstance(rest, dict):
        for name in extra:
            yield from validator.descend(instance[name], rest, path=name)


def nullable_type_keyword(validator, types, instance, schema):
    if instance is None and schema.get("nullable") is True:
        return
    yield from validators.Draft202012Validator.VALIDATORS["type"](validator, types, instance, schema)


def validator_of(schema, default):
    base = validators.validator_for(schema, default=default) if isinstance(schema, dict) else default
    extended = validators.extend(base, {
        "pattern": pattern_keyword,
        "patternProperties": pattern_properties_keyword,
        "additionalProperties": additional_properties_keyword,
        "type": nullable_type_keyword,
    })
    return extended(schema, format_checker=base.FORMAT_CHECKER)


class Driver:
    def __init__(self):
        self.process = subprocess.Popen([str(DRIVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, request):
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(f"the driver ended at {json.dumps(request)[:500]}")
        return json.loads(line)

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


COLUMNS = ["schemas", "compiled", "refused", "error", "valid", "missed", "invalid", "wrong", "walks", "unended", "bad"]


@unittest.skipIf(jsonschema is None, "PyPI jsonschema is not installed")
@unittest.skipUnless(DRIVER.exists(), f"{DRIVER} is not built")
@unittest.skipUnless(DATA.is_dir(), f"{DATA} is not here")
class StructuredSuiteTest(unittest.TestCase):
    maxDiff = None

    def setUp(self):
        self.driver = Driver()
        self.addCleanup(self.driver.close)
        self.table = collections.defaultdict(collections.Counter)
        self.wrong, self.bad, self.missed, self.refused = [], [], [], collections.Counter()

    def run_schema(self, group, name, schema, tests, default):
        row = self.table[group]
        row["schemas"] += 1
        made = self.driver.ask({"schema": schema})
        if not made["ok"]:
            # Refused by name: the message begins with the JSON pointer of what we do not have or what is malformed.
            self.assertRegex(made["error"], r"^#|^nothing at all|^it needs|^compiling it|^its automaton", (name, made))
            kind = "refused" if made["code"] != "INVALID_ARGUMENT" else "error"
            row[kind] += 1
            keyword = re.match(r"#\S*?([^/ ]+): (.*)", made["error"])
            self.refused[keyword[1] if keyword else made["error"][:60]] += 1
            # A schema that nothing matches has no valid instance.
            if made["error"].startswith("nothing at all"):
                for test in tests:
                    if test["valid"]:
                        row["missed"] += 1
                        self.missed.append((name, test["description"], "nothing matches"))
            return
        row["compiled"] += 1
        for test in tests:
            text = self.driver.ask({"accept": test["data"]})["text"]
            if test["valid"]:
                row["valid"] += 1
                if text is None:
                    row["missed"] += 1
                    self.missed.append((name, test["description"], json.dumps(test["data"])[:80]))
            else:
                row["invalid"] += 1
                if text is not None:
                    row["wrong"] += 1
                    self.wrong.append((name, test["description"], text[:200]))
        validator = validator_of(schema, default)
        for walk in range(WALKS):
            got = self.driver.ask({"generate": SEED * 1000 + walk, "tokens": 20 + 60 * walk})
            row["walks"] += 1
            if "error" in got:
                row["bad"] += 1
                self.bad.append((name, got["error"], got["text"][:200]))
                continue
            if not got["complete"]:
                row["unended"] += 1
                continue
            try:
                document = json.loads(got["text"])
                found = next(iter(validator.iter_errors(document)), None)
            except re.error:
                continue  # a pattern that Python cannot be told
            except (json.JSONDecodeError, UnicodeError) as error:
                found = error
            if found is not None:
                row["bad"] += 1
                self.bad.append((name, str(found)[:200], got["text"][:300]))

    def report(self, title):
        out = [f"{title}: " + " ".join(f"{c:>8}" for c in ["group".ljust(40), *COLUMNS])]
        total = collections.Counter()
        for group, row in sorted(self.table.items()):
            total.update(row)
            out.append(" " * len(title) + "  " + group.ljust(40) + " " + " ".join(f"{row[c]:>8}" for c in COLUMNS))
        out.append(" " * len(title) + "  " + "all".ljust(40) + " " + " ".join(f"{total[c]:>8}" for c in COLUMNS))
        out.append("refused: " + ", ".join(f"{k} {n}" for k, n in self.refused.most_common()))
        out += [f"missed: {m}" for m in self.missed]
        print("\n".join(out), flush=True)
        self.assertEqual(self.wrong, [], "invalid instances that the grammar takes")
        self.assertEqual(self.bad, [], "generated documents that are not valid")

    def run_suite(self, draft, default):
        for path in sorted((SUITE / draft).rglob("*.json")):
            group = str(path.relative_to(SUITE / draft))[:-len(".json")]
            for entry in json.loads(path.read_text()):
                tests = entry["tests"]
                # `format` only annotates in the main part of the suite; we assert it, which the optional part tests.
                if group == "format":
                    tests = [t for t in tests if t["valid"] is False or not isinstance(t["data"], str)]
                schema = entry["schema"]
                # Not all files of draft 7 name their dialect.
                if draft == "draft7" and isinstance(schema, dict) and "$schema" not in schema:
                    schema = {"$schema": "http://json-schema.org/draft-07/schema#", **schema}
                self.run_schema(group, f"{draft} {group}: {entry['description']}", schema, tests, default)
        self.report(draft)

    def test_draft2020_12(self):
        self.run_suite("draft2020-12", validators.Draft202012Validator)

    def test_draft7(self):
        self.run_suite("draft7", validators.Draft7Validator)

    def test_maskbench(self):
        for path in sorted((DATA / "maskbench_sample").glob("*.jsonl")):
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                self.run_schema(path.stem, entry["id"], entry["schema"], entry["tests"],
                                validators.Draft202012Validator)
        self.report("maskbench")


if __name__ == "__main__":
    unittest.main()
