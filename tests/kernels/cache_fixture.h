// A random but valid world of sequences in a KV cache, on the host and mirrored on the device.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "kernels/common/cache_view.h"
#include "tests/kernels/device_memory.h"
#include "tests/kernels/random.h"

namespace nosara::kernels {

struct SequenceSpec {
  int tokens = 0;
  int slots = 0;  // per record; 0: one for each block
};

struct WorldOptions {
  int head_dim = 128;
  int layers = 2;
  int kv_heads = 2;
  std::vector<SequenceSpec> sequences;
  /// Blocks and frames that the tables have room for beyond what the sequences have.
  int spare = 4;
  /// Whether stored blocks have pages with their records; else a value that is no address.
  bool with_pages = true;
  float key_scale = 1;
};

/// Tables, frames and pages of all sequences, in host memory.
///
/// Frames are dealt out in random order. A sequence with a slot for each block holds all of them;
/// one with fewer holds the blocks that are not stored and some stored ones, others for each
/// record. All finished blocks but the last one or two are stored, some of them at random where
/// everything has a slot. What no token or window of a sequence has written is poison (NaN).
class CacheWorld final {
 public:
  CacheWorld(const WorldOptions& options, Random& random);
  CacheWorld(const CacheWorld& other);
  CacheWorld& operator=(const CacheWorld&) = delete;

  /// Pointers into this world.
  CacheView View();

  int sequences() const { return static_cast<int>(options_.sequences.size()); }
  int tokens(int sequence) const { return options_.sequences[sequence].tokens; }
  int blocks(int sequence) const { return (tokens(sequence) + kBlockTokens - 1) / kBlockTokens; }
  /// Windows of the longest sequence, rounded up to a multiple of 128.
  int MaxWindows() const;
  const WorldOptions& options() const { return options_; }
  /// Blocks of (sequence, record) that have a slot, ascending.
  std::vector<int32_t> Resident(int sequence, int record) const;

  /// The first broken invariant of cache_view.h, or an empty string.
  std::string BrokenInvariant() const;

  std::vector<std::byte> slots;
  std::vector<int32_t> frames, num_frames, index_frames, slot_of, block_of;
  std::vector<uint32_t> stamp;
  std::vector<uint64_t> pages;
  std::vector<std::byte> page_memory;

 private:
  /// Index frames for so many windows.
  static int ScoreFrames(int windows);
  void FillRecord(std::byte* record, int tokens, Random& random);
  void FillWindows(int sequence, Random& random);
  void PlaceBlocks(int sequence, Random& random);

  WorldOptions options_;
  int max_frames_ = 0;
  int max_index_frames_ = 0;
  int max_blocks_ = 0;
};

/// A world in device memory; its pages in mapped host memory.
class DeviceMirror final {
 public:
  explicit DeviceMirror(CacheWorld& world);

  CacheView View() const;
  /// Copies pages[] of the world again (a block was stored).
  void UploadPages();
  /// Copies slots of the world again.
  void UploadSlots();
  /// Copies slots and tables back to the world.
  void Download();
  /// Tables only.
  void DownloadTables();

 private:
  CacheWorld& world_;
  DeviceArray<std::byte> slots_;
  DeviceArray<int32_t> frames_, num_frames_, index_frames_, slot_of_, block_of_;
  DeviceArray<uint32_t> stamp_;
  DeviceArray<uint64_t> pages_;
  MappedMemory page_memory_;
};

}  // namespace nosara::kernels
