#include "client/serve/serve.h"

#include <sys/statvfs.h>

#include <algorithm>
#include <filesystem>
#include <iostream>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "base/log.h"
#include "base/process.h"
#include "base/status_macros.h"
#include "client/serve/embedded_cluster.h"

namespace nosara::client {
namespace {

namespace fs = std::filesystem;

constexpr absl::string_view kUsage =
    "nosara serve: router, worker and KV store in one process, on the CPU.\n"
    "  nosara serve\n"
    "  nosara serve --model=my-model=/models/my-model --listen=0.0.0.0:50050\n"
    "Without --model it serves the demo model, models/nosa-tiny. Ctrl-C ends it.\n";

constexpr int64_t kDefaultArenaMib = 256;

struct Flags {
  std::string listen = std::string(kDefaultAddress);
  std::string model;
  int64_t arena_mib = 0;
  std::string arena_folder = "/dev/shm";
  int64_t slots_per_head = 0;
  int64_t threads = 2;
  int64_t cache_mib = 4096;
  std::string log_level = "info";
  std::string port_file;
  absl::Duration drain_timeout = absl::Seconds(30);
};

// The demo model: beside the binaries of a bundle, in the tree that they were built in, or here.
absl::StatusOr<std::string> FindDemoModel() {
  std::error_code error;
  const fs::path folder = fs::read_symlink("/proc/self/exe", error).parent_path();
  std::vector<std::string> looked_at;
  for (const fs::path& base : {folder / "..", folder / "../../..", fs::path(".")}) {
    const fs::path candidate = (base / "models/nosa-tiny").lexically_normal();
    if (fs::exists(candidate / "config.json", error)) return candidate.string();
    looked_at.push_back(candidate.string());
  }
  return absl::NotFoundError(absl::StrCat("the demo model is not in ",
                                          absl::StrJoin(looked_at, ", "),
                                          "; name a model with --model=name=directory"));
}

// Containers often have a small /dev/shm: by default no more than three quarters of what is free.
uint64_t ArenaBytes(const Flags& flags) {
  if (flags.arena_mib > 0) return static_cast<uint64_t>(flags.arena_mib) << 20;
  uint64_t bytes = static_cast<uint64_t>(kDefaultArenaMib) << 20;
  struct statvfs stat;
  if (statvfs(flags.arena_folder.c_str(), &stat) == 0) {
    bytes = std::min<uint64_t>(bytes, uint64_t{stat.f_bavail} * stat.f_frsize / 4 * 3);
  }
  return bytes;
}

absl::Status CheckRange(absl::string_view flag, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("--", flag, ": ", value, " is not in the range from ", low, " to ", high));
}

absl::StatusOr<EmbeddedClusterOptions> ToOptions(const Flags& flags) {
  RETURN_IF_ERROR(CheckRange("arena_mib", flags.arena_mib, 0, int64_t{1} << 30));
  RETURN_IF_ERROR(CheckRange("slots_per_head", flags.slots_per_head, -1, 1 << 24));
  RETURN_IF_ERROR(CheckRange("threads", flags.threads, 1, 1024));
  RETURN_IF_ERROR(CheckRange("cache_mib", flags.cache_mib, 1, int64_t{1} << 30));
  EmbeddedClusterOptions options;
  options.listen = flags.listen;
  if (flags.model.empty()) {
    ASSIGN_OR_RETURN(options.model_dir, FindDemoModel());
  } else {
    const std::pair<std::string, std::string> parts =
        absl::StrSplit(flags.model, absl::MaxSplits('=', 1));
    options.model_name = parts.second.empty() ? "" : parts.first;
    options.model_dir = parts.second.empty() ? parts.first : parts.second;
  }
  if (options.model_name.empty()) {
    // A trailing slash leaves no file name.
    const fs::path path = fs::path(options.model_dir + "/").lexically_normal();
    options.model_name = path.parent_path().filename().string();
  }
  options.arena_bytes = ArenaBytes(flags);
  options.arena_folder = flags.arena_folder;
  options.slots_per_head = static_cast<int>(flags.slots_per_head);
  options.threads = static_cast<int>(flags.threads);
  options.cache_bytes = flags.cache_mib << 20;
  return options;
}

absl::Status Serve(const Flags& flags, const EmbeddedClusterOptions& options) {
  StopSignal stop;
  ASSIGN_OR_RETURN(const auto cluster, EmbeddedCluster::Create(options));
  LogInfo("{}", cluster->Describe());
  LogInfo("KV cache: {} MiB in {}", options.arena_bytes >> 20, options.arena_folder);
  RETURN_IF_ERROR(WritePortFile(flags.port_file, cluster->address()));
  std::cout << "Serving " << options.model_name << " at " << cluster->address() << "\n"
            << "Try: nosara generate "
            << (cluster->address() == kDefaultAddress
                    ? ""
                    : absl::StrCat("--address=", cluster->address(), " "))
            << "--prompt=\"The captain looked at the sea, and\"" << std::endl;
  const std::string signal = stop.Wait();
  LogInfo("{}: draining for at most {}; once more to stop at once", signal,
          absl::FormatDuration(flags.drain_timeout));
  cluster->Shutdown(flags.drain_timeout);
  LogInfo("stopped");
  return absl::OkStatus();
}

int Run(const std::vector<std::string>& args) {
  Flags flags;
  FlagSet set;
  set.Add("listen", &flags.listen, "host:port to listen on; port 0: any free one");
  set.Add("model", &flags.model,
          "the model: its directory, or name=directory; absent: the demo model");
  set.Add("arena_mib", &flags.arena_mib,
          "memory for the KV cache outside the worker, MiB; 0: 256, or three quarters of what is\n"
          "free in arena_folder");
  set.Add("arena_folder", &flags.arena_folder, "folder of the KV cache, in shared memory");
  set.Add("slots_per_head", &flags.slots_per_head,
          "blocks of a sequence that the worker keeps per layer and KV head; 0: all; -1: the\n"
          "fewest that the model allows, all others are fetched when a step selects them");
  set.Add("threads", &flags.threads, "compute threads, 1 to 1024");
  set.Add("cache_mib", &flags.cache_mib, "memory of the worker for all sequences, MiB");
  set.Add("log_level", &flags.log_level, "debug, info, warning or error");
  set.Add("port_file", &flags.port_file, "file that host:port is written to once it serves");
  set.Add("drain_timeout", &flags.drain_timeout,
          "how long running requests may go on after Ctrl-C or SIGTERM");
  if (const auto exit = ParseFlags(set, kUsage, args, 0, nullptr)) return *exit;
  absl::Status status = InitLogging("nosara-serve", flags.log_level);
  if (status.ok()) {
    const auto options = ToOptions(flags);
    status = options.status();
    if (options.ok()) return Report(Serve(flags, *options));
  }
  Report(status);
  return kExitUsage;
}

}  // namespace

Command ServeCommand() {
  return {"serve", "serve a model: everything in one process, no other service needed", Run};
}

}  // namespace nosara::client
