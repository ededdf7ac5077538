// What a program tells a Prometheus server: metrics in its text format, over HTTP at /metrics.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace nosara {

/// The metrics of one moment, as a collector reports them. Names and labels are those of the
/// Prometheus data model: [a-zA-Z_][a-zA-Z0-9_]*; a counter's name ends with _total.
class MetricSink final {
 public:
  using Labels = std::vector<std::pair<std::string, std::string>>;

  MetricSink();
  ~MetricSink();
  MetricSink(const MetricSink&) = delete;
  MetricSink& operator=(const MetricSink&) = delete;

  /// A value that only grows while the process lives. Samples of one name (with different labels)
  /// follow each other and have the same help.
  void Counter(absl::string_view name, absl::string_view help, double value, Labels labels = {});
  /// A value that goes up and down.
  void Gauge(absl::string_view name, absl::string_view help, double value, Labels labels = {});

  /// What was reported, in Prometheus's text format.
  std::string Text() const;

 private:
  friend class MetricsServer;
  struct Impl;
  const std::unique_ptr<Impl> impl_;
};

/// Reports all metrics of a program. Called by any thread, also at the same time, until the server
/// is gone; must not block for long.
using MetricsCollector = std::function<void(MetricSink&)>;

/// Serves GET /metrics. Thread-safe; owns the threads of its HTTP server. Its end takes up to 2 s:
/// so often the library looks whether it is to stop.
class MetricsServer final {
 public:
  /// Listens at `address`, "host:port" with an IPv4 address or "[IPv6]:port"; port 0 takes a free
  /// one. `program` and the version of this build are reported as nosara_build_info.
  /// INVALID_ARGUMENT: no such address. UNAVAILABLE: cannot listen there.
  static absl::StatusOr<std::unique_ptr<MetricsServer>> Create(const std::string& address,
                                                               const std::string& program,
                                                               MetricsCollector collector);
  MetricsServer(const MetricsServer&) = delete;
  MetricsServer& operator=(const MetricsServer&) = delete;
  ~MetricsServer();

  /// "host:port" that it listens on, with the real port.
  const std::string& address() const;

 private:
  struct Impl;
  explicit MetricsServer(std::unique_ptr<Impl> impl);

  const std::unique_ptr<Impl> impl_;
};

}  // namespace nosara
