#include "client/stream_printer.h"

#include <algorithm>
#include <sstream>
#include <string>

#include "tests/status_matchers.h"

namespace nosara::client {
namespace {

using inference::v1::GenerateResponse;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

GenerateResponse Progress(uint32_t done) {
  GenerateResponse event;
  event.mutable_prefill_progress()->set_done_tokens(done);
  event.mutable_prefill_progress()->set_total_tokens(4000);
  return event;
}

GenerateResponse Chunk(const std::string& text, uint32_t id) {
  GenerateResponse event;
  event.mutable_chunk()->set_text(text);
  event.mutable_chunk()->add_token_ids(id);
  return event;
}

GenerateResponse Finished() {
  GenerateResponse event;
  auto& finished = *event.mutable_finished();
  finished.set_reason(inference::v1::FINISH_REASON_STOP);
  finished.set_stop_text("\n\n");
  finished.mutable_usage()->set_prompt_tokens(4000);
  finished.mutable_usage()->set_cached_prompt_tokens(64);
  finished.mutable_usage()->set_completion_tokens(11);
  finished.set_time_to_first_token_us(2'000'000);
  finished.set_total_time_us(2'500'000);
  auto& cache = *finished.mutable_cache();
  cache.set_records_selected(1000);
  cache.set_records_resident(900);
  cache.set_records_fetched(100);
  cache.set_bytes_fetched(3'300'000);
  cache.set_records_by_mapped(60);
  cache.set_records_by_ucx(40);
  cache.set_pages_written(62);
  return event;
}

class StreamPrinterTest : public ::testing::Test {
 protected:
  std::ostringstream out_, err_;
};

TEST_F(StreamPrinterTest, TextToOneStatisticsToTheOther) {
  StreamPrinter::Options options;
  options.statistics = true;
  StreamPrinter printer(options, &out_, &err_);
  printer.Print(Progress(256));
  printer.Print(Chunk("The ", 5));
  printer.Print(Chunk("sea", 6));
  printer.Print(Finished());
  printer.End();
  EXPECT_EQ(out_.str(), "The sea\n");
  EXPECT_EQ(printer.text(), "The sea");
  EXPECT_THAT(printer.token_ids(), ElementsAre(5u, 6u));
  EXPECT_EQ(err_.str(),
            "4000 prompt tokens (64 from the store), first token after 2.00 s\n"
            "11 tokens, 20.0 tokens/s; ended by: stop text \"\\n\\n\"\n"
            "KV records: 1000 selected, 900 resident, 100 fetched (3300.0 kB; 60 through the "
            "mapped arena, 40 by UCX); 62 pages written\n");
}

TEST_F(StreamPrinterTest, ProgressIsOneLineThatGoesAway) {
  StreamPrinter::Options options;
  options.progress = true;
  StreamPrinter printer(options, &out_, &err_);
  printer.Print(Progress(256));
  printer.Print(Progress(512));
  EXPECT_THAT(err_.str(), HasSubstr("\rreading the prompt: 512 of 4000 tokens"));
  printer.Print(Chunk("x\n", 5));
  printer.End();
  EXPECT_THAT(err_.str(), ::testing::EndsWith("\r\033[K"));
  EXPECT_EQ(out_.str(), "x\n");
}

TEST_F(StreamPrinterTest, JsonIsOneLinePerEvent) {
  StreamPrinter::Options options;
  options.json = true;
  StreamPrinter printer(options, &out_, &err_);
  printer.Print(Chunk("a\nb", 5));
  printer.Print(Finished());
  printer.End();
  const std::string json = out_.str();
  EXPECT_THAT(json, ::testing::StartsWith("{\"chunk\":{\"text\":\"a\\nb\",\"token_ids\":[5]}}\n"));
  EXPECT_EQ(std::count(json.begin(), json.end(), '\n'), 2);
}

TEST_F(StreamPrinterTest, Logprobs) {
  StreamPrinter::Options options;
  options.logprobs = true;
  StreamPrinter printer(options, &out_, &err_);
  GenerateResponse event = Chunk("sea", 6);
  auto& logprob = *event.mutable_chunk()->add_logprobs();
  logprob.set_token_id(6);
  logprob.set_text("sea");
  logprob.set_logprob(-0.25f);
  logprob.add_top()->set_text("sun\n");
  printer.Print(event);
  printer.End();
  EXPECT_EQ(out_.str(), "sea\n -0.2500       6  \"sea\"  \"sun\\n\" 0.0000\n");
}

TEST_F(StreamPrinterTest, ABrokenStreamLeavesNoStatistics) {
  StreamPrinter::Options options;
  options.statistics = true;
  StreamPrinter printer(options, &out_, &err_);
  printer.Print(Chunk("half", 5));
  printer.End();
  EXPECT_EQ(out_.str(), "half\n");
  EXPECT_EQ(err_.str(), "");
}

}  // namespace
}  // namespace nosara::client
