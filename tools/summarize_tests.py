"""The closing words of tools/test: names what failed and what was skipped, then counts single cases.

Usage: summarize_tests.py RESULTS_FOLDER SANITIZER, the folder holding ctest.xml, gtest/*.xml and
integration.json (absent under --sanitize thread, which builds no `tidepool`) and fuzz.json (there without
--sanitize only). RESULTS_FOLDER/retry holds ctest.xml and gtest/*.xml of the programs that were run once more.
"""

import glob
import json
import os
import sys
import xml.etree.ElementTree as ElementTree


def gtest_cases(folder):
    """{program: [(name, result, detail)]} from the XML that GTest wrote."""
    out = {}
    for path in glob.glob(os.path.join(folder, "*.xml")):
        program = os.path.splitext(os.path.basename(path))[0]
        cases = out.setdefault(program, [])
        for case in ElementTree.parse(path).getroot().iter("testcase"):
            name = f"{program}: {case.get('classname')}.{case.get('name')}"
            skipped = case.find("skipped")
            if case.find("failure") is not None or case.find("error") is not None:
                cases.append((name, "failed", ""))
            elif skipped is not None or case.get("result") == "skipped":
                message = (skipped.get("message") or "") if skipped is not None else ""
                cases.append((name, "skipped", message.strip().splitlines()[-1] if message.strip() else ""))
            elif case.get("status") == "notrun":
                continue  # disabled
            else:
                cases.append((name, "passed", ""))
    return out


def cases_by_program(folder):
    """{program: its cases}; a program that died counts as one failure on top of its cases. None: no results."""
    path = os.path.join(folder, "ctest.xml")
    if not os.path.exists(path):
        return None
    gtest = gtest_cases(os.path.join(folder, "gtest"))
    out = {}
    for program in ElementTree.parse(path).getroot().iter("testcase"):
        name, status = program.get("name"), program.get("status")
        cases = out[name] = gtest.get(name, [])
        if status == "run" and not cases:
            cases.append((name, "passed", ""))  # not a GTest program
        elif status == "fail" and not any(result == "failed" for _, result, _ in cases):
            cases.append((name, "failed", "crashed, timed out or could not run"))
        elif status in ("disabled", "notrun"):
            # A program that was not built is no choice of its author's.
            said = program.findtext("system-out", "").strip()
            cases.append((name, "failed" if "Unable to find executable" in said else "skipped", said))
    return out


def program_cases(folder):
    """Every case of every ctest program, of the second run where there was one; and what passed only then."""
    programs = cases_by_program(folder)
    if programs is None:
        return [("ctest", "failed", "wrote no results")]
    for program, again in (cases_by_program(os.path.join(folder, "retry")) or {}).items():
        passed = {name for name, result, _ in again if result == "passed"}
        for name, result, detail in programs[program]:
            if result == "failed" and (name in passed or not any(case[1] == "failed" for case in again)):
                print(f"flaky: {name}: passed only when it was run again, alone{': ' + detail if detail else ''}")
        programs[program] = again
    return [case for cases in programs.values() for case in cases]


def integration_cases(folder, sanitizer):
    path = os.path.join(folder, "integration.json")
    if os.path.exists(path):
        with open(path) as file:
            cases = json.load(file)
        for case in cases:
            if "flaky" in case:
                detail = " ".join(case["flaky"].split())[:200]
                print(f"flaky: {case['name']}: passed only when it was run again, alone: {detail}")
        return [(case["name"], case["result"], case["detail"]) for case in cases]
    if sanitizer == "thread":
        print("integration tests: none, --sanitize thread builds no tidepool")
        return []
    return [("integration", "failed", "wrote no results")]


def fuzz_cases(folder, sanitizer):
    if sanitizer != "none":
        return []  # fuzz_replay_test runs the corpus there
    path = os.path.join(folder, "fuzz.json")
    if not os.path.exists(path):
        return [("fuzz", "failed", "wrote no results")]
    with open(path) as file:
        return [(case["name"], case["result"], case["detail"]) for case in json.load(file)]


def main():
    folder, sanitizer = sys.argv[1:3]
    cases = program_cases(folder) + integration_cases(folder, sanitizer) + fuzz_cases(folder, sanitizer)
    for wanted in ("skipped", "failed"):
        for name, result, detail in sorted(cases):
            if result == wanted:
                detail = " ".join(detail.split())[:200]
                print(f"{wanted}: {name}{': ' + detail if detail else ''}")
    count = {wanted: sum(result == wanted for _, result, _ in cases) for wanted in ("passed", "failed", "skipped")}
    print(f"{count['passed']} passed, {count['failed']} failed, {count['skipped']} skipped")
    return 1 if count["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
