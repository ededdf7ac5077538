"""Adds up test results and prints `N passed, N failed, N skipped` as its last line.

Used by scripts/test. Reads the JUnit file that CTest wrote and, for GoogleTest programs, the XML
files that they wrote themselves (GTEST_OUTPUT), so that single test cases are counted and a case
that skipped itself shows as skipped. A program that failed without a failed case (a crash, a
timeout, a sanitizer report at exit) counts as one failure.

Exit status: 0 when something passed and nothing failed, 1 otherwise.
"""

import argparse
import pathlib
import sys
import xml.etree.ElementTree as ElementTree


class Counts:
    """Numbers of test cases, and the names of those that did not pass."""

    def __init__(self):
        self.passed = 0
        self.failed = []
        self.skipped = []

    def add(self, name, outcome):
        if outcome == "passed":
            self.passed += 1
        elif outcome == "failed":
            self.failed.append(name)
        else:
            self.skipped.append(name)


def case_outcome(case):
    """Outcome of one <testcase>, as CTest and GoogleTest write them."""
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    if case.find("skipped") is not None:
        return "skipped"
    status = case.get("status", "run")
    if status == "fail":
        return "failed"
    if status in ("notrun", "disabled") or case.get("result") in ("skipped", "suppressed"):
        return "skipped"
    return "passed"


def gtest_cases(path):
    """[(name, outcome)] of a GoogleTest XML file; nothing where it is missing or cut short."""
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError):
        return []
    return [(f"{case.get('classname')}.{case.get('name')}", case_outcome(case))
            for case in root.iter("testcase")]


def add_ctest(counts, junit, gtest_dir):
    for program in ElementTree.parse(junit).getroot().iter("testcase"):
        name = program.get("name")
        outcome = case_outcome(program)
        cases = gtest_cases(gtest_dir / f"{name}.xml")
        for case, case_result in cases:
            counts.add(f"{name}: {case}", case_result)
        if not cases:
            counts.add(name, outcome)
        elif outcome == "failed" and all(result != "failed" for _, result in cases):
            counts.add(f"{name}: failed outside its test cases", "failed")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--junit", type=pathlib.Path, required=True, help="CTest's JUnit file")
    parser.add_argument("--gtest", type=pathlib.Path, required=True,
                        help="folder of the GoogleTest XML files")
    parser.add_argument("--add", action="append", default=[], metavar="OUTCOME:NUMBER:NAME",
                        help="results of other runners, e.g. passed:12:'Python reference'")
    arguments = parser.parse_args()

    counts = Counts()
    if not arguments.junit.exists():
        print(f"error: {arguments.junit} is missing: CTest did not finish", file=sys.stderr)
        return 1
    add_ctest(counts, arguments.junit, arguments.gtest)
    for entry in arguments.add:
        outcome, number, name = entry.split(":", 2)
        for _ in range(int(number)):
            counts.add(name, outcome)

    for name in counts.skipped:
        print(f"skipped: {name}")
    for name in counts.failed:
        print(f"FAILED: {name}")
    print(f"{counts.passed} passed, {len(counts.failed)} failed, {len(counts.skipped)} skipped")
    return 0 if counts.passed > 0 and not counts.failed else 1


if __name__ == "__main__":
    sys.exit(main())
