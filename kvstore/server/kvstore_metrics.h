// The metrics of a KV store node; docs/metrics.md lists them.
#pragma once

#include "base/metrics.h"
#include "kvstore/server/kvstore_stats.h"

namespace nosara::kvstore {

void ReportMetrics(const KvStoreStats& stats, MetricSink& sink);

}  // namespace nosara::kvstore
