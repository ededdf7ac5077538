// nosara-bench-kernels: time and rate of each kernel, beside the limits measured in the same run.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <optional>

#include "kernels/bench.h"

namespace nosara::kernels::bench {

std::byte* Bench::AllocatePinned(size_t bytes) {
  void* memory = nullptr;
  BENCH_CUDA(cudaHostAlloc(&memory, bytes, cudaHostAllocMapped | cudaHostAllocPortable));
  pinned_memory_.push_back(memory);
  void* device = nullptr;
  BENCH_CUDA(cudaHostGetDevicePointer(&device, memory, 0));
  if (device != memory) {
    std::fprintf(stderr, "host memory has another address on the device\n");
    std::exit(1);
  }
  return static_cast<std::byte*>(memory);
}

void Bench::Release() {
  for (void* memory : device_memory_) cudaFree(memory);
  for (void* memory : pinned_memory_) cudaFreeHost(memory);
  device_memory_.clear();
  pinned_memory_.clear();
}

void Bench::Run(const Launch& launch) {
  BENCH_CUDA(launch(nullptr));
  BENCH_CUDA(cudaDeviceSynchronize());
}

double Bench::MedianUs(const std::vector<Launch>& launches, const Launch& reset) {
  constexpr int kReplays = 15;
  // The clocks fall while the host makes inputs and checks results, and take a while to come up.
  constexpr auto kWarmUp = std::chrono::milliseconds(200);
  constexpr int kFewLaunches = 24;
  const int count = static_cast<int>(launches.size());
  const int rounds = reset != nullptr ? 1 : std::max(1, kFewLaunches / count);
  cudaStream_t stream;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  BENCH_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  BENCH_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int round = 0; round < rounds; ++round) {
    for (const Launch& launch : launches) BENCH_CUDA(launch(stream));
  }
  BENCH_CUDA(cudaStreamEndCapture(stream, &graph));
  BENCH_CUDA(cudaGraphInstantiate(&executable, graph, 0));
  cudaEvent_t start, stop;
  BENCH_CUDA(cudaEventCreate(&start));
  BENCH_CUDA(cudaEventCreate(&stop));
  std::vector<double> times;
  const auto replay = [&] {
    if (reset != nullptr) BENCH_CUDA(reset(stream));
    BENCH_CUDA(cudaEventRecord(start, stream));
    BENCH_CUDA(cudaGraphLaunch(executable, stream));
    BENCH_CUDA(cudaEventRecord(stop, stream));
    BENCH_CUDA(cudaStreamSynchronize(stream));
    float ms = 0;
    BENCH_CUDA(cudaEventElapsedTime(&ms, start, stop));
    return 1e3 * ms / (rounds * count);
  };
  const auto begin = std::chrono::steady_clock::now();
  while (std::chrono::steady_clock::now() - begin < kWarmUp) replay();
  for (int i = 0; i < kReplays; ++i) times.push_back(replay());
  BENCH_CUDA(cudaEventDestroy(start));
  BENCH_CUDA(cudaEventDestroy(stop));
  BENCH_CUDA(cudaGraphExecDestroy(executable));
  BENCH_CUDA(cudaGraphDestroy(graph));
  BENCH_CUDA(cudaStreamDestroy(stream));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

int Bench::Rotations(double bytes) {
  constexpr double kMoreThanL2 = 256e6;
  return static_cast<int>(std::clamp(std::ceil(kMoreThanL2 / bytes), 2.0, 96.0));
}

std::unique_ptr<BenchCache> MakeCache(Bench& bench, const BenchCacheOptions& options) {
  auto cache = std::make_unique<BenchCache>();
  const int sequences = options.sequences;
  const int records = options.layers * kNumKvHeads;
  const int frames_each = options.slots + options.index_frames;
  std::vector<int32_t> deal(sequences * frames_each);
  for (size_t i = 0; i < deal.size(); ++i) deal[i] = static_cast<int32_t>(i);
  bench.random.Shuffle(deal);
  cache->slot_of.assign(int64_t{sequences} * records * options.max_blocks, -1);
  cache->block_of.assign(int64_t{sequences} * records * options.slots, -1);
  cache->stamp.assign(cache->block_of.size(), 1);
  cache->pages.assign(int64_t{sequences} * options.max_blocks, 1);  // stored: may be given up
  for (int s = 0; s < sequences; ++s) {
    cache->num_frames.push_back(options.slots);
    for (int i = 0; i < frames_each; ++i) {
      (i < options.slots ? cache->frames : cache->index_frames).push_back(deal.back());
      deal.pop_back();
    }
    for (int r = 0; r < records && options.resident != nullptr; ++r) {
      const std::vector<int32_t> blocks = options.resident(s, r);
      const int64_t row = int64_t{s} * records + r;
      for (size_t i = 0; i < blocks.size(); ++i) {
        cache->slot_of[row * options.max_blocks + blocks[i]] = static_cast<int32_t>(i);
        cache->block_of[row * options.slots + i] = blocks[i];
      }
    }
  }
  if (cache->index_frames.empty()) cache->index_frames.assign(sequences, -1);

  CacheView& host = cache->host;
  host.records = records;
  host.head_dim = kHeadDim;
  host.max_frames = options.slots;
  host.max_index_frames = std::max(1, options.index_frames);
  host.max_blocks = options.max_blocks;
  const int64_t slot_bytes = SlotBytes(kHeadDim);
  const int64_t num_slots = int64_t{sequences} * frames_each * records;
  if (options.host_slots) {
    // Slots are copies of a few hundred random ones: 128 rows of bf16, then 128 floats, which
    // serves for records and for index slots.
    constexpr int kPool = 499;
    std::vector<std::byte> pool(kPool * slot_bytes);
    for (int i = 0; i < kPool; ++i) {
      std::byte* slot = pool.data() + i * slot_bytes;
      const std::vector<__nv_bfloat16> rows = bench.random.NormalsBf16(128 * kHeadDim);
      const std::vector<float> scores = bench.random.Normals(128);
      std::memcpy(slot, rows.data(), rows.size() * sizeof(rows[0]));
      std::memcpy(slot + rows.size() * sizeof(rows[0]), scores.data(), 512);
    }
    cache->slots.resize(num_slots * slot_bytes);
    for (int64_t i = 0; i < num_slots; ++i) {
      std::memcpy(cache->slots.data() + i * slot_bytes,
                  pool.data() + bench.random.Below(kPool) * slot_bytes, slot_bytes);
    }
  }
  host.slots = cache->slots.data();
  host.frames = cache->frames.data();
  host.num_frames = cache->num_frames.data();
  host.index_frames = cache->index_frames.data();
  host.slot_of = cache->slot_of.data();
  host.block_of = cache->block_of.data();
  host.stamp = cache->stamp.data();
  host.pages = cache->pages.data();

  CacheView& device = cache->device;
  device = host;
  device.slots = nullptr;
  if (options.device_slots) {
    device.slots = options.host_slots ? bench.Upload(cache->slots)
                                      : bench.Allocate<std::byte>(num_slots * slot_bytes);
  }
  device.frames = bench.Upload(cache->frames);
  device.num_frames = bench.Upload(cache->num_frames);
  device.index_frames = bench.Upload(cache->index_frames);
  device.slot_of = bench.Upload(cache->slot_of);
  device.block_of = bench.Upload(cache->block_of);
  device.stamp = bench.Upload(cache->stamp);
  device.pages = bench.Upload(cache->pages);
  return cache;
}

std::vector<int32_t> RandomSelection(Random& random, int own) {
  std::vector<int32_t> others, selected = {0};
  for (int n = 1; n < own - 16; ++n) others.push_back(n);
  random.Shuffle(others);
  others.resize(kTopK - 18);
  selected.insert(selected.end(), others.begin(), others.end());
  for (int n = own - 16; n <= own; ++n) selected.push_back(n);
  std::sort(selected.begin(), selected.end());
  return selected;
}

DecodeCache MakeDecodeCache(Bench& bench) {
  DecodeCache result;
  const int blocks = bench.options.context / kBlockTokens;
  BenchCacheOptions options;
  options.sequences = bench.options.batch;
  options.layers = 2;
  options.slots = kTopK;
  options.index_frames =
      (VisibleWindows(bench.options.context - 1) + kIndexWindows - 1) / kIndexWindows;
  options.max_blocks = blocks;
  options.resident = [&](int, int) {
    result.selected.push_back(RandomSelection(bench.random, blocks - 1));
    return result.selected.back();
  };
  result.cache = MakeCache(bench, options);
  return result;
}

namespace {

struct Operation {
  const char* name;
  std::string (*run)(Bench&);
};
constexpr Operation kOperations[] = {
    {"rms_norm", BenchRmsNorm}, {"append", BenchAppend}, {"windows", BenchWindows},
    {"score", BenchScore},      {"select", BenchSelect}, {"score_select", BenchScoreSelect},
    {"resolve", BenchResolve},  {"gather", BenchGather}, {"attend", BenchAttend},
    {"swiglu", BenchSwiGlu},    {"sample", BenchSample}, {"prefill", BenchPrefill},
    {"embed", BenchEmbed},
};

constexpr char kUsage[] =
    "nosara-bench-kernels: time and rate of each CUDA kernel for one layer of the 8B shape.\n"
    "\n"
    "  --batch=64         sequences of a decode step\n"
    "  --context=16384    tokens of each, a multiple of 64, at least 8192\n"
    "  --memory-mib=2048  of the copies that measure the limits, and of the pages to gather from\n"
    "  --kernel=NAME      only this one: rms_norm append windows score select score_select\n"
    "                     resolve gather attend swiglu sample prefill embed\n"
    "  --json=FILE        also writes the figures there\n"
    "  --commit=ID        to note in that file\n"
    "\n"
    "Every kernel is checked against its reference before it is timed. Exit status 1 when one is\n"
    "wrong (it gets no figures then) or a CUDA call fails.\n";

/// The value of `--name=value`, or null.
const char* ValueOf(const char* argument, const char* name) {
  const size_t length = std::strlen(name);
  if (std::strncmp(argument, "--", 2) != 0 || std::strncmp(argument + 2, name, length) != 0) {
    return nullptr;
  }
  return argument[2 + length] == '=' ? argument + 3 + length : nullptr;
}

/// False where the argument is none of ours or its value nonsense.
bool ParseArgument(const char* argument, Options& options) {
  const auto number = [&](const char* name, int least, int most, int& value) {
    const char* text = ValueOf(argument, name);
    if (text == nullptr) return false;
    char* end = nullptr;
    const long parsed = std::strtol(text, &end, 10);
    if (end == text || *end != '\0' || parsed < least || parsed > most) {
      std::fprintf(stderr, "--%s=%s: a number from %d to %d is needed\n", name, text, least, most);
      std::exit(2);
    }
    value = static_cast<int>(parsed);
    return true;
  };
  const auto string = [&](const char* name, std::string& value) {
    const char* text = ValueOf(argument, name);
    if (text != nullptr) value = text;
    return text != nullptr;
  };
  return number("batch", 4, 1024, options.batch) ||
         number("context", 8192, 1 << 20, options.context) ||
         number("memory-mib", 16, 1 << 16, options.memory_mib) ||
         string("kernel", options.kernel) || string("json", options.json) ||
         string("commit", options.commit);
}

struct Limits {
  double device_copy = 0;     // GB/s, read and write added
  double host_to_device = 0;  // GB/s

  double Of(const Figure& figure) const {
    return figure.limit == Limit::kHostToDevice ? host_to_device : device_copy;
  }
};

Limits MeasureLimits(Bench& bench) {
  const size_t bytes = size_t(bench.options.memory_mib) << 20;
  std::byte* from = bench.Allocate<std::byte>(bytes);
  std::byte* to = bench.Allocate<std::byte>(bytes);
  std::byte* host = bench.AllocatePinned(bytes);
  for (size_t i = 0; i + 8 <= bytes; i += 8) {
    const uint64_t value = bench.random.Next();
    std::memcpy(host + i, &value, 8);
  }
  // Timed one by one, not in a graph: a copy node of a graph reaches two thirds of it.
  cudaStream_t stream;
  cudaEvent_t start, stop;
  BENCH_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  BENCH_CUDA(cudaEventCreate(&start));
  BENCH_CUDA(cudaEventCreate(&stop));
  const auto median_us = [&](const void* source, cudaMemcpyKind kind) {
    constexpr int kWarmUp = 20;  // clocks that slept come up
    constexpr int kTimed = 15;
    std::vector<double> times;
    for (int i = 0; i < kWarmUp + kTimed; ++i) {
      BENCH_CUDA(cudaEventRecord(start, stream));
      BENCH_CUDA(cudaMemcpyAsync(to, source, bytes, kind, stream));
      BENCH_CUDA(cudaEventRecord(stop, stream));
      BENCH_CUDA(cudaEventSynchronize(stop));
      float ms = 0;
      BENCH_CUDA(cudaEventElapsedTime(&ms, start, stop));
      if (i >= kWarmUp) times.push_back(1e3 * ms);
    }
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
  };
  BENCH_CUDA(cudaMemcpyAsync(from, host, bytes, cudaMemcpyHostToDevice, stream));
  Limits limits;
  limits.device_copy = 2e-3 * bytes / median_us(from, cudaMemcpyDeviceToDevice);
  limits.host_to_device = 1e-3 * bytes / median_us(host, cudaMemcpyHostToDevice);
  BENCH_CUDA(cudaEventDestroy(start));
  BENCH_CUDA(cudaEventDestroy(stop));
  BENCH_CUDA(cudaStreamDestroy(stream));
  bench.Release();
  return limits;
}

/// The share of its limit that a figure reaches, or nothing where it has none, or where it is more:
/// then a copy does not show what the memory can do, and a share of it would mean nothing.
std::optional<double> FractionOfLimit(const Limits& limits, const Figure& figure) {
  const double fraction = 1e-3 * figure.bytes / figure.us / limits.Of(figure);
  if (figure.bytes == 0 || figure.limit == Limit::kNone || fraction > 1) return std::nullopt;
  return fraction;
}

/// JSON needs quotes, backslashes and control characters escaped; there are no others of note.
std::string Quoted(const std::string& text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') quoted += '\\';
    quoted += static_cast<unsigned char>(c) < ' ' ? ' ' : c;
  }
  return quoted + "\"";
}

bool WriteJson(const Bench& bench, const Limits& limits, const std::string& gpu,
               const std::string& command) {
  FILE* file = std::fopen(bench.options.json.c_str(), "w");
  if (file == nullptr) return false;
  const std::string common = "\"gpu\": " + Quoted(gpu) +
                             ", \"commit\": " + Quoted(bench.options.commit) +
                             ", \"command\": " + Quoted(command) + "}";
  std::fprintf(file,
               "[\n  {\"kernel\": \"device_copy\", \"shape\": \"%d MiB\", \"us\": null, "
               "\"gb_per_s\": %.1f, \"fraction_of_limit\": 1, %s,\n",
               bench.options.memory_mib, limits.device_copy, common.c_str());
  std::fprintf(file,
               "  {\"kernel\": \"host_to_device_copy\", \"shape\": \"%d MiB\", \"us\": null, "
               "\"gb_per_s\": %.1f, \"fraction_of_limit\": 1, %s",
               bench.options.memory_mib, limits.host_to_device, common.c_str());
  for (const Figure& figure : bench.figures) {
    std::fprintf(file, ",\n  {\"kernel\": %s, \"shape\": %s, \"us\": %.3f, ",
                 Quoted(figure.kernel).c_str(), Quoted(figure.shape).c_str(), figure.us);
    if (figure.bytes > 0) {
      std::fprintf(file, "\"gb_per_s\": %.1f, ", 1e-3 * figure.bytes / figure.us);
    } else {
      std::fprintf(file, "\"gb_per_s\": null, ");
    }
    if (const auto fraction = FractionOfLimit(limits, figure)) {
      std::fprintf(file, "\"fraction_of_limit\": %.3f, ", *fraction);
    } else {
      std::fprintf(file, "\"fraction_of_limit\": null, ");
    }
    if (figure.flops > 0) {
      std::fprintf(file, "\"tflop_per_s\": %.1f, ", 1e-6 * figure.flops / figure.us);
    }
    std::fprintf(file, "%s", common.c_str());
  }
  std::fprintf(file, "\n]\n");
  return std::fclose(file) == 0;
}

void PrintTable(const Bench& bench, const Limits& limits, const std::string& gpu) {
  std::printf("%s; batch %d, context %d\n", gpu.c_str(), bench.options.batch,
              bench.options.context);
  std::printf("device to device copy, read + write: %.1f GB/s; pinned host to device: %.1f GB/s\n",
              limits.device_copy, limits.host_to_device);
  std::printf("%-10s %-46s %10s %9s %9s %9s\n", "kernel", "shape", "us", "GB/s", "of limit",
              "TFLOP/s");
  for (const Figure& figure : bench.figures) {
    std::printf("%-10s %-46s %10.2f", figure.kernel.c_str(), figure.shape.c_str(), figure.us);
    if (figure.bytes > 0) {
      std::printf(" %9.1f", 1e-3 * figure.bytes / figure.us);
    } else {
      std::printf(" %9s", "-");
    }
    if (const auto fraction = FractionOfLimit(limits, figure)) {
      std::printf(" %9.3f", *fraction);
    } else {
      std::printf(" %9s", "-");
    }
    if (figure.flops > 0) std::printf(" %9.1f", 1e-6 * figure.flops / figure.us);
    std::printf("\n");
  }
  for (const Figure& figure : bench.figures) {
    if (figure.limit == Limit::kNone || 1e-3 * figure.bytes / figure.us <= limits.Of(figure)) {
      continue;
    }
    std::printf("%s (%s): faster than the copy that is its limit, so no share of that is given\n",
                figure.kernel.c_str(), figure.shape.c_str());
  }
}

int Main(int argc, char** argv) {
  Options options;
  std::string command;
  for (int i = 0; i < argc; ++i) {
    command += argv[i];
    if (i + 1 < argc) command += ' ';
    if (i == 0) continue;
    if (std::strcmp(argv[i], "--help") == 0) {
      std::fputs(kUsage, stdout);
      return 0;
    }
    if (!ParseArgument(argv[i], options)) {
      std::fprintf(stderr, "unknown argument '%s': see --help\n", argv[i]);
      return 2;
    }
  }
  if (options.context % kBlockTokens != 0) {
    std::fprintf(stderr, "--context=%d: must be a multiple of 64\n", options.context);
    return 2;
  }
  const bool known =
      options.kernel.empty() ||
      std::any_of(std::begin(kOperations), std::end(kOperations),
                  [&](const Operation& operation) { return options.kernel == operation.name; });
  if (!known) {
    std::fprintf(stderr, "--kernel=%s: there is no such kernel, see --help\n",
                 options.kernel.c_str());
    return 2;
  }
  cudaDeviceProp properties;
  BENCH_CUDA(cudaGetDeviceProperties(&properties, 0));

  Bench bench(options);
  Limits limits = MeasureLimits(bench);
  bool wrong = false;
  for (const Operation& operation : kOperations) {
    if (!options.kernel.empty() && options.kernel != operation.name) continue;
    const size_t figures = bench.figures.size();
    const std::string error = operation.run(bench);
    bench.Release();
    if (!error.empty()) {
      std::fprintf(stderr, "%s: wrong result: %s\n", operation.name, error.c_str());
      bench.figures.resize(figures);
      wrong = true;
    }
  }
  // Again, now that the GPU has been at work all along.
  const Limits again = MeasureLimits(bench);
  limits.device_copy = std::max(limits.device_copy, again.device_copy);
  limits.host_to_device = std::max(limits.host_to_device, again.host_to_device);
  if (!bench.figures.empty()) PrintTable(bench, limits, properties.name);
  if (!options.json.empty() && !WriteJson(bench, limits, properties.name, command)) {
    std::fprintf(stderr, "cannot write %s\n", options.json.c_str());
    return 1;
  }
  return wrong ? 1 : 0;
}

}  // namespace
}  // namespace nosara::kernels::bench

int main(int argc, char** argv) { return nosara::kernels::bench::Main(argc, argv); }
