// The router over real connections, with scripted workers behind it.
#include "router/router_server.h"

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/synchronization/barrier.h"
#include "absl/synchronization/notification.h"
#include "base/retry_delay.h"
#include "client/client.h"
#include "nosara/inference/v1/inference.grpc.pb.h"
#include "router/grpc_worker_client.h"
#include "tests/raw_call.h"
#include "tests/router/fake_worker.h"
#include "tests/router/tcp_relay.h"
#include "tests/status_matchers.h"
#include "text/tokenizer.h"

namespace nosara::router {
namespace {

using client::Continue;
using inference::v1::GenerateRequest;
using inference::v1::GenerateResponse;
using ::nosara::testing::kHealthCheck;
using ::nosara::testing::kListServices;
using ::nosara::testing::kNotServing;
using ::nosara::testing::kReflection;
using ::nosara::testing::kServing;
using ::nosara::testing::RawCall;
using ::nosara::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr char kModelSpec[] = "tiny=models/nosa-tiny";
constexpr absl::Duration kPatience = absl::Seconds(60);

const text::Tokenizer& Tokenizer() {
  static const text::Tokenizer* const tokenizer =
      text::Tokenizer::Load("models/nosa-tiny")->release();
  return *tokenizer;
}

std::vector<int32_t> Tokens(const std::string& text) { return *Tokenizer().Encode(text); }

RouterServerOptions OptionsFor(const std::vector<const FakeWorker*>& workers) {
  RouterServerOptions options;
  options.listen = "127.0.0.1:0";
  options.models = {kModelSpec};
  options.poll_interval = absl::Milliseconds(20);
  for (const FakeWorker* worker : workers) options.worker_addresses.push_back(worker->address());
  return options;
}

std::unique_ptr<RouterServer> StartRouter(RouterServerOptions options, int await_workers) {
  auto router = RouterServer::Create(std::move(options));
  EXPECT_OK(router);
  EXPECT_TRUE((*router)->AwaitWorkers(await_workers, kPatience));
  return *std::move(router);
}

GenerateRequest TextRequest(const std::string& text) {
  GenerateRequest request;
  request.set_text(text);
  return request;
}

struct Outcome {
  absl::Status status;
  std::vector<GenerateResponse> events;

  std::string text() const {
    std::string text;
    for (const auto& event : events) text += event.chunk().text();
    return text;
  }
};

Outcome Ask(const RouterServer& router, const GenerateRequest& request) {
  const auto client = *client::Client::Connect(router.address());
  Outcome outcome;
  outcome.status = client->Generate(
      request,
      [&outcome](const GenerateResponse& event) {
        outcome.events.push_back(event);
        return Continue::kYes;
      },
      kPatience);
  return outcome;
}

// Sends `text` as its tokens, one by one.
FakeWorker::Handler Says(const std::string& text) {
  return [text](grpc::ServerContext*, const worker::v1::ExecuteRequest& request,
                WorkerWriter* writer) {
    SendAccepted(writer);
    uint32_t tokens = 0;
    for (const int32_t token : Tokens(text)) {
      SendTokens(writer, {token});
      ++tokens;
    }
    SendCompleted(writer, inference::v1::FINISH_REASON_LENGTH, request.prompt_tokens_size(),
                  tokens);
    return grpc::Status::OK;
  };
}

TEST(RouterServerTest, StreamsInOrderWithDefaultsFilledIn) {
  const std::string text = "The captain looked at the sea, and said: \xe6\xb5\xb7\xf0\x9f\x8c\x8a";
  FakeWorker worker("w1", "tiny", Says(text));
  const auto router = StartRouter(OptionsFor({&worker}), 1);
  const Outcome outcome = Ask(*router, TextRequest("Hello there"));
  ASSERT_OK(outcome.status);
  EXPECT_EQ(outcome.text(), text);
  ASSERT_GE(outcome.events.size(), 3u);
  ASSERT_TRUE(outcome.events.front().has_started());
  EXPECT_EQ(outcome.events.front().started().model(), "tiny");
  EXPECT_FALSE(outcome.events.front().started().request_id().empty());
  for (size_t i = 1; i + 1 < outcome.events.size(); ++i) {
    EXPECT_TRUE(outcome.events[i].has_chunk()) << i;
  }
  ASSERT_TRUE(outcome.events.back().has_finished());
  const auto& finished = outcome.events.back().finished();
  EXPECT_EQ(finished.reason(), inference::v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(finished.cache().records_selected(), 7u);
  EXPECT_GE(finished.total_time_us(), finished.time_to_first_token_us());

  ASSERT_EQ(worker.requests().size(), 1u);
  const auto request = worker.requests()[0];
  EXPECT_EQ(request.max_tokens(), 256u);
  EXPECT_EQ(request.sampling().temperature(), 1.0f);
  EXPECT_EQ(request.sampling().seed(), outcome.events.front().started().seed());
  EXPECT_EQ(request.prompt_tokens_size(),
            static_cast<int>(outcome.events.front().started().prompt_tokens()));
  EXPECT_EQ(static_cast<int32_t>(request.prompt_tokens(0)), Tokenizer().bos_id());
  // </s> and <|im_end|>
  EXPECT_THAT(request.stop_token_ids(), ElementsAre(2u, 4u));
}

TEST(RouterServerTest, ServesOverTheInProcessChannel) {
  FakeWorker worker("w1", "tiny", Says("Hello"));
  const auto router = StartRouter(OptionsFor({&worker}), 1);
  const auto client = client::Client::Over(router->InProcessChannel(), "in process");
  std::string text;
  EXPECT_OK(client->Generate(TextRequest("x"), [&text](const GenerateResponse& event) {
    text += event.chunk().text();
    return Continue::kYes;
  }));
  EXPECT_EQ(text, "Hello");
}

TEST(RouterServerTest, StopTextEndsTheStreamAndCancelsTheWorker) {
  absl::Notification cancelled;
  FakeWorker worker(
      "w1", "tiny",
      [&cancelled](grpc::ServerContext*, const worker::v1::ExecuteRequest&, WorkerWriter* writer) {
        SendAccepted(writer);
        SendTokens(writer, Tokens("one two END three"));
        const auto more = Tokens(" more");
        while (SendTokens(writer, more)) {
        }
        cancelled.Notify();
        return grpc::Status::CANCELLED;
      });
  const auto router = StartRouter(OptionsFor({&worker}), 1);
  GenerateRequest request = TextRequest("Count");
  request.add_stop("END");
  const Outcome outcome = Ask(*router, request);
  ASSERT_OK(outcome.status);
  EXPECT_EQ(outcome.text(), "one two ");
  const auto& finished = outcome.events.back().finished();
  EXPECT_EQ(finished.reason(), inference::v1::FINISH_REASON_STOP);
  EXPECT_EQ(finished.stop_text(), "END");
  EXPECT_GT(finished.usage().completion_tokens(), 0u);
  EXPECT_FALSE(finished.has_cache());
  cancelled.WaitForNotification();
}

TEST(RouterServerTest, CancellationReachesTheWorker) {
  absl::Notification cancelled;
  FakeWorker worker(
      "w1", "tiny",
      [&cancelled](grpc::ServerContext*, const worker::v1::ExecuteRequest&, WorkerWriter* writer) {
        SendAccepted(writer);
        while (SendTokens(writer, {500})) {
        }
        cancelled.Notify();
        return grpc::Status::CANCELLED;
      });
  const auto router = StartRouter(OptionsFor({&worker}), 1);
  const auto client = *client::Client::Connect(router->address());
  const absl::Status status = client->Generate(TextRequest("x"), [](const GenerateResponse& event) {
    return event.has_chunk() ? Continue::kNo : Continue::kYes;
  });
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kCancelled, "caller"));
  cancelled.WaitForNotification();
}

TEST(RouterServerTest, DeadlineReachesTheWorker) {
  std::atomic<int64_t> seconds_left{0};
  FakeWorker worker("w1", "tiny",
                    [&seconds_left](grpc::ServerContext* context, const worker::v1::ExecuteRequest&,
                                    WorkerWriter* writer) {
                      seconds_left =
                          absl::ToInt64Seconds(absl::FromChrono(context->deadline()) - absl::Now());
                      SendAccepted(writer);
                      SendCompleted(writer, inference::v1::FINISH_REASON_LENGTH, 1, 0);
                      return grpc::Status::OK;
                    });
  const auto router = StartRouter(OptionsFor({&worker}), 1);
  const auto client = *client::Client::Connect(router->address());
  const auto ignore = [](const GenerateResponse&) { return Continue::kYes; };
  ASSERT_OK(client->Generate(TextRequest("x"), ignore, absl::Seconds(1000)));
  // gRPC rounds long timeouts by about a percent on each hop.
  EXPECT_GT(seconds_left, 900);
  EXPECT_LT(seconds_left, 1100);
}

TEST(RouterServerTest, ExpiredDeadlineEndsClientAndWorker) {
  absl::Notification ended;
  FakeWorker worker(
      "w1", "tiny",
      [&ended](grpc::ServerContext*, const worker::v1::ExecuteRequest&, WorkerWriter* writer) {
        SendAccepted(writer);
        while (SendTokens(writer, {500})) {
        }
        ended.Notify();
        return grpc::Status::CANCELLED;
      });
  const auto router = StartRouter(OptionsFor({&worker}), 1);
  const auto client = *client::Client::Connect(router->address());
  const absl::Status status = client->Generate(
      TextRequest("x"), [](const GenerateResponse&) { return Continue::kYes; },
      absl::Milliseconds(300));
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kDeadlineExceeded, ""));
  ended.WaitForNotification();
}

TEST(RouterServerTest, UnknownModelNamesTheServedOnes) {
  FakeWorker worker("w1", "tiny", Says("x"));
  const auto router = StartRouter(OptionsFor({&worker}), 1);
  GenerateRequest request = TextRequest("x");
  request.set_model("huge");
  EXPECT_THAT(
      Ask(*router, request).status,
      StatusIs(absl::StatusCode::kNotFound, "model 'huge' is not served; served are: tiny"));
}

TEST(RouterServerTest, NoWorkerIsUnavailable) {
  RouterServerOptions options = OptionsFor({});
  options.worker_addresses = {"127.0.0.1:1"};
  const auto router = StartRouter(options, 0);
  const Outcome outcome = Ask(*router, TextRequest("x"));
  EXPECT_THAT(outcome.status, StatusIs(absl::StatusCode::kUnavailable, "no worker is ready"));
  EXPECT_TRUE(outcome.events.empty());
}

TEST(RouterServerTest, BadRequestsAreRefusedBeforeAnyWorkerSeesThem) {
  FakeWorker worker("w1", "tiny", Says("x"));
  const auto router = StartRouter(OptionsFor({&worker}), 1);
  const auto refused = [&router](const GenerateRequest& request, const std::string& part) {
    EXPECT_THAT(Ask(*router, request).status, StatusIs(absl::StatusCode::kInvalidArgument, part));
  };
  refused(TextRequest(""), "text: empty");
  refused(TextRequest(std::string(10'000'000, 'a')), "text: 10000000 bytes of text; at most 16384");
  std::string words;
  for (int i = 0; i < 1100; ++i) words += " sea";
  refused(TextRequest(words), "tokens; the model's context of 1024 tokens allows at most 1023");
  refused(TextRequest("sea \xff"), "text: not valid UTF-8 at byte 4 of 5");
  GenerateRequest cold = TextRequest("x");
  cold.mutable_sampling()->set_temperature(-1);
  refused(cold, "sampling.temperature: -1");
  EXPECT_TRUE(worker.requests().empty());
}

TEST(RouterServerTest, TooLargeMessageIsRefusedByItsSize) {
  FakeWorker worker("w1", "tiny", Says("x"));
  const auto router = StartRouter(OptionsFor({&worker}), 1);
  EXPECT_THAT(Ask(*router, TextRequest(std::string(17 << 20, 'a'))).status,
              StatusIs(absl::StatusCode::kResourceExhausted, "larger than max"));
}

TEST(RouterServerTest, LostWorkerIsUnavailableWithAClearMessage) {
  FakeWorker worker(
      "w1", "tiny",
      [](grpc::ServerContext*, const worker::v1::ExecuteRequest&, WorkerWriter* writer) {
        SendAccepted(writer);
        SendTokens(writer, Tokens("one two three"));
        while (SendTokens(writer, {500})) {
        }
        return grpc::Status::CANCELLED;
      });
  TcpRelay relay(worker.port());
  RouterServerOptions options = OptionsFor({});
  options.worker_addresses = {relay.address()};
  const auto router = StartRouter(options, 1);
  const auto client = *client::Client::Connect(router->address());
  std::string text;
  const absl::Status status =
      client->Generate(TextRequest("x"), [&](const GenerateResponse& event) {
        text += event.chunk().text();
        if (event.has_chunk()) relay.Cut();
        return Continue::kYes;
      });
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kUnavailable, "worker w1 was lost after "));
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kUnavailable, " tokens; safe to retry"));
  EXPECT_THAT(text, ::testing::StartsWith("one two three"));
  EXPECT_THAT(Ask(*router, TextRequest("x")).status,
              StatusIs(absl::StatusCode::kUnavailable, "no worker is ready"));
}

TEST(RouterServerTest, AWorkersServerThatEndsIsUnavailableToo) {
  absl::Notification sent;
  FakeWorker worker(
      "w1", "tiny",
      [&sent](grpc::ServerContext*, const worker::v1::ExecuteRequest&, WorkerWriter* writer) {
        SendAccepted(writer);
        SendTokens(writer, Tokens("one two three"));
        sent.WaitForNotification();
        while (SendTokens(writer, {500})) {
        }
        return grpc::Status::CANCELLED;
      });
  const auto router = StartRouter(OptionsFor({&worker}), 1);
  const auto client = *client::Client::Connect(router->address());
  const absl::Status status =
      client->Generate(TextRequest("x"), [&](const GenerateResponse& event) {
        if (event.has_chunk() && !sent.HasBeenNotified()) {
          std::thread kill([&worker] { worker.Kill(); });
          sent.Notify();
          kill.join();
        }
        return Continue::kYes;
      });
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kUnavailable, "worker w1"));
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kUnavailable, "safe to retry"));
}

TEST(RouterServerTest, AWorkersReportNamesTheStoresThatItCannotReach) {
  FakeWorker worker("w1");
  worker.SetUnreachableStore("10.0.0.7:50061");
  const auto client = MakeGrpcWorkerClient(MakeWorkerChannel(worker.address()));
  absl::Notification done;
  absl::StatusOr<WorkerLoad> load;
  client->GetLoad(kPatience, [&](absl::StatusOr<WorkerLoad> result) {
    load = std::move(result);
    done.Notify();
  });
  done.WaitForNotification();
  ASSERT_OK(load);
  EXPECT_THAT(load->unreachable_stores, ElementsAre("10.0.0.7:50061"));
}

TEST(RouterServerTest, WorkersOwnErrorsKeepTheirCodeAndRetryDelay) {
  FakeWorker worker(
      "w1", "tiny",
      [](grpc::ServerContext* context, const worker::v1::ExecuteRequest&, WorkerWriter*) {
        context->AddTrailingMetadata("retry-delay-ms", "250");
        return grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, "queue is full");
      });
  const auto router = StartRouter(OptionsFor({&worker}), 1);
  const Outcome outcome = Ask(*router, TextRequest("x"));
  EXPECT_THAT(outcome.status,
              StatusIs(absl::StatusCode::kResourceExhausted, "worker w1: queue is full"));
  EXPECT_EQ(RetryDelay(outcome.status), absl::Milliseconds(250));
  EXPECT_EQ(worker.requests().size(), 1u);
}

TEST(RouterServerTest, AWorkersOwnUnavailableDoesNotMakeItLost) {
  FakeWorker worker(
      "w1", "tiny",
      [](grpc::ServerContext*, const worker::v1::ExecuteRequest&, WorkerWriter* writer) {
        SendAccepted(writer);
        SendTokens(writer, {500});
        return grpc::Status(grpc::StatusCode::UNAVAILABLE, "store s1 is gone");
      });
  RouterServerOptions options = OptionsFor({&worker});
  // No further report that would bring a lost worker back.
  options.poll_interval = absl::Hours(1);
  options.stale_after = absl::Hours(1);
  const auto router = StartRouter(options, 1);
  for (int i = 0; i < 3; ++i) {
    EXPECT_THAT(Ask(*router, TextRequest("x")).status,
                StatusIs(absl::StatusCode::kUnavailable, "worker w1: store s1 is gone"));
  }
}

TEST(RouterServerTest, RefusalByOneWorkerMovesTheRequestToAnother) {
  const auto refuses = [](grpc::ServerContext*, const worker::v1::ExecuteRequest&, WorkerWriter*) {
    return grpc::Status(grpc::StatusCode::FAILED_PRECONDITION, "draining");
  };
  FakeWorker draining("w1", "tiny", refuses);
  FakeWorker ready("w2", "tiny", Says("Hello"));
  RouterServerOptions options = OptionsFor({&draining, &ready});
  options.policy = "round_robin";
  const auto router = StartRouter(options, 2);
  for (int i = 0; i < 2; ++i) {
    const Outcome outcome = Ask(*router, TextRequest("x"));
    EXPECT_OK(outcome.status);
    EXPECT_EQ(outcome.text(), "Hello");
  }
  EXPECT_GE(draining.requests().size(), 1u);
  EXPECT_EQ(ready.requests().size(), 2u);
}

TEST(RouterServerTest, ListModelsAndTokenize) {
  FakeWorker worker("w1", "tiny", Says("x"));
  RouterServerOptions options = OptionsFor({&worker});
  options.models.push_back("other=models/nosa-tiny");
  const auto router = StartRouter(options, 1);
  const auto client = *client::Client::Connect(router->address());
  ASSERT_OK_AND_ASSIGN(const auto models, client->ListModels(kPatience));
  ASSERT_EQ(models.size(), 2u);
  EXPECT_EQ(models[0].name(), "other");
  EXPECT_EQ(models[0].ready_workers(), 0u);
  EXPECT_EQ(models[1].name(), "tiny");
  EXPECT_EQ(models[1].ready_workers(), 1u);
  EXPECT_EQ(models[1].max_context_tokens(), 1024u);
  EXPECT_EQ(models[1].vocab_size(), 8192u);

  inference::v1::TokenizeRequest request;
  request.set_text("The sea");
  EXPECT_THAT(client->Tokenize(request, kPatience),
              StatusIs(absl::StatusCode::kInvalidArgument, "several models are served"));
  request.set_model("tiny");
  ASSERT_OK_AND_ASSIGN(const auto tokens, client->Tokenize(request, kPatience));
  std::vector<int32_t> expected = {Tokenizer().bos_id()};
  for (const int32_t token : Tokens("The sea")) expected.push_back(token);
  EXPECT_THAT(tokens.token_ids(), ::testing::ElementsAreArray(expected));
}

TEST(RouterServerTest, HealthFollowsTheWorkers) {
  std::string answer;
  RouterServerOptions alone = OptionsFor({});
  alone.worker_addresses = {"127.0.0.1:1"};
  const auto without = StartRouter(alone, 0);
  ASSERT_TRUE(RawCall(without->address(), kHealthCheck, "", &answer).ok());
  EXPECT_EQ(answer, kNotServing);

  FakeWorker worker("w1", "tiny", Says("x"));
  const auto router = StartRouter(OptionsFor({&worker}), 1);
  // The health service is told right after the worker is known.
  while (answer != kServing) {
    ASSERT_TRUE(RawCall(router->address(), kHealthCheck, "", &answer).ok());
  }
  worker.SetDraining();
  while (answer != kNotServing) {
    ASSERT_TRUE(RawCall(router->address(), kHealthCheck, "", &answer).ok());
  }
}

TEST(RouterServerTest, ReflectionListsTheService) {
  FakeWorker worker("w1", "tiny", Says("x"));
  const auto router = StartRouter(OptionsFor({&worker}), 1);
  std::string answer;
  const grpc::Status status = RawCall(router->address(), kReflection, kListServices, &answer);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_THAT(answer, HasSubstr("nosara.inference.v1.InferenceService"));
}

TEST(RouterServerTest, DrainCompletesRunningStreams) {
  absl::Notification go;
  FakeWorker worker(
      "w1", "tiny",
      [&go](grpc::ServerContext*, const worker::v1::ExecuteRequest&, WorkerWriter* writer) {
        SendAccepted(writer);
        SendTokens(writer, Tokens("before"));
        go.WaitForNotification();
        SendTokens(writer, Tokens(" after"));
        SendCompleted(writer, inference::v1::FINISH_REASON_LENGTH, 1, 2);
        return grpc::Status::OK;
      });
  const auto router = StartRouter(OptionsFor({&worker}), 1);
  const auto client = *client::Client::Connect(router->address());
  std::thread drain;
  std::string text;
  const absl::Status status =
      client->Generate(TextRequest("x"), [&](const GenerateResponse& event) {
        text += event.chunk().text();
        if (event.has_chunk() && !drain.joinable()) {
          drain = std::thread([&router] { router->Shutdown(kPatience); });
          // New calls are refused while this stream still runs.
          while ((*client::Client::Connect(router->address()))->ListModels(kPatience).ok()) {
          }
          go.Notify();
        }
        return Continue::kYes;
      });
  EXPECT_OK(status);
  EXPECT_EQ(text, "before after");
  ASSERT_TRUE(drain.joinable());
  drain.join();
}

TEST(RouterServerTest, ShutdownCancelsWhatIsLeftAfterTheDrain) {
  absl::Notification cancelled;
  FakeWorker worker(
      "w1", "tiny",
      [&cancelled](grpc::ServerContext*, const worker::v1::ExecuteRequest&, WorkerWriter* writer) {
        SendAccepted(writer);
        while (SendTokens(writer, {500})) {
        }
        cancelled.Notify();
        return grpc::Status::CANCELLED;
      });
  const auto router = StartRouter(OptionsFor({&worker}), 1);
  const auto client = *client::Client::Connect(router->address());
  std::thread stop;
  const absl::Status status =
      client->Generate(TextRequest("x"), [&](const GenerateResponse& event) {
        if (event.has_chunk() && !stop.joinable()) {
          stop = std::thread([&router] { router->Shutdown(absl::ZeroDuration()); });
        }
        return Continue::kYes;
      });
  EXPECT_FALSE(status.ok());
  cancelled.WaitForNotification();
  stop.join();
}

TEST(RouterServerTest, TwoHundredStreamsAtATime) {
  constexpr int kStreams = 200;
  // Every handler waits for all others: they can only end if all streams run at a time.
  absl::Barrier* const all = new absl::Barrier(kStreams);
  FakeWorker worker(
      "w1", "tiny",
      [all](grpc::ServerContext*, const worker::v1::ExecuteRequest& request, WorkerWriter* writer) {
        SendAccepted(writer);
        if (all->Block()) delete all;
        for (int i = 0; i < 20; ++i) {
          SendTokens(writer, {static_cast<int32_t>(request.prompt_tokens(0))});
        }
        SendCompleted(writer, inference::v1::FINISH_REASON_LENGTH, 1, 20);
        return grpc::Status::OK;
      });
  const auto router = StartRouter(OptionsFor({&worker}), 1);
  const auto client = *client::Client::Connect(router->address());
  std::atomic<int> good{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < kStreams; ++i) {
    threads.emplace_back([&, i] {
      GenerateRequest request;
      request.mutable_token_ids()->add_ids(1000 + i);
      std::vector<uint32_t> ids;
      const absl::Status status = client->Generate(request, [&ids](const GenerateResponse& event) {
        for (const uint32_t id : event.chunk().token_ids()) ids.push_back(id);
        return Continue::kYes;
      });
      if (status.ok() && ids == std::vector<uint32_t>(20, 1000 + i)) ++good;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(good, kStreams);
}

TEST(RouterServerTest, OptionsAreChecked) {
  const auto refused = [](RouterServerOptions options, const std::string& part) {
    EXPECT_THAT(RouterServer::Create(std::move(options)),
                StatusIs(absl::StatusCode::kInvalidArgument, part));
  };
  RouterServerOptions good;
  good.listen = "127.0.0.1:0";
  good.models = {kModelSpec};
  good.worker_addresses = {"127.0.0.1:1"};
  RouterServerOptions options = good;
  options.listen = "nowhere";
  refused(options, "listen: 'nowhere'; must be host:port");
  options = good;
  options.worker_addresses = {"127.0.0.1:70000"};
  refused(options, "workers: '127.0.0.1:70000'");
  options = good;
  options.worker_addresses.clear();
  refused(options, "workers: none given");
  options = good;
  options.models = {"tiny"};
  refused(options, "model 'tiny': must be name=directory");
  options = good;
  options.models = {kModelSpec, kModelSpec};
  refused(options, "model 'tiny' is given twice");
  options = good;
  options.policy = "best";
  refused(options, "policy 'best': must be");
  options = good;
  options.text_threads = 0;
  refused(options, "text_threads: 0; must be 1 or more");
  options = good;
  options.models = {"tiny=tests"};
  EXPECT_THAT(RouterServer::Create(options), StatusIs(absl::StatusCode::kNotFound, "model tiny"));
}

TEST(RouterServerTest, AddressInUseIsAnError) {
  FakeWorker worker("w1", "tiny", Says("x"));
  RouterServerOptions options = OptionsFor({&worker});
  options.listen = worker.address();
  EXPECT_THAT(RouterServer::Create(options),
              StatusIs(absl::StatusCode::kUnavailable, "cannot listen on"));
}

}  // namespace
}  // namespace nosara::router
