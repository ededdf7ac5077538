"""The rules of docs/development.md about who may include whom, and where certain things may stand.

    layering.py [--root FOLDER]   checks a source tree; one line for each violation; exit status 1
                                  when there is one
    layering.py --self-test       checks that each rule finds a violation planted in a small tree
"""

import argparse
import pathlib
import re
import sys
import tempfile

SOURCE_SUFFIXES = (".h", ".cc", ".cu", ".cuh")
MAX_LINES = 800

# Folder -> folders whose headers its files may include, besides its own. The longest folder that
# holds a file decides. "proto" stands for the generated headers (nosara/...).
MAY_INCLUDE = {
    "base": [],
    "kernels": [],
    "text": ["base"],
    "cluster": ["proto", "base"],
    "kvstore/api": ["base", "proto"],
    "kvstore/transport": ["kvstore/api", "base"],
    "kvstore/client": ["kvstore/api", "kvstore/transport", "proto", "base"],
    "kvstore/server": ["kvstore/api", "kvstore/transport", "cluster", "proto", "base"],
    "worker": ["kernels", "kvstore/api", "kvstore/client", "cluster", "text", "proto", "base"],
    # The parts of the worker: the model knows nothing of how it is run, the backend nothing of
    # requests, RPCs or stores.
    "worker/model": ["text", "base"],
    "worker/backend": ["worker/model", "worker/cache", "kernels", "kvstore/api", "base"],
    "router": ["kvstore/api", "cluster", "text", "proto", "base"],
    "client": ["text", "proto", "base"],
    # `nosara serve`: all programs in one process. The only place that sees all three servers.
    "client/serve": ["client", "router", "worker", "kvstore/api", "kvstore/client",
                     "kvstore/server", "kvstore/transport", "text", "proto", "base"],
}

# First folders of our own headers.
TOP_FOLDERS = {folder.split("/")[0] for folder in MAY_INCLUDE} | {"tests", "tools"}

# Files that may include gRPC, and UCX. Tests may include anything.
GRPC_FILE = re.compile(r"(^|_)(service|server|client)\.(h|cc)$")
UCX_FILE = re.compile(r"^ucx_\w+\.(h|cc)$")

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^">]+)[">]', re.MULTILINE)
COMMENTS_AND_STRINGS = re.compile(
    r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'', re.DOTALL)
SLEEP = re.compile(
    r"\b(sleep_for|sleep_until|SleepFor|usleep|nanosleep|clock_nanosleep)\b|(?<![\w.>])sleep\s*\(")
GETENV = re.compile(r"\b(?:secure_)?getenv\b")
LAUNCH = re.compile(r"<<<")


def folder_of(path, folders):
    """The longest of `folders` that holds the file or header `path`, or None."""
    holding = [folder for folder in folders if path.startswith(folder + "/")]
    return max(holding, key=len, default=None)


def blank(match):
    """What a comment or string is replaced by: its line breaks only."""
    return "\n" * match.group(0).count("\n")


class Checker:
    """Collects the violations of one source tree."""

    def __init__(self, root):
        self.root = root
        self.violations = []
        self.files = 0

    def report(self, path, line, message):
        self.violations.append(f"{path}:{line}: {message}")

    def run(self):
        for folder in sorted(TOP_FOLDERS):
            for file in sorted((self.root / folder).rglob("*")):
                if file.suffix in SOURCE_SUFFIXES and file.is_file():
                    self.check_file(file)
        return self.violations

    def check_file(self, file):
        self.files += 1
        path = file.relative_to(self.root).as_posix()
        text = file.read_text(encoding="utf-8")
        lines = text.count("\n")
        if lines > MAX_LINES:
            self.report(path, lines, f"{lines} lines: at most {MAX_LINES}; split by owned state")
        for include in INCLUDE.finditer(text):
            line = text.count("\n", 0, include.start(2)) + 1
            self.check_include(path, line, include.group(1), include.group(2))
        self.check_code(path, COMMENTS_AND_STRINGS.sub(blank, text))

    def check_include(self, path, line, bracket, header):
        name = path.rsplit("/", 1)[-1]
        in_tests = path.startswith("tests/")
        if header.startswith(("ucp/", "uct/", "ucs/")) and not in_tests:
            if not (path.startswith("kvstore/transport/") and UCX_FILE.match(name)):
                self.report(path, line, f"<{header}>: only in kvstore/transport/ucx_*")
        if header.startswith(("grpcpp/", "grpc/")) or header.endswith(".grpc.pb.h"):
            allowed = in_tests or path.startswith("base/") or GRPC_FILE.search(name)
            if not allowed:
                self.report(path, line,
                            f"<{header}>: only in *_service, *_server and *_client files")
        if header.startswith(("cuda", "cublas", "nccl")) and not in_tests:
            if not path.startswith(("kernels/", "worker/backend/")):
                self.report(path, line, f"<{header}>: only in kernels and worker/backend")
        if header.startswith("sentencepiece") and path != "text/sentencepiece_plugin.cc":
            self.report(path, line, f"<{header}>: only in text/sentencepiece_plugin.cc, which has a "
                                    "symbol scope of its own")
        if header.startswith("prometheus/") and path != "base/metrics.cc":
            self.report(path, line, f"<{header}>: only in base/metrics.cc, which hides the library")
        if path.startswith("kernels/") and header.startswith(("absl/", "spdlog/", "google/")):
            self.report(path, line, f"<{header}>: kernels use the CUDA runtime and std only")
        if in_tests or path.startswith("tools/"):
            return

        if header.startswith("nosara/"):
            header_path = "proto/" + header
        else:
            header_path = header
            if header.split("/")[0] not in TOP_FOLDERS:
                return  # another project's header, or one of the same folder
            if bracket == "<":
                self.report(path, line, f"<{header}>: our own headers stand in quotes")
        here = folder_of(path, MAY_INCLUDE)
        if here is None:
            self.report(path, line, "this file is in no folder that the table of rules knows")
            return
        allowed = folder_of(header_path, MAY_INCLUDE[here] + [here]) is not None
        if header.startswith("client/serve/") and here != "client/serve":
            allowed = False
        if not allowed:
            others = ", ".join(MAY_INCLUDE[here]) or "nothing else of ours"
            self.report(path, line, f'"{header}": {here} may include {others}')

    def check_code(self, path, code):
        name = path.rsplit("/", 1)[-1]
        for match in SLEEP.finditer(code):
            if path.startswith("tests/"):
                self.report(path, code.count("\n", 0, match.start()) + 1,
                            f"{match.group(0)}: tests wait for events, they never sleep")
        for match in GETENV.finditer(code):
            if name != "main.cc" and not path.startswith("tests/"):
                self.report(path, code.count("\n", 0, match.start()) + 1,
                            "getenv: only main.cc reads the environment")
        for match in LAUNCH.finditer(code):
            if not (path.startswith("kernels/") and path.endswith((".cu", ".cuh"))):
                self.report(path, code.count("\n", 0, match.start()) + 1,
                            "<<<: kernels are launched in kernels/**.cu only")


# Path -> (content, a part of the message expected, or None where the file breaks no rule).
PLANTED = {
    "base/good.h": ('#include "base/other.h"\n#include <spdlog/spdlog.h>\n', None),
    "base/bad.cc": ('#include "worker/model/config.h"\n', "base may include"),
    "base/metrics.cc": ("#include <prometheus/exposer.h>\n", None),
    "kvstore/server/metrics.cc": ("#include <prometheus/exposer.h>\n", "only in base/metrics.cc"),
    "base/environment.cc": ('const char* p = getenv("HOME");\n', "getenv"),
    "text/good.cc": ('// getenv and <<< in a comment\nconst char* s = "getenv <<<";\n', None),
    "text/sentencepiece_plugin.cc": ("#include <sentencepiece_processor.h>\n", None),
    "text/tokenizer.cc": ("#include <sentencepiece_processor.h>\n", "symbol scope"),
    "text/bad.cc": ('#include "kvstore/api/layout.h"\n', "text may include"),
    "kernels/pool/pool.cu": ("void f() { g<<<1, 2>>>(); }\n", None),
    "kernels/pool/pool.h": ('#include "absl/status/status.h"\n', "std only"),
    "kernels/bad.h": ('#include "base/log.h"\n', "kernels may include"),
    "kvstore/api/bad.cc": ('#include "kvstore/client/client.h"\n', "kvstore/api may include"),
    "kvstore/transport/ucx_worker.cc": ("#include <ucp/api/ucp.h>\n", None),
    "kvstore/transport/bad.cc": ("#include <ucp/api/ucp.h>\n", "ucx_*"),
    "kvstore/client/store_client.cc": ('#include "kvstore/transport/transport.h"\n'
                                       '#include <grpcpp/grpcpp.h>\n', None),
    "kvstore/client/bad.cc": ('#include "kvstore/server/index.h"\n', "kvstore/client may include"),
    "kvstore/server/bad.cc": ('#include "kvstore/client/x.h"\n', "kvstore/server may include"),
    "kvstore/server/index.cc": ("#include <grpcpp/grpcpp.h>\n", "_service, *_server"),
    "worker/worker_service.cc": ('#include "worker/engine/engine.h"\n'
                                 '#include "nosara/worker/v1/worker.grpc.pb.h"\n', None),
    "worker/engine/bad.cc": ('#include "kvstore/server/index.h"\n', "worker may include"),
    "worker/engine/launch.cc": ("void f() { g<<<1, 2>>>(); }\n", "launched in kernels"),
    "worker/model/bad.cc": ('#include "worker/engine/engine.h"\n', "worker/model may include"),
    "worker/backend/good.cc": ('#include "worker/cache/slots.h"\n'
                               '#include "worker/model/config.h"\n', None),
    "router/tests.cc": ('#include "tests/status_matchers.h"\n', "router may include"),
    "worker/backend/bad.cc": ('#include "worker/engine/engine.h"\n', "worker/backend may include"),
    "router/bad.cc": ('#include "worker/model/config.h"\n', "router may include"),
    "router/main.cc": ('const char* p = getenv("HOME");\n', None),
    "client/bad.cc": ('#include "client/serve/serve.h"\n', "client may include"),
    "client/serve/serve.cc": ('#include "router/router.h"\n#include "worker/worker.h"\n'
                              '#include "kvstore/server/node.h"\n', None),
    "router/long.cc": ("int x;\n" * (MAX_LINES + 1), "at most 800"),
    "router/brackets.cc": ("#include <base/log.h>\n", "in quotes"),
    "tests/router/sleep_test.cc": ("absl::SleepFor(absl::Seconds(1));\n", "never sleep"),
    "tests/router/std_sleep_test.cc": ("std::this_thread::sleep_for(1s);\n", "never sleep"),
    "tests/router/good_test.cc": ('#include "worker/model/config.h"\n#include <grpcpp/grpcpp.h>\n',
                                  None),
}


def self_test():
    """Plants good and bad files in an empty tree; returns what was found wrongly or not found."""
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        for path, (content, _) in PLANTED.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(content, encoding="utf-8")
        violations = Checker(root).run()
        for path, (_, expected) in PLANTED.items():
            found = [line for line in violations if line.startswith(path + ":")]
            if expected is None and found:
                wrong.append(f"a file without fault was reported: {found}")
            elif expected is not None and not (len(found) == 1 and expected in found[0]):
                wrong.append(f"{path}: expected one report with '{expected}', got {found}")
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=pathlib.Path,
                        default=pathlib.Path(__file__).resolve().parents[2])
    parser.add_argument("--self-test", action="store_true")
    arguments = parser.parse_args()
    if arguments.self_test:
        problems = self_test()
        print("\n".join(problems) or f"all {len(PLANTED)} planted files were judged as expected")
        return 1 if problems else 0
    checker = Checker(arguments.root)
    violations = checker.run()
    print("\n".join(violations) or f"{checker.files} files, no violation")
    if checker.files == 0:
        print(f"no source file under {arguments.root}: is it the source tree?")
        return 1
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
