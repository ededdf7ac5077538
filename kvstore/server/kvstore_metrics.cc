#include "kvstore/server/kvstore_metrics.h"

#include <utility>

namespace nosara::kvstore {

void ReportMetrics(const KvStoreStats& stats, MetricSink& sink) {
  const auto gauge = [&sink](const char* name, const char* help, uint64_t value,
                             MetricSink::Labels labels = {}) {
    sink.Gauge(name, help, static_cast<double>(value), std::move(labels));
  };
  const auto counter = [&sink](const char* name, const char* help, uint64_t value,
                               MetricSink::Labels labels = {}) {
    sink.Counter(name, help, static_cast<double>(value), std::move(labels));
  };
  const PageIndex::Stats& index = stats.index;

  gauge("nosara_kvstore_arena_bytes", "Size of the arena", stats.arena_bytes);
  gauge("nosara_kvstore_page_bytes", "Size of one page; 0 until the first page comes",
        stats.page_bytes);
  constexpr char kSlots[] = "nosara_kvstore_slots";
  constexpr char kSlotsHelp[] = "Page slots by state";
  gauge(kSlots, kSlotsHelp, index.slots_free, {{"state", "free"}});
  gauge(kSlots, kSlotsHelp, index.slots_reserved, {{"state", "reserved"}});
  gauge(kSlots, kSlotsHelp, index.slots_stored, {{"state", "stored"}});
  gauge(kSlots, kSlotsHelp, index.slots_quarantined, {{"state", "quarantined"}});
  gauge("nosara_kvstore_pages_leased", "Stored pages under a lease", index.pages_leased);
  gauge("nosara_kvstore_pages_evictable", "Stored pages that could be evicted now",
        index.pages_evictable);
  gauge("nosara_kvstore_leases", "Leases alive", index.leases);
  gauge("nosara_kvstore_namespaces", "Namespaces that have pages", index.namespaces);
  gauge("nosara_kvstore_draining", "1 while the node takes no new pages", stats.draining ? 1 : 0);

  counter("nosara_kvstore_keys_looked_up_total", "Page keys looked up", index.keys_looked_up);
  counter("nosara_kvstore_keys_found_total", "Page keys found", index.keys_found);
  counter("nosara_kvstore_pages_committed_total", "Pages that became visible",
          index.pages_committed);
  constexpr char kEvicted[] = "nosara_kvstore_pages_evicted_total";
  constexpr char kEvictedHelp[] = "Pages evicted: to make room, for a quota, or by request";
  counter(kEvicted, kEvictedHelp, index.pages_evicted, {{"cause", "room"}});
  counter(kEvicted, kEvictedHelp, index.pages_evicted_by_quota, {{"cause", "quota"}});
  counter(kEvicted, kEvictedHelp, index.pages_evicted_by_request, {{"cause", "request"}});
  counter("nosara_kvstore_pages_verified_total", "Stored pages checked against their checksums",
          stats.pages_verified);
  counter("nosara_kvstore_pages_discarded_total",
          "Stored pages that no longer matched their checksums", index.pages_discarded);
  counter("nosara_kvstore_commit_checksum_failures_total",
          "Pages refused at Commit because a checksum differed", stats.commit_checksum_failures);
  counter("nosara_kvstore_leases_expired_total", "Leases that ended without being released",
          index.leases_expired);
  constexpr char kRefused[] = "nosara_kvstore_reservations_refused_total";
  constexpr char kRefusedHelp[] =
      "Reservations refused because the store or the namespace was full";
  counter(kRefused, kRefusedHelp, index.reservations_refused, {{"cause", "full"}});
  counter(kRefused, kRefusedHelp, index.reservations_refused_by_quota, {{"cause", "quota"}});
}

}  // namespace nosara::kvstore
