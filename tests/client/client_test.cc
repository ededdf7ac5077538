// The client library against a scripted server.
#include "client/client.h"

#include <grpcpp/grpcpp.h>

#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/retry_delay.h"
#include "nosara/inference/v1/inference.grpc.pb.h"
#include "tests/status_matchers.h"

namespace nosara::client {
namespace {

using inference::v1::GenerateRequest;
using inference::v1::GenerateResponse;
using ::nosara::testing::StatusIs;

using Writer = grpc::ServerWriter<GenerateResponse>;

class FakeRouter final : private inference::v1::InferenceService::Service {
 public:
  using Handler = std::function<grpc::Status(grpc::ServerContext*, Writer*)>;

  explicit FakeRouter(Handler handler) : handler_(std::move(handler)) {
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port_);
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
  }
  ~FakeRouter() override { server_->Shutdown(std::chrono::system_clock::now()); }

  std::string address() const { return absl::StrCat("127.0.0.1:", port_); }

 private:
  grpc::Status Generate(grpc::ServerContext* context, const GenerateRequest*,
                        Writer* writer) override {
    return handler_(context, writer);
  }

  const Handler handler_;
  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
};

bool SendText(Writer* writer, const std::string& text) {
  GenerateResponse event;
  event.mutable_chunk()->set_text(text);
  return writer->Write(event);
}

bool SendFinished(Writer* writer) {
  GenerateResponse event;
  event.mutable_finished();
  return writer->Write(event);
}

Continue KeepGoing(const GenerateResponse&) { return Continue::kYes; }

TEST(ClientTest, GivesEventsInOrder) {
  FakeRouter router([](grpc::ServerContext*, Writer* writer) {
    for (const char* text : {"a", "b", "c"}) SendText(writer, text);
    SendFinished(writer);
    return grpc::Status::OK;
  });
  ASSERT_OK_AND_ASSIGN(const auto client, Client::Connect(router.address()));
  std::string text;
  EXPECT_OK(client->Generate(GenerateRequest(), [&text](const GenerateResponse& event) {
    text += event.chunk().text();
    return Continue::kYes;
  }));
  EXPECT_EQ(text, "abc");
}

TEST(ClientTest, StoppingCancelsTheCall) {
  FakeRouter router([](grpc::ServerContext*, Writer* writer) {
    while (SendText(writer, "more")) {
    }
    return grpc::Status::CANCELLED;
  });
  ASSERT_OK_AND_ASSIGN(const auto client, Client::Connect(router.address()));
  int events = 0;
  EXPECT_THAT(client->Generate(GenerateRequest(),
                               [&events](const GenerateResponse&) {
                                 return ++events < 3 ? Continue::kYes : Continue::kNo;
                               }),
              StatusIs(absl::StatusCode::kCancelled, "stopped by the caller"));
  EXPECT_EQ(events, 3);
}

TEST(ClientTest, TimeoutIsADeadline) {
  FakeRouter router([](grpc::ServerContext*, Writer* writer) {
    while (SendText(writer, "more")) {
    }
    return grpc::Status::CANCELLED;
  });
  ASSERT_OK_AND_ASSIGN(const auto client, Client::Connect(router.address()));
  EXPECT_THAT(client->Generate(GenerateRequest(), KeepGoing, absl::Milliseconds(100)),
              StatusIs(absl::StatusCode::kDeadlineExceeded, ""));
}

TEST(ClientTest, AStreamWithoutFinishedHasFailed) {
  FakeRouter router([](grpc::ServerContext*, Writer* writer) {
    SendText(writer, "half");
    return grpc::Status::OK;
  });
  ASSERT_OK_AND_ASSIGN(const auto client, Client::Connect(router.address()));
  EXPECT_THAT(client->Generate(GenerateRequest(), KeepGoing),
              StatusIs(absl::StatusCode::kInternal, "without a Finished"));
}

TEST(ClientTest, ErrorsKeepCodeMessageAndRetryDelay) {
  FakeRouter router([](grpc::ServerContext* context, Writer*) {
    context->AddTrailingMetadata("retry-delay-ms", "1500");
    return grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, "full");
  });
  ASSERT_OK_AND_ASSIGN(const auto client, Client::Connect(router.address()));
  const absl::Status status = client->Generate(GenerateRequest(), KeepGoing);
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kResourceExhausted, "full"));
  EXPECT_EQ(RetryDelay(status), absl::Milliseconds(1500));
  EXPECT_FALSE(IsNoServer(status));
}

TEST(ClientTest, AServersUnavailableIsNotAMissingServer) {
  FakeRouter router([](grpc::ServerContext*, Writer*) {
    return grpc::Status(grpc::StatusCode::UNAVAILABLE, "no worker is ready");
  });
  ASSERT_OK_AND_ASSIGN(const auto client, Client::Connect(router.address()));
  const absl::Status status = client->Generate(GenerateRequest(), KeepGoing);
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kUnavailable, "no worker is ready"));
  EXPECT_FALSE(IsNoServer(status));
}

TEST(ClientTest, NoServerIsNamed) {
  ASSERT_OK_AND_ASSIGN(const auto client, Client::Connect("127.0.0.1:1"));
  const auto models = client->ListModels(absl::Seconds(60));
  EXPECT_THAT(models, StatusIs(absl::StatusCode::kUnavailable, "no server answers at 127.0.0.1:1"));
  EXPECT_TRUE(IsNoServer(models.status()));
  EXPECT_THAT(Client::Connect(""), StatusIs(absl::StatusCode::kInvalidArgument, "address"));
}

}  // namespace
}  // namespace nosara::client
