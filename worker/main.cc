// nosara-worker: one loaded model, serving nosara.worker.v1.
#include <unistd.h>

#include <cstdint>
#include <string>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/time.h"
#include "base/log.h"
#include "base/process.h"
#include "base/program.h"
#include "base/status_macros.h"
#include "worker/worker_server.h"

ABSL_FLAG(std::string, listen, "127.0.0.1:50060", "host:port to listen on; port 0: any free one");
ABSL_FLAG(std::string, model_dir, "", "folder of the checkpoint: config.json, *.safetensors");
ABSL_FLAG(std::string, model_name, "", "name that requests ask for");
ABSL_FLAG(std::string, worker_id, "",
          "name of this worker in its cluster; empty: host name and process id");
ABSL_FLAG(std::vector<std::string>, stores, {}, "KV store nodes, host:port, separated by commas");
ABSL_FLAG(std::string, etcd, "",
          "instead of --stores: host:port of an etcd server where the stores of --cluster publish "
          "themselves");
ABSL_FLAG(std::string, cluster, "nosara", "name of the cluster in etcd");
ABSL_FLAG(int32_t, replicas, 1,
          "copies of each page on different stores, where there are so many: 1 to 8");
ABSL_FLAG(
    int32_t, repair_mib_per_s, 64,
    "how fast the worker restores lost copies of pages that it uses, MiB of pages per second, "
    "0 (not at all) or more");
ABSL_FLAG(std::string, store_path, "auto",
          "how bytes travel between worker and store: auto, mapped (shared memory of this machine) "
          "or ucx");
ABSL_FLAG(std::string, ucx_tls, "",
          "UCX transports in UCX's notation, e.g. tcp or sm,self,tcp; empty: UCX chooses");
ABSL_FLAG(std::string, attention, "nosa",
          "attention policy: nosa, infllmv2 (query-aware selection alone) or full");
ABSL_FLAG(int32_t, slots_per_head, 0,
          "blocks of a sequence that stay on the worker, per layer and KV head: 0 all of them, -1 "
          "the fewest that the model allows (topk_blocks), or a number from there up");
ABSL_FLAG(std::string, backend, "auto",
          "what computes: cuda, cpu, or auto: a GPU where there is one and the model is bf16");
ABSL_FLAG(int32_t, cuda_device, 0, "which GPU, as the driver numbers them");
ABSL_FLAG(int64_t, cache_mib, 0,
          "memory for all sequences' working caches, MiB; 0: 4096 on the CPU, nine tenths of what "
          "is free on a GPU");
ABSL_FLAG(int32_t, threads, 2, "compute threads, 1 to 1024");
ABSL_FLAG(int32_t, prefill_chunk_tokens, 0,
          "longest prefill chunk of one sequence, tokens; 0: 256 on the CPU, 960 on a GPU");
ABSL_FLAG(int32_t, step_tokens, 0,
          "most tokens of one step, all sequences together; 0: 512 on the CPU, 1024 on a GPU");
ABSL_FLAG(int32_t, max_running, 64, "sequences in progress at a time, 1 or more");
ABSL_FLAG(int32_t, max_queued, 1024, "requests that may wait, 1 or more; further ones are refused");
ABSL_FLAG(absl::Duration, store_patience, absl::Seconds(10),
          "how long a sequence may wait for the store to take its blocks before it fails");
ABSL_FLAG(int32_t, max_recoveries, 16,
          "how often one request may lose pages and go on by computing them again, 0 or more");
ABSL_FLAG(int64_t, max_replay_tokens, 1024,
          "after such a loss, most tokens of output that are computed again one by one, exactly as "
          "before; more are prefilled in chunks, faster; 0 or more");
ABSL_FLAG(absl::Duration, drain_timeout, absl::Seconds(30),
          "how long running requests may go on after SIGTERM or SIGINT");
ABSL_FLAG(std::string, log_level, "info", "debug, info, warning or error");
ABSL_FLAG(std::string, port_file, "",
          "file that host:port is written to once the worker listens; empty: none");

namespace nosara::worker {
namespace {

absl::StatusOr<kvstore::DataPath> ParseDataPath(const std::string& name) {
  if (name == "auto") return kvstore::DataPath::kAuto;
  if (name == "mapped") return kvstore::DataPath::kMapped;
  if (name == "ucx") return kvstore::DataPath::kUcx;
  return absl::InvalidArgumentError(
      absl::StrCat("store_path = '", name, "': must be auto, mapped or ucx"));
}

absl::StatusOr<WorkerServerOptions::Device> ParseDevice(const std::string& name) {
  if (name == "auto") return WorkerServerOptions::Device::kAuto;
  if (name == "cpu") return WorkerServerOptions::Device::kCpu;
  if (name == "cuda") return WorkerServerOptions::Device::kCuda;
  return absl::InvalidArgumentError(
      absl::StrCat("backend = '", name, "': must be auto, cpu or cuda"));
}

absl::StatusOr<AttentionPolicy> ParsePolicy(const std::string& name) {
  if (name == "nosa") return AttentionPolicy::kNosa;
  if (name == "infllmv2") return AttentionPolicy::kInfLlmV2;
  if (name == "full") return AttentionPolicy::kFull;
  return absl::InvalidArgumentError(
      absl::StrCat("attention = '", name, "': must be nosa, infllmv2 or full"));
}

absl::Status Run() {
  RETURN_IF_ERROR(InitLogging("nosara-worker", absl::GetFlag(FLAGS_log_level)));
  StopSignal stop;
  WorkerServerOptions options;
  options.listen = absl::GetFlag(FLAGS_listen);
  options.model_dir = absl::GetFlag(FLAGS_model_dir);
  options.model_name = absl::GetFlag(FLAGS_model_name);
  options.worker_id = absl::GetFlag(FLAGS_worker_id);
  if (options.worker_id.empty()) {
    char host[256] = "";
    gethostname(host, sizeof(host) - 1);
    options.worker_id = absl::StrCat(host, "-", getpid());
  }
  for (const std::string& address : absl::GetFlag(FLAGS_stores)) {
    kvstore::StoreEndpoint store;
    store.address = address;
    options.stores.push_back(store);
  }
  if (const std::string etcd = absl::GetFlag(FLAGS_etcd); !etcd.empty()) {
    options.etcd = cluster::EtcdLocation{etcd, absl::GetFlag(FLAGS_cluster)};
  }
  options.replicas = absl::GetFlag(FLAGS_replicas);
  options.repair_bytes_per_second = int64_t{absl::GetFlag(FLAGS_repair_mib_per_s)} << 20;
  ASSIGN_OR_RETURN(options.store_path, ParseDataPath(absl::GetFlag(FLAGS_store_path)));
  options.ucx_tls = absl::GetFlag(FLAGS_ucx_tls);
  ASSIGN_OR_RETURN(options.backend.policy, ParsePolicy(absl::GetFlag(FLAGS_attention)));
  options.backend.threads = absl::GetFlag(FLAGS_threads);
  options.backend.slots_per_head = absl::GetFlag(FLAGS_slots_per_head);
  ASSIGN_OR_RETURN(options.device, ParseDevice(absl::GetFlag(FLAGS_backend)));
  const int64_t cache_mib = absl::GetFlag(FLAGS_cache_mib);
  if (cache_mib < 0 || cache_mib > (int64_t{1} << 40)) {
    return absl::InvalidArgumentError(
        absl::StrCat("cache_mib = ", cache_mib, ": must be 0 or more"));
  }
  if (cache_mib > 0) options.backend.cache_bytes = cache_mib << 20;
  options.cuda_backend.device = absl::GetFlag(FLAGS_cuda_device);
  options.cuda_backend.policy = options.backend.policy;
  options.cuda_backend.threads = options.backend.threads;
  options.cuda_backend.slots_per_head = options.backend.slots_per_head;
  options.cuda_backend.cache_bytes = cache_mib << 20;
  options.cuda_backend.max_sequences = absl::GetFlag(FLAGS_max_running);
  options.prefill_chunk_tokens = absl::GetFlag(FLAGS_prefill_chunk_tokens);
  options.step_tokens = absl::GetFlag(FLAGS_step_tokens);
  options.engine.max_running = absl::GetFlag(FLAGS_max_running);
  options.engine.max_queued = absl::GetFlag(FLAGS_max_queued);
  options.engine.store_patience = absl::GetFlag(FLAGS_store_patience);
  options.engine.max_recoveries = absl::GetFlag(FLAGS_max_recoveries);
  options.engine.max_replay_tokens = absl::GetFlag(FLAGS_max_replay_tokens);
  const std::string stores =
      options.etcd.has_value()
          ? absl::StrCat("of cluster ", options.etcd->cluster, " in etcd ", options.etcd->endpoint)
          : absl::StrJoin(absl::GetFlag(FLAGS_stores), ",");
  ASSIGN_OR_RETURN(const auto server, WorkerServer::Create(std::move(options)));
  LogInfo("{}, stores {}", server->Describe(), stores);
  LogInfo("listening on {}", server->address());
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
}  // namespace nosara::worker

int main(int argc, char** argv) {
  return nosara::RunProgram(
      argc, argv,
      {"nosara-worker",
       "The worker: loads a model, runs requests that a router sends, keeps their KV cache in the\n"
       "KV stores.\n"
       "  nosara-worker --model_dir=models/nosa-tiny --model_name=nosa-tiny "
       "--stores=127.0.0.1:50061\n"
       "Exit codes: 0 stopped by a signal, 1 could not start.",
       "worker/main.cc"},
      nosara::worker::Run);
}
