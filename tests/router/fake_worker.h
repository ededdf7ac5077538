// A worker that does what a test tells it: real gRPC, no model.
#pragma once

#include <grpcpp/grpcpp.h>

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "base/check.h"
#include "nosara/worker/v1/worker.grpc.pb.h"

namespace nosara::router {

using WorkerWriter = grpc::ServerWriter<worker::v1::ExecuteResponse>;

inline bool SendAccepted(WorkerWriter* writer, uint32_t cached_tokens = 0) {
  worker::v1::ExecuteResponse event;
  event.mutable_accepted()->set_cached_tokens(cached_tokens);
  return writer->Write(event);
}

inline bool SendTokens(WorkerWriter* writer, absl::Span<const int32_t> ids) {
  worker::v1::ExecuteResponse event;
  for (const int32_t id : ids) event.mutable_tokens()->add_tokens()->set_id(id);
  return writer->Write(event);
}

inline bool SendCompleted(WorkerWriter* writer, inference::v1::FinishReason reason,
                          uint32_t prompt_tokens, uint32_t completion_tokens) {
  worker::v1::ExecuteResponse event;
  event.mutable_completed()->set_reason(reason);
  event.mutable_completed()->mutable_usage()->set_prompt_tokens(prompt_tokens);
  event.mutable_completed()->mutable_usage()->set_completion_tokens(completion_tokens);
  event.mutable_completed()->mutable_cache()->set_records_selected(7);
  return writer->Write(event);
}

/// Thread-safe. Listens on a free port of the loopback.
class FakeWorker final : private worker::v1::WorkerService::Service {
 public:
  using Handler = std::function<grpc::Status(grpc::ServerContext*,
                                             const worker::v1::ExecuteRequest&, WorkerWriter*)>;

  explicit FakeWorker(std::string id, std::string model = "tiny", Handler handler = nullptr)
      : handler_(std::move(handler)) {
    load_.set_worker_id(std::move(id));
    load_.set_epoch(1);
    load_.set_model(std::move(model));
    load_.set_max_context_tokens(1024);
    load_.set_vocab_size(8192);
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port_);
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
    CHECK(server_ != nullptr);
  }
  ~FakeWorker() override { Kill(); }

  int port() const { return port_; }
  std::string address() const { return absl::StrCat("127.0.0.1:", port_); }

  /// Ends the server and every stream at once.
  void Kill() { server_->Shutdown(std::chrono::system_clock::now()); }

  void SetDraining() {
    absl::MutexLock lock(&mu_);
    load_.set_draining(true);
  }

  void SetUnreachableStore(const std::string& address) {
    absl::MutexLock lock(&mu_);
    load_.add_unreachable_stores(address);
  }

  /// The requests so far.
  std::vector<worker::v1::ExecuteRequest> requests() const {
    absl::MutexLock lock(&mu_);
    return requests_;
  }

 private:
  grpc::Status Execute(grpc::ServerContext* context, const worker::v1::ExecuteRequest* request,
                       WorkerWriter* writer) override {
    {
      absl::MutexLock lock(&mu_);
      requests_.push_back(*request);
    }
    return handler_(context, *request, writer);
  }

  grpc::Status GetLoad(grpc::ServerContext* context, const worker::v1::GetLoadRequest* request,
                       worker::v1::GetLoadResponse* response) override {
    absl::MutexLock lock(&mu_);
    *response = load_;
    return grpc::Status::OK;
  }

  const Handler handler_;
  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
  mutable absl::Mutex mu_;
  worker::v1::GetLoadResponse load_ ABSL_GUARDED_BY(mu_);
  std::vector<worker::v1::ExecuteRequest> requests_ ABSL_GUARDED_BY(mu_);
};

}  // namespace nosara::router
