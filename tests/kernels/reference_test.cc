// The references against cases worked out by hand, and against the CPU backend's selection. They
// run on the host: no GPU is needed.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "kernels/append/append_reference.h"
#include "kernels/attend/attend_reference.h"
#include "kernels/common/record_reference.h"
#include "kernels/embed/embed_reference.h"
#include "kernels/gather/gather_reference.h"
#include "kernels/pages/pages_reference.h"
#include "kernels/prefill/prefill_reference.h"
#include "kernels/resolve/resolve_reference.h"
#include "kernels/rms_norm/rms_norm_reference.h"
#include "kernels/sample/sample_reference.h"
#include "kernels/score/score_reference.h"
#include "kernels/select/select_reference.h"
#include "kernels/swiglu/swiglu_reference.h"
#include "kernels/windows/windows_reference.h"
#include "kvstore/api/layout.h"
#include "tests/kernels/random.h"
#include "worker/backend/selection.h"

namespace nosara::kernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

__nv_bfloat16 Bf16(float value) { return __float2bfloat16_rn(value); }
float ToFloat(__nv_bfloat16 value) { return __bfloat162float(value); }

/// A cache of one sequence whose tables the test fills in; D = 64, slots of zeros.
struct TinyCache {
  static constexpr int D = 64;

  TinyCache(int records, int num_frames, int index_frames_count, int max_blocks)
      : slots((num_frames + index_frames_count) * records * SlotBytes(D)),
        frames(num_frames),
        num_frames_of({num_frames}),
        index_frames(index_frames_count),
        slot_of(records * max_blocks, -1),
        block_of(records * num_frames, -1),
        stamp(records * num_frames, 0),
        pages(max_blocks, 0) {
    // Frames in falling order, so that a mix-up of frame and slot shows.
    for (int i = 0; i < num_frames; ++i) frames[i] = num_frames + index_frames_count - 1 - i;
    for (int i = 0; i < index_frames_count; ++i) index_frames[i] = index_frames_count - 1 - i;
    view.slots = slots.data();
    view.records = records;
    view.head_dim = D;
    view.max_frames = num_frames;
    view.max_index_frames = index_frames_count;
    view.max_blocks = max_blocks;
    view.frames = frames.data();
    view.num_frames = num_frames_of.data();
    view.index_frames = index_frames.data();
    view.slot_of = slot_of.data();
    view.block_of = block_of.data();
    view.stamp = stamp.data();
    view.pages = pages.data();
  }
  TinyCache(const TinyCache&) = delete;
  TinyCache& operator=(const TinyCache&) = delete;

  void Put(int record, int block, int slot, uint32_t step = 0) {
    slot_of[record * view.max_blocks + block] = slot;
    block_of[record * view.max_frames + slot] = block;
    stamp[record * view.max_frames + slot] = step;
  }
  std::byte* Record(int record, int block) { return view.Slot(view.SlotOf(0, record, block)); }

  std::vector<std::byte> slots;
  std::vector<int32_t> frames, num_frames_of, index_frames, slot_of, block_of;
  std::vector<uint32_t> stamp;
  std::vector<uint64_t> pages;
  CacheView view;
};

TEST(CacheViewTest, WindowsBecomeVisibleWithTheirLastToken) {
  EXPECT_EQ(VisibleWindows(0), 0);
  EXPECT_EQ(VisibleWindows(30), 0);
  EXPECT_EQ(VisibleWindows(31), 1);
  EXPECT_EQ(VisibleWindows(46), 1);
  EXPECT_EQ(VisibleWindows(47), 2);
  EXPECT_EQ(VisibleWindows(16383), 1023);
  for (int t = 0; t < 3000; ++t) ASSERT_EQ(VisibleWindows(t), worker::VisibleWindows(t)) << t;
}

TEST(CacheViewTest, ARecordIsTheStoresRecord) {
  for (const int head_dim : {64, 128}) {
    const auto layout = kvstore::PageLayout::Create(3, 2, head_dim, 2);
    ASSERT_TRUE(layout.ok());
    EXPECT_EQ(static_cast<int64_t>(layout->record_bytes()), RecordBytes(head_dim));
    EXPECT_EQ(static_cast<int64_t>(layout->index_entry_bytes()), 4 * 2 * head_dim + 16);
    std::byte* none = nullptr;
    EXPECT_EQ(reinterpret_cast<std::byte*>(RecordValue(none, head_dim, 0)) - none,
              static_cast<int64_t>(layout->v_offset()));
    EXPECT_EQ(reinterpret_cast<std::byte*>(RecordBias(none, head_dim)) - none,
              static_cast<int64_t>(layout->c_offset()));
  }
}

TEST(RmsNormReferenceTest, ByHand) {
  // x = (3, 4, 0, 0) + (0, 0, 0, 0): mean of squares 6.25, root 2.5.
  std::vector<float> hidden = {9, 9, 9, 9, 1, 4, 0, 0};
  const std::vector<float> addend = {7, 7, 7, 7, 2, 0, 0, 0};
  const std::vector<float> weight = {1, 2, 3, 4};
  const std::vector<int32_t> source = {1};
  std::vector<__nv_bfloat16> out(4);
  RmsNormParams params;
  params.hidden = hidden.data();
  params.addend = addend.data();
  params.weight = weight.data();
  params.out = out.data();
  params.source = source.data();
  params.rows = 1;
  params.width = 4;
  RmsNormReference(params);
  EXPECT_EQ(hidden, (std::vector<float>{9, 9, 9, 9, 3, 4, 0, 0}));
  EXPECT_EQ(ToFloat(out[0]), ToFloat(Bf16(1.2f)));
  EXPECT_EQ(ToFloat(out[1]), ToFloat(Bf16(3.2f)));
  EXPECT_EQ(ToFloat(out[2]), 0);
  params.eps = 18.75f;  // 6.25 + 18.75 = 25
  params.addend = nullptr;
  RmsNormReference(params);
  EXPECT_EQ(ToFloat(out[0]), ToFloat(Bf16(0.6f)));
}

TEST(SwiGluReferenceTest, ByHand) {
  const std::vector<float> gate_up = {0, 1, -1e5f, 100, 5, 2, 3, -2};
  std::vector<__nv_bfloat16> out(4);
  SwiGluReference({gate_up.data(), out.data(), 1, 4});
  EXPECT_EQ(ToFloat(out[0]), 0);
  EXPECT_EQ(ToFloat(out[1]), ToFloat(Bf16(2 * 0.7310585786f)));
  EXPECT_EQ(ToFloat(out[2]), 0);
  EXPECT_EQ(ToFloat(out[3]), -200);
}

TEST(SampleReferenceTest, GreedyByHand) {
  const float nan = std::nanf("");
  const std::vector<float> logits = {1, 3, 3,   nan, nan,        2,          -kInfinity, nan,
                                     5, 5, nan, nan, -kInfinity, -kInfinity, nan,        nan};
  std::vector<int32_t> token(4);
  const std::vector<DrawParams> greedy(4);
  SampleReference({logits.data(), greedy.data(), token.data(), 4, 4});
  EXPECT_EQ(token, (std::vector<int32_t>{1, 1, 0, 0}));
}

TEST(EmbedReferenceTest, ByHand) {
  const std::vector<__nv_bfloat16> table = {Bf16(1), Bf16(2), Bf16(3), Bf16(4),
                                            Bf16(5), Bf16(6), Bf16(7), Bf16(8)};
  const std::vector<int32_t> tokens = {1, 0};
  const std::vector<StepRow> info = {{0, 3}, {-1, 3}};
  const std::vector<double> frequencies = {1.0, 0.5};
  std::vector<float> hidden(8, 9), cosine(4, 9), sine(4, 9);
  EmbedParams params;
  params.table = table.data();
  params.tokens = tokens.data();
  params.rows_info = info.data();
  params.inverse_frequencies = frequencies.data();
  params.hidden = hidden.data();
  params.cosine = cosine.data();
  params.sine = sine.data();
  params.rows = 2;
  params.width = 4;
  params.half = 2;
  EmbedReference(params);
  EXPECT_EQ(hidden, (std::vector<float>{5, 6, 7, 8, 0, 0, 0, 0}));
  EXPECT_EQ(cosine, (std::vector<float>{static_cast<float>(std::cos(3.0)),
                                        static_cast<float>(std::cos(1.5)), 0, 0}));
  EXPECT_EQ(sine, (std::vector<float>{static_cast<float>(std::sin(3.0)),
                                      static_cast<float>(std::sin(1.5)), 0, 0}));
}

TEST(AppendReferenceTest, ByHand) {
  constexpr int D = TinyCache::D;
  TinyCache cache(/*records=*/2, /*num_frames=*/3, 1, /*max_blocks=*/2);
  cache.Put(/*record=*/1, /*block=*/1, /*slot=*/2);
  std::vector<float> qkv(3 * D, 0.0f), cosine(D / 2, 0.6f), sine(D / 2, 0.8f), bias(3 * D, 0.0f);
  qkv[0] = 1;                     // q
  qkv[D + D / 2] = 2;             // k, second half
  qkv[2 * D + 5] = 1.5f;          // v
  bias[2 * D + 6] = 1.00390625f;  // half way between two bf16 numbers, 1 the even one
  std::vector<float> delta(D, 0.0f);
  delta[5] = 2;
  delta[6] = 256;
  const std::vector<float> A = {-0.5f}, delta_bias = {1};
  const std::vector<StepRow> info = {{0, 64 + 7}};
  std::vector<__nv_bfloat16> q(D);
  AppendParams params;
  params.qkv = qkv.data();
  params.bias = bias.data();
  params.A = A.data();
  params.delta = delta.data();
  params.delta_bias = delta_bias.data();
  params.cosine = cosine.data();
  params.sine = sine.data();
  params.rows_info = info.data();
  params.q = q.data();
  params.cache = cache.view;
  params.rows = params.num_heads = params.num_kv_heads = 1;
  params.layer = 1;
  AppendReference(params);
  EXPECT_EQ(ToFloat(q[0]), ToFloat(Bf16(0.6f)));
  EXPECT_EQ(ToFloat(q[D / 2]), ToFloat(Bf16(0.8f)));
  EXPECT_EQ(ToFloat(q[1]), 0);
  std::byte* record = cache.Record(1, 1);
  EXPECT_EQ(ToFloat(RecordKey(record, D, 7)[0]), ToFloat(Bf16(-1.6f)));
  EXPECT_EQ(ToFloat(RecordKey(record, D, 7)[D / 2]), ToFloat(Bf16(1.2f)));
  EXPECT_EQ(ToFloat(RecordValue(record, D, 7)[5]), 1.5f);
  EXPECT_EQ(ToFloat(RecordValue(record, D, 7)[6]), 1.0f);
  // From the unrounded v: 2 * 1.5 + 256 * 1.00390625 + 1 = 261, whose softplus is itself.
  EXPECT_EQ(RecordBias(record, D)[7], -0.5f * 261);
  EXPECT_EQ(RecordBias(record, D)[6], 0);
}

TEST(WindowsReferenceTest, ByHand) {
  constexpr int D = TinyCache::D;
  TinyCache cache(1, 2, 2, 2);
  cache.Put(0, 0, 1);
  cache.Put(0, 1, 0);
  for (int t = 0; t < 128; ++t) {
    RecordKey(cache.Record(0, t / 64), D, t % 64)[3] = Bf16(t);
    RecordBias(cache.Record(0, t / 64), D)[t % 64] = 2 * t;
  }
  // 79 completes window 3, tokens 48 .. 79, of mean 63.5; 80 and 15 complete nothing.
  const std::vector<StepRow> info = {{0, 80}, {0, 79}, {-1, 79}, {0, 15}};
  WindowsReference({info.data(), cache.view, 4, 1, 0});
  for (int w = 0; w < 4; ++w) {
    std::byte* slot = cache.view.IndexSlot(0, 0, w);
    EXPECT_EQ(ToFloat(IndexKey(slot, D, w)[3]), w == 3 ? 63.5f : 0) << w;
    EXPECT_EQ(*IndexScore(slot, D, w), w == 3 ? 127.0f : 0) << w;
  }
}

TEST(ScoreReferenceTest, ByHand) {
  constexpr int D = TinyCache::D;
  // Position 2111 sees windows 0 .. 130: two tiles. A group of two heads.
  TinyCache cache(1, 1, 2, 40);
  for (int w = 0; w < 131; ++w) IndexKey(cache.view.IndexSlot(0, 0, w), D, w)[1] = Bf16(w);
  std::vector<__nv_bfloat16> q(2 * D, Bf16(0));
  q[1] = Bf16(8);       // g = 0: w * 8 / sqrt(64) = w
  q[D + 1] = Bf16(-8);  // g = 1: -w
  const std::vector<StepRow> info = {{0, 2111}};
  std::vector<float> logits(256 * 8, 99);
  std::vector<float2> partials(2 * 8, make_float2(99, 99));
  ScoreParams params;
  params.q = q.data();
  params.rows_info = info.data();
  params.cache = cache.view;
  params.logits = logits.data();
  params.partials = partials.data();
  params.num_tiles = 1;
  params.num_heads = 2;
  params.num_kv_heads = 1;
  params.max_windows = 256;
  params.dense_blocks = 33;  // position 2111 lies in block 32: dense
  ScoreReference(params);
  EXPECT_EQ(logits[0], 99);
  params.dense_blocks = 32;
  ScoreReference(params);
  EXPECT_EQ(logits[5 * 8], 5);
  EXPECT_EQ(logits[5 * 8 + 1], -5);
  EXPECT_EQ(logits[5 * 8 + 2], 0);
  EXPECT_EQ(logits[129 * 8], 129);
  EXPECT_EQ(logits[131 * 8], 99);
  EXPECT_EQ(partials[0].x, 127);
  EXPECT_NEAR(partials[0].y, 1 / (1 - std::exp(-1.0)), 1e-5);  // 1 + 1/e + 1/e^2 + ...
  EXPECT_EQ(partials[1].x, 0);
  EXPECT_EQ(partials[8].x, 130);
  EXPECT_EQ(partials[8 + 1].x, -128);
  EXPECT_NEAR(partials[8 + 1].y, 1 + std::exp(-1.0) + std::exp(-2.0), 1e-6);
}

TEST(SelectReferenceTest, ByHand) {
  // Ten blocks; forced 0 and 8, 9; one more by S, then by E.
  const SelectionNumbers numbers{1, 1, 4, 6};
  BlockScores scores;
  scores.S = {0, 5, 3, 5, 1, 1, 1, 1, 1, 1};
  scores.E = {9, 0, 9, 0, std::nanf(""), 2, 2, -kInfinity, 9, 9};
  const Selection selection = SelectBlocks(numbers, 9 * 64, scores);
  // By S block 1 (before 3, its equal); of the rest by E 2, then 5 (before 6, its equal).
  EXPECT_EQ(selection.blocks, (std::vector<int32_t>{0, 1, 2, 5, 8, 9}));
  // Blocks 1 and 3 have their score from different windows.
  EXPECT_EQ(selection.query_margin, 0);
  EXPECT_EQ(selection.rounding_margin, 0);
  scores.S[3] = 4;
  EXPECT_FLOAT_EQ(SelectBlocks(numbers, 9 * 64, scores).query_margin, 0.2f);
  EXPECT_FLOAT_EQ(SelectBlocks(numbers, 9 * 64, scores).rounding_margin, 0.2f);
  EXPECT_EQ(SelectBlocks(numbers, 5 * 64 + 63, {}).blocks,
            (std::vector<int32_t>{0, 1, 2, 3, 4, 5}));
}

TEST(SelectReferenceTest, NeighboursTieByTheWindowTheyShare) {
  // Forced 0 and 8, 9; two more by S: block 1, then 4 before its neighbour.
  const SelectionNumbers numbers{1, 1, 5, 5};
  BlockScores scores;
  scores.S = {0, 8, 1, 1, 5, 5, 4, 1, 1, 1};
  scores.E.assign(10, 0);
  const auto select = [&] { return SelectBlocks(numbers, 9 * 64, scores); };
  EXPECT_EQ(select().blocks, (std::vector<int32_t>{0, 1, 4, 8, 9}));
  EXPECT_EQ(select().query_margin, 0);
  EXPECT_FLOAT_EQ(select().rounding_margin, 0.2f);  // to block 6
  scores.S[1] = 5.5f;
  scores.S[6] = 1;
  EXPECT_FLOAT_EQ(select().rounding_margin, 0.5f / 5.5f);  // to block 1
  scores.S[1] = -kInfinity;
  scores.S[3] = 6;
  EXPECT_EQ(select().blocks, (std::vector<int32_t>{0, 3, 4, 8, 9}));
  EXPECT_FLOAT_EQ(select().rounding_margin, 1.0f / 6);  // to block 3
  scores.S[7] = 5;  // a third one, which has no window in common with block 4
  EXPECT_EQ(select().query_margin, 0);
  EXPECT_EQ(select().rounding_margin, 0);
  scores.S.assign(10, -kInfinity);
  EXPECT_EQ(select().rounding_margin, kInfinity);
}

TEST(SelectReferenceTest, FromLogitsByHand) {
  // Two heads, t = 200: windows 0 .. 10. Head 0 gives window 9 everything, head 1 windows 2 and 5
  // a half each: s = 1 at 9, 0.5 at 2 and 5. Blocks: 0 .. 3.
  TinyCache cache(1, 1, 1, 4);
  std::vector<float> logits(128 * 8, -1000);
  for (int w = 0; w < 11; ++w) {
    logits[w * 8] = w == 9 ? 3 : -kInfinity;
    logits[w * 8 + 1] = w == 2 || w == 5 ? -7 : -kInfinity;
    *IndexScore(cache.view.IndexSlot(0, 0, w), TinyCache::D, w) = -w;
  }
  std::vector<float2> partials(8, make_float2(-1000, 0));
  partials[0] = {3, 1};
  partials[1] = {-7, 2};
  const std::vector<StepRow> info = {{0, 200}};
  SelectParams params;
  params.rows_info = info.data();
  params.cache = cache.view;
  params.logits = logits.data();
  params.partials = partials.data();
  params.rows = 1;
  params.num_heads = 2;
  params.num_kv_heads = 1;
  params.max_windows = 128;
  params.max_selected = 4;
  const BlockScores scores = BlockScoresReference(params, 0, 0);
  EXPECT_EQ(scores.S, (std::vector<float>{0.5f, 0.5f, 1, -kInfinity}));
  EXPECT_EQ(scores.E, (std::vector<float>{0, -3, -7, -kInfinity}));

  std::vector<int32_t> selected(4, -7), count(1, -7);
  params.selected = selected.data();
  params.count = count.data();
  params.numbers = {0, 0, 2, 3};  // forced: 3; by S: 2; by E: 0
  SelectReference(params);
  EXPECT_EQ(count[0], 3);
  EXPECT_EQ(selected, (std::vector<int32_t>{0, 2, 3, -7}));
  SelectAllReference(params);
  EXPECT_EQ(count[0], 4);
  EXPECT_EQ(selected, (std::vector<int32_t>{0, 1, 2, 3}));
}

TEST(SelectReferenceTest, AgreesWithTheCpuBackend) {
  SCOPED_TRACE(::testing::Message() << "--gtest_random_seed=" << TestSeed());
  Random random(TestSeed());
  worker::SelectionScratch scratch;
  for (int round = 0; round < 5000; ++round) {
    worker::NosaConfig config;
    config.init_blocks = random.Below(3);
    config.window_blocks = 1 + random.Below(4);
    config.topk_q_blocks = 1 + random.Below(6);
    config.topk_blocks = config.QueryAwareBlocks() + random.Below(9);
    const worker::AttentionPolicy policy =
        random.Chance(0.7) ? worker::AttentionPolicy::kNosa : worker::AttentionPolicy::kInfLlmV2;
    const int t = random.Below(60 * 64);
    std::vector<float> s(VisibleWindows(t)), e(s.size());
    const float few[] = {0.0f, -0.0f, 1.0f, -kInfinity, std::nanf("")};
    const bool ties = random.Chance(0.5);
    for (float& x : s) x = ties ? few[random.Below(5)] : std::abs(random.Normal());
    for (float& x : e) x = ties ? few[random.Below(5)] : random.Normal();

    std::vector<float> S(t / 64 + 1), E(S.size());
    worker::PoolQueryScores(s, t, absl::MakeSpan(S));
    worker::PoolImportance(e, absl::MakeSpan(E));
    std::vector<int32_t> expected;
    worker::SelectionMargins margins;
    worker::Select(config, policy, t, S, E, scratch, expected, &margins);

    SelectionNumbers numbers{config.init_blocks, config.window_blocks, config.QueryAwareBlocks(),
                             config.topk_blocks};
    if (policy == worker::AttentionPolicy::kInfLlmV2) numbers.query_blocks = config.topk_blocks;
    const std::vector<float> pooled = PoolQuery(s, t);
    ASSERT_EQ(pooled.size(), S.size());
    for (size_t n = 0; n < S.size(); ++n)
      ASSERT_EQ(pooled[n], S[n]) << "t " << t << ", block " << n;
    const Selection selection = SelectBlocks(numbers, t, {pooled, E});
    ASSERT_EQ(selection.blocks, expected) << "t " << t << ", round " << round;
    // Where the last one taken is not a forced block, whose score does not matter.
    if (!ties && std::isfinite(selection.query_margin)) {
      ASSERT_EQ(selection.query_margin, margins.query) << "t " << t;
    }
  }
}

/// Four slots, blocks 0 .. 3 in them with stamps 5, 3, 3, 9; block 3 is not stored. Ten blocks.
struct FullTable {
  FullTable() : cache(1, 4, 1, 10) {
    cache.Put(0, 0, 2, 5);
    cache.Put(0, 1, 0, 3);
    cache.Put(0, 2, 3, 3);
    cache.Put(0, 3, 1, 9);
    for (int b : {0, 1, 2, 4, 5, 6, 7}) cache.pages[b] = 1;
  }
  void Resolve(std::vector<int32_t> selected) {
    const std::vector<StepRow> info = {{-1, 0}, {0, 500}};
    selected.resize(12);  // the second row's list begins at 6
    std::rotate(selected.begin(), selected.begin() + 6, selected.end());
    ResolveParams params;
    params.rows_info = info.data();
    params.selected = selected.data();
    params.count = count.data();
    params.cache = cache.view;
    params.step = &step;
    params.slots = slots.data();
    params.blocks = blocks.data();
    params.ranges = ranges.data();
    params.loads = loads.data();
    params.num_loads = &num_loads;
    params.failures = &failures;
    params.rows = 2;
    params.num_kv_heads = 1;
    params.max_selected = 6;
    ResolveReference(params);
  }

  TinyCache cache;
  std::vector<int32_t> count = {0, 0}, slots = std::vector<int32_t>(12, -7), blocks = slots;
  std::vector<int2> ranges = std::vector<int2>(2, make_int2(-7, -7));
  std::vector<Load> loads = std::vector<Load>(12);
  uint32_t step = 10;
  int32_t num_loads = 0;
  int32_t failures = 0;
};

TEST(ResolveReferenceTest, VictimsByHand) {
  FullTable table;
  table.count[1] = 3;
  table.Resolve({4, 1, 5, 0, 0, 0});
  // 1 is resident. 4 and 5 take the slots of 2 (stamp 3; 1 is selected) and 0 (stamp 5).
  EXPECT_EQ(table.ranges[0].x, -7);
  EXPECT_EQ(table.ranges[1].x, 1);
  EXPECT_EQ(table.ranges[1].y, 3);
  EXPECT_EQ(table.blocks[6], 1);
  EXPECT_EQ(table.blocks[7], 4);
  EXPECT_EQ(table.blocks[8], 5);
  // Local slot i is frame 4 - i here, and there is one record: slot number = frame.
  EXPECT_EQ(table.slots[6], 4);
  EXPECT_EQ(table.slots[7], 1);
  EXPECT_EQ(table.slots[8], 2);
  EXPECT_EQ(table.num_loads, 2);
  EXPECT_EQ(table.loads[0].block, 4);
  EXPECT_EQ(table.loads[0].slot, 3);
  EXPECT_EQ(table.cache.block_of, (std::vector<int32_t>{1, 3, 5, 4}));
  EXPECT_EQ(table.cache.stamp, (std::vector<uint32_t>{10, 9, 10, 10}));
  EXPECT_EQ(table.cache.slot_of, (std::vector<int32_t>{-1, 0, -1, 1, 3, 2, -1, -1, -1, -1}));
  EXPECT_EQ(table.failures, 0);
}

TEST(ResolveReferenceTest, TheSmallerBlockGoesFirstAmongEquals) {
  FullTable table;
  table.count[1] = 1;
  table.Resolve({7, 0, 0, 0, 0, 0});
  EXPECT_EQ(table.cache.block_of, (std::vector<int32_t>{7, 3, 0, 2}));
}

TEST(ResolveReferenceTest, WhatFindsNoSlotIsCounted) {
  FullTable table;
  table.count[1] = 5;
  table.Resolve({0, 4, 5, 6, 7, 0});
  EXPECT_EQ(table.ranges[1].x, 1);
  EXPECT_EQ(table.ranges[1].y, 3);  // the slots of 1 and 2; 3 is not stored, 0 is selected
  EXPECT_EQ(table.failures, 2);
  EXPECT_EQ(table.num_loads, 2);
}

TEST(ResolveReferenceTest, ChunksByHand) {
  FullTable table;
  // Two rows: {0, 4} and {4, 3}. 0 and 3 are here; 4 takes the slot of 1.
  const std::vector<StepRow> info = {{0, 300}, {0, 301}};
  const std::vector<int32_t> selected = {0, 4, 4, 3};
  const std::vector<int32_t> count = {2, 2};
  table.step = 20;
  ResolveParams params;
  params.rows_info = info.data();
  params.selected = selected.data();
  params.count = count.data();
  params.cache = table.cache.view;
  params.step = &table.step;
  params.loads = table.loads.data();
  params.num_loads = &table.num_loads;
  params.failures = &table.failures;
  params.totals = table.ranges.data();
  params.rows = 2;
  params.num_kv_heads = 1;
  params.max_selected = 2;
  ResolveChunksReference(params);
  EXPECT_EQ(table.cache.block_of, (std::vector<int32_t>{4, 3, 0, 2}));
  EXPECT_EQ(table.cache.stamp, (std::vector<uint32_t>{20, 20, 19, 3}));
  EXPECT_EQ(table.num_loads, 1);
  EXPECT_EQ(table.loads[0].block, 4);
  EXPECT_EQ(table.failures, 0);
  EXPECT_EQ(table.ranges[0].x, -7 + 3);
  EXPECT_EQ(table.ranges[0].y, -7 + 1);
  EXPECT_EQ(table.ranges[1].x, -7);
}

TEST(ResolveReferenceTest, OpenBlocksByHand) {
  FullTable table;
  const std::vector<StepRow> info = {{0, 8 * 64}, {0, 8 * 64 + 1}, {-1, 64}};
  OpenBlocksReference({info.data(), table.cache.view, &table.step, &table.failures, 3});
  EXPECT_EQ(table.cache.block_of, (std::vector<int32_t>{8, 3, 0, 2}));
  EXPECT_EQ(table.cache.stamp[0], 10u);
  EXPECT_EQ(table.failures, 0);
  table.step = 11;  // it has its slot: nothing happens
  OpenBlocksReference({info.data(), table.cache.view, &table.step, &table.failures, 3});
  EXPECT_EQ(table.cache.block_of, (std::vector<int32_t>{8, 3, 0, 2}));
  EXPECT_EQ(table.cache.stamp[0], 10u);
}

TEST(ShrinkReferenceTest, ByHand) {
  FullTable table;  // slots: 1 (stamp 3), 3 (not stored), 0 (5), 2 (3)
  TinyCache& cache = table.cache;
  *RecordBias(cache.Record(0, 0), TinyCache::D) = 42;
  ShrinkReference({0, 3, cache.view});
  // 2 is no more recent than 1: forgotten.
  EXPECT_EQ(cache.block_of, (std::vector<int32_t>{1, 3, 0, -1}));
  ShrinkReference({0, 2, cache.view});
  EXPECT_EQ(cache.block_of, (std::vector<int32_t>{0, 3, -1, -1}));
  EXPECT_EQ(cache.slot_of, (std::vector<int32_t>{0, -1, -1, 1, -1, -1, -1, -1, -1, -1}));
  EXPECT_EQ(cache.stamp[0], 5u);
  EXPECT_EQ(*RecordBias(cache.Record(0, 0), TinyCache::D), 42);
  ShrinkReference({0, 1, cache.view});
  EXPECT_EQ(cache.block_of, (std::vector<int32_t>{3, -1, -1, -1}));
}

TEST(GatherReferenceTest, ByHand) {
  constexpr int64_t kBytes = RecordBytes(TinyCache::D);
  TinyCache cache(2, 2, 1, 3);
  std::vector<std::byte> page(2 * kBytes, std::byte{1}), landing(2 * kBytes, std::byte{3});
  std::fill(page.begin() + kBytes, page.end(), std::byte{2});
  cache.pages[2] = reinterpret_cast<uint64_t>(page.data());
  const std::vector<Load> loads = {{0, 1, 2, 1}, {0, 0, 2, 0}};
  int32_t num_loads = 1;
  GatherReference({loads.data(), &num_loads, cache.view, nullptr, 16});
  const auto first_byte = [&](int record, int slot) {
    return static_cast<int>(*cache.view.Slot(cache.view.SlotNumber(0, record, slot)));
  };
  EXPECT_EQ(first_byte(1, 1), 2);
  EXPECT_EQ(first_byte(0, 0), 0);
  EXPECT_EQ(static_cast<int>(cache.view.Slot(cache.view.SlotNumber(0, 1, 1))[kBytes - 1]), 2);
  EXPECT_EQ(static_cast<int>(cache.view.Slot(cache.view.SlotNumber(0, 1, 1))[kBytes]), 0);
  num_loads = 2;
  GatherReference({loads.data(), &num_loads, cache.view, landing.data(), 16});
  EXPECT_EQ(first_byte(1, 1), 3);
  EXPECT_EQ(first_byte(0, 0), 3);
}

TEST(PagesReferenceTest, ThereAndBack) {
  constexpr int D = TinyCache::D;
  TinyCache cache(1, 2, 1, 2);
  cache.Put(0, 0, 1);
  cache.Put(0, 1, 0);
  *RecordBias(cache.Record(0, 1), D) = 6;
  std::byte* index = cache.view.IndexSlot(0, 0, 0);
  for (int w = 0; w < 7; ++w) {
    IndexKey(index, D, w)[0] = Bf16(10 + w);
    *IndexScore(index, D, w) = 20 + w;
  }
  constexpr int64_t kIndex = 128, kRecords = 768, kPage = kRecords + RecordBytes(D);
  std::vector<std::byte> pages(2 * kPage);
  const std::vector<PageOfBlock> blocks = {{0, 1, pages.data()}, {0, 0, pages.data() + kPage}};
  const ExportParams params{blocks.data(), cache.view, {kRecords, kIndex}, 2};
  ExportReference(params);
  EXPECT_EQ(*RecordBias(pages.data() + kRecords, D), 6);
  // Block 1: windows 3 .. 6. Block 0: none, then 0 .. 2.
  const auto key = [&](int page, int i) {
    return ToFloat(reinterpret_cast<__nv_bfloat16*>(&pages[page * kPage + kIndex])[i * D]);
  };
  const auto score = [&](int page, int i) {
    return reinterpret_cast<float*>(&pages[page * kPage + kIndex + 8 * D])[i];
  };
  EXPECT_EQ(key(0, 0), 13);
  EXPECT_EQ(key(0, 3), 16);
  EXPECT_EQ(score(0, 0), 23);
  EXPECT_EQ(score(0, 3), 26);
  EXPECT_EQ(key(1, 0), 0);
  EXPECT_EQ(key(1, 1), 10);
  EXPECT_EQ(score(1, 0), 0);
  EXPECT_EQ(score(1, 3), 22);

  const std::vector<std::byte> before = cache.slots;
  for (int w = 0; w < 7; ++w) {
    IndexKey(index, D, w)[0] = Bf16(-1);
    *IndexScore(index, D, w) = -1;
  }
  ImportIndexReference(params);
  EXPECT_TRUE(cache.slots == before);
}

/// Two blocks of one head; q = 0, so that only c weighs the tokens.
struct TinyAttention {
  static constexpr int D = TinyCache::D;

  TinyAttention() : cache(1, 2, 1, 3), q(D, Bf16(0)) {
    cache.Put(0, 0, 1);
    cache.Put(0, 2, 0);
    for (const int block : {0, 2}) {
      for (int j = 0; j < 64; ++j) {
        RecordValue(cache.Record(0, block), D, j)[7] = Bf16(block == 0 ? 1 : 4);
        RecordBias(cache.Record(0, block), D)[j] = block == 0 ? 0.0f : std::log(32.0f);
      }
    }
    // Beyond the row's position, 2 * 64 + 1.
    RecordBias(cache.Record(0, 2), D)[2] = 50;
  }

  TinyCache cache;
  std::vector<__nv_bfloat16> q;
  const std::vector<StepRow> info = {{0, 129}};
};

/// One row and head over the two blocks of a TinyAttention.
struct TinyAttend {
  static constexpr int D = TinyCache::D;

  explicit TinyAttend(TinyAttention& tiny)
      : slots({static_cast<int32_t>(tiny.cache.view.SlotOf(0, 0, 0)),
               static_cast<int32_t>(tiny.cache.view.SlotOf(0, 0, 2))}) {
    params.q = tiny.q.data();
    params.rows_info = tiny.info.data();
    params.slots = slots.data();
    params.blocks = blocks.data();
    params.ranges = ranges.data();
    params.cache = tiny.cache.view;
    params.out = out.data();
    params.rows = params.num_heads = params.num_kv_heads = 1;
    params.max_selected = 2;
  }
  TinyAttend(const TinyAttend&) = delete;
  TinyAttend& operator=(const TinyAttend&) = delete;

  const std::vector<int32_t> slots;
  const std::vector<int32_t> blocks = {0, 2};
  std::vector<int2> ranges = {make_int2(1, 2)};
  std::vector<__nv_bfloat16> out = std::vector<__nv_bfloat16>(D, Bf16(9));
  AttendParams params;
};

TEST(AttendReferenceTest, ByHand) {
  TinyAttention tiny;
  TinyAttend attend(tiny);
  // Block 0: 64 tokens of weight 1 and value 1; block 2: two tokens of weight 32 and value 4.
  AttendReference(attend.params);
  EXPECT_EQ(ToFloat(attend.out[7]), 2.5f);  // (64 * 1 + 64 * 4) / 128
  EXPECT_EQ(ToFloat(attend.out[6]), 0);
  attend.params.bias = AttendBias::kNone;
  AttendReference(attend.params);
  EXPECT_EQ(ToFloat(attend.out[7]), ToFloat(Bf16((64 + 2 * 4) / 66.0f)));
  attend.ranges = {make_int2(1, 1)};
  AttendReference(attend.params);
  EXPECT_EQ(ToFloat(attend.out[7]), 1);
  const std::vector<StepRow> padding = {{-1, 0}};
  attend.params.rows_info = padding.data();
  AttendReference(attend.params);
  EXPECT_EQ(ToFloat(attend.out[7]), 0);
}

TEST(AttendReferenceTest, MissingRecordsComeFromTheirPages) {
  constexpr int D = TinyCache::D;
  TinyAttention tiny;
  TinyAttend attend(tiny);
  // The page of block 2 has two layers of one head; the record of the second one is what the slot
  // should hold. Values of 4 as there, c of 0.
  std::vector<std::byte> page(2 * RecordBytes(D), std::byte{0xff});
  std::byte* record = page.data() + RecordBytes(D);
  std::fill_n(record, RecordBytes(D), std::byte{0});
  for (int j = 0; j < 64; ++j) RecordValue(record, D, j)[7] = Bf16(4);
  tiny.cache.pages[2] = reinterpret_cast<uint64_t>(page.data());
  attend.params.layer = 1;

  AttendReference(attend.params);
  EXPECT_EQ(ToFloat(attend.out[7]), 2.5f) << "what is in its slot is not to be fetched";
  attend.params.missing = AttendMissing::kInPages;
  const std::vector<std::byte> before = tiny.cache.slots;
  AttendReference(attend.params);
  EXPECT_EQ(ToFloat(attend.out[7]), ToFloat(Bf16((64 + 2 * 4) / 66.0f)));
  std::byte* slot = tiny.cache.view.Slot(attend.slots[1]);
  EXPECT_EQ(std::memcmp(slot, record, RecordBytes(D)), 0);
  // Nothing else was written.
  std::copy_n(before.data() + (slot - tiny.cache.slots.data()), RecordBytes(D), slot);
  EXPECT_TRUE(tiny.cache.slots == before);
}

TEST(AttendReferenceTest, TheScaleIsOfTheProductOnly) {
  constexpr int D = TinyCache::D;
  TinyAttention tiny;
  TinyAttend attend(tiny);
  // Two tokens: 16 * 1.5 / 8 + 0.25 by the product, 3.25 by c alone.
  const std::vector<StepRow> info = {{0, 1}};
  tiny.q[0] = Bf16(16);
  std::byte* record = tiny.cache.Record(0, 0);
  RecordKey(record, D, 0)[0] = Bf16(1.5f);
  RecordBias(record, D)[0] = 0.25f;
  RecordBias(record, D)[1] = 3.25f;
  RecordValue(record, D, 1)[7] = Bf16(3);
  attend.params.rows_info = info.data();
  attend.ranges = {make_int2(1, 1)};
  AttendReference(attend.params);
  EXPECT_EQ(ToFloat(attend.out[7]), 2);
  attend.params.bias = AttendBias::kNone;
  AttendReference(attend.params);
  EXPECT_NEAR(ToFloat(attend.out[7]), (std::exp(3.0) + 3) / (std::exp(3.0) + 1), 0.01);
}

TEST(PrefillReferenceTest, ByHand) {
  TinyAttention tiny;
  constexpr int D = TinyCache::D;
  const std::vector<RowTile> tiles = {{0, 1}};
  const std::vector<int32_t> selected = {0, 2}, count = {2};
  std::vector<__nv_bfloat16> out(D, Bf16(9));
  PrefillParams params;
  params.q = tiny.q.data();
  params.rows_info = tiny.info.data();
  params.tiles = tiles.data();
  params.selected = selected.data();
  params.count = count.data();
  params.cache = tiny.cache.view;
  params.out = out.data();
  params.num_tiles = params.num_heads = params.num_kv_heads = 1;
  params.max_selected = 2;
  params.max_blocks = 3;
  PrefillReference(params);
  EXPECT_EQ(ToFloat(out[7]), 2.5f);
  EXPECT_EQ(ToFloat(out[0]), 0);
  params.bias = AttendBias::kNone;
  PrefillReference(params);
  EXPECT_EQ(ToFloat(out[7]), ToFloat(Bf16((64 + 2 * 4) / 66.0f)));
}

}  // namespace
}  // namespace nosara::kernels
