// nosara-router: the front door of a cluster.
#include <cstdint>
#include <string>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/strings/str_join.h"
#include "absl/time/time.h"
#include "base/log.h"
#include "base/process.h"
#include "base/program.h"
#include "base/status_macros.h"
#include "router/router_server.h"

ABSL_FLAG(std::string, listen, "127.0.0.1:50050", "host:port to listen on; port 0: any free one");
ABSL_FLAG(std::vector<std::string>, workers, {}, "workers, host:port, separated by commas");
ABSL_FLAG(std::vector<std::string>, model, {},
          "models that are served, name=directory with tokenizer.model, separated by commas");
ABSL_FLAG(std::string, policy, "least_loaded",
          "how a worker is picked: least_loaded or round_robin");
ABSL_FLAG(std::string, log_level, "info", "debug, info, warning or error");
ABSL_FLAG(std::string, port_file, "",
          "file that host:port is written to once the router listens; empty: none");
ABSL_FLAG(absl::Duration, drain_timeout, absl::Seconds(30),
          "how long running streams may go on after SIGTERM or SIGINT");
ABSL_FLAG(absl::Duration, poll_interval, absl::Milliseconds(500),
          "how often workers are asked for their load; 10ms or more");
ABSL_FLAG(absl::Duration, await_workers, absl::Seconds(5),
          "how long to wait at the start for all workers, before port_file is written; the router "
          "starts without those that are late");
ABSL_FLAG(int32_t, max_open_requests, 4096,
          "generations at a time, 1 or more; further ones are told to retry later");
ABSL_FLAG(int32_t, text_threads, 2, "threads that tokenize prompts, 1 or more");

namespace nosara::router {
namespace {

absl::Status Run() {
  RETURN_IF_ERROR(InitLogging("nosara-router", absl::GetFlag(FLAGS_log_level)));
  StopSignal stop;
  RouterServerOptions options;
  options.listen = absl::GetFlag(FLAGS_listen);
  options.worker_addresses = absl::GetFlag(FLAGS_workers);
  options.models = absl::GetFlag(FLAGS_model);
  options.policy = absl::GetFlag(FLAGS_policy);
  options.poll_interval = absl::GetFlag(FLAGS_poll_interval);
  options.max_open_requests = absl::GetFlag(FLAGS_max_open_requests);
  options.text_threads = absl::GetFlag(FLAGS_text_threads);
  ASSIGN_OR_RETURN(const auto server, RouterServer::Create(options));
  LogInfo("listening on {}, models {}, workers {}", server->address(),
          absl::StrJoin(options.models, ","), absl::StrJoin(options.worker_addresses, ","));
  const absl::Duration patience = absl::GetFlag(FLAGS_await_workers);
  if (!server->AwaitWorkers(static_cast<int>(options.worker_addresses.size()), patience)) {
    LogWarning("not all workers answered within {}", absl::FormatDuration(patience));
  }
  RETURN_IF_ERROR(WritePortFile(absl::GetFlag(FLAGS_port_file), server->address()));

  const std::string signal = stop.Wait();
  const absl::Duration drain_timeout = absl::GetFlag(FLAGS_drain_timeout);
  LogInfo("{}: draining for at most {}; once more to stop at once", signal,
          absl::FormatDuration(drain_timeout));
  server->Shutdown(drain_timeout);
  LogInfo("stopped");
  return absl::OkStatus();
}

}  // namespace
}  // namespace nosara::router

int main(int argc, char** argv) {
  return nosara::RunProgram(
      argc, argv,
      {"nosara-router",
       "The router: takes requests by gRPC, tokenizes, picks a worker, streams text.\n"
       "  nosara-router --workers=127.0.0.1:50060 --model=nosa-tiny=models/nosa-tiny\n"
       "Exit codes: 0 stopped by a signal, 1 could not start.",
       "router/main.cc"},
      nosara::router::Run);
}
