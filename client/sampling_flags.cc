#include "client/sampling_flags.h"

namespace nosara::client {

void SamplingFlags::AddTo(FlagSet* flags) {
  flags->Add("model", &model, "name of the model; not needed where only one is served");
  flags->Add("max_tokens", &max_tokens,
             "longest output in tokens, 1 or more; absent: 256, or what the context leaves");
  flags->Add("temperature", &temperature, "0 to 100; 0: always the most probable token; absent: 1");
  flags->Add("top_k", &top_k, "only the k most probable tokens; 0 or absent: all");
  flags->Add("top_p", &top_p,
             "only the most probable tokens that add up to p; above 0 to 1; absent: 1");
  flags->Add("min_p", &min_p,
             "only tokens with this fraction of the best one's probability; 0 to 1; absent: 0");
  flags->Add("repetition_penalty", &repetition_penalty,
             "makes tokens of prompt and output less probable; above 0 to 10; absent: 1 (none)");
  flags->Add("presence_penalty", &presence_penalty,
             "subtracted from the logits of tokens of the output; -2 to 2; absent: 0");
  flags->Add("frequency_penalty", &frequency_penalty,
             "the same, times their count; -2 to 2; absent: 0");
  flags->Add("seed", &seed, "equal seeds give equal text; absent: random");
  flags->Add("stop", &stop, "ends the output before this text; may be given up to 16 times");
}

void SamplingFlags::Fill(inference::v1::GenerateRequest* request) const {
  request->set_model(model);
  if (max_tokens) request->set_max_tokens(*max_tokens);
  auto& sampling = *request->mutable_sampling();
  if (temperature) sampling.set_temperature(*temperature);
  if (top_k) sampling.set_top_k(*top_k);
  if (top_p) sampling.set_top_p(*top_p);
  if (min_p) sampling.set_min_p(*min_p);
  if (repetition_penalty) sampling.set_repetition_penalty(*repetition_penalty);
  if (presence_penalty) sampling.set_presence_penalty(*presence_penalty);
  if (frequency_penalty) sampling.set_frequency_penalty(*frequency_penalty);
  if (seed) sampling.set_seed(*seed);
  for (const std::string& text : stop) request->add_stop(text);
}

}  // namespace nosara::client
