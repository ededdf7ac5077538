#include "base/metrics.h"

#include <prometheus/collectable.h>
#include <prometheus/exposer.h>
#include <prometheus/metric_family.h>
#include <prometheus/text_serializer.h>

#include <exception>
#include <sstream>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace nosara {

struct MetricSink::Impl {
  prometheus::ClientMetric& Add(absl::string_view name, absl::string_view help,
                                prometheus::MetricType type, const Labels& labels) {
    if (families.empty() || families.back().name != name) {
      families.emplace_back();
      families.back().name = std::string(name);
      families.back().help = std::string(help);
      families.back().type = type;
    }
    DCHECK(families.back().type == type && families.back().help == help);
    prometheus::ClientMetric& metric = families.back().metric.emplace_back();
    for (const auto& [label, value] : labels) metric.label.push_back({label, value});
    return metric;
  }

  std::vector<prometheus::MetricFamily> families;
};

MetricSink::MetricSink() : impl_(std::make_unique<Impl>()) {}
MetricSink::~MetricSink() = default;

void MetricSink::Counter(absl::string_view name, absl::string_view help, double value,
                         Labels labels) {
  impl_->Add(name, help, prometheus::MetricType::Counter, labels).counter.value = value;
}

void MetricSink::Gauge(absl::string_view name, absl::string_view help, double value,
                       Labels labels) {
  impl_->Add(name, help, prometheus::MetricType::Gauge, labels).gauge.value = value;
}

std::string MetricSink::Text() const {
  std::ostringstream out;
  prometheus::TextSerializer().Serialize(out, impl_->families);
  return out.str();
}

struct MetricsServer::Impl final : public prometheus::Collectable {
  std::vector<prometheus::MetricFamily> Collect() const override {
    MetricSink sink;
    sink.Gauge("nosara_build_info", "1; the labels tell program and version", 1,
               {{"program", program}, {"version", NOSARA_VERSION}});
    collector(sink);
    return std::move(sink.impl_->families);
  }

  std::string program;
  MetricsCollector collector;
  std::string address;
  // Keeps only a weak reference to the above, so it needs a shared one to refer to.
  std::shared_ptr<prometheus::Collectable> shared;
  std::unique_ptr<prometheus::Exposer> exposer;
};

absl::StatusOr<std::unique_ptr<MetricsServer>> MetricsServer::Create(const std::string& address,
                                                                     const std::string& program,
                                                                     MetricsCollector collector) {
  const size_t colon = address.rfind(':');
  int port = -1;
  // The library also reads options such as "8080s" from this string.
  if (colon == std::string::npos || colon == 0 ||
      !absl::SimpleAtoi(address.substr(colon + 1), &port) || port < 0 || port > 65535) {
    return absl::InvalidArgumentError(
        absl::StrCat("metrics_listen = '", address, "': must be host:port, port 0 to 65535"));
  }
  auto impl = std::make_unique<Impl>();
  impl->program = program;
  impl->collector = std::move(collector);
  impl->shared = std::shared_ptr<prometheus::Collectable>(impl.get(), [](auto*) {});
  // The library reports errors by exceptions.
  try {
    impl->exposer = std::make_unique<prometheus::Exposer>(address, /*num_threads=*/2);
    impl->exposer->RegisterCollectable(impl->shared);
    const std::vector<int> ports = impl->exposer->GetListeningPorts();
    CHECK(!ports.empty());
    impl->address = absl::StrCat(address.substr(0, colon), ":", ports.front());
  } catch (const std::exception& error) {
    return absl::UnavailableError(absl::StrCat("metrics_listen '", address,
                                               "': cannot listen there (", error.what(),
                                               "; is the port in use?)"));
  }
  return std::unique_ptr<MetricsServer>(new MetricsServer(std::move(impl)));
}

MetricsServer::MetricsServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

// First ends the threads that call the collector.
MetricsServer::~MetricsServer() { impl_->exposer.reset(); }

const std::string& MetricsServer::address() const { return impl_->address; }

}  // namespace nosara
