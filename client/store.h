// `nosara store`: what those who operate a KV store node want to see and do.
#pragma once

#include <string>

#include "client/command.h"
#include "nosara/kvstore/v1/kvstore.pb.h"

namespace nosara::client {

Command StoreCommand();

/// The statistics as a table, one line for each figure.
std::string FormatStoreStats(const kvstore::v1::GetStatsResponse& stats);

}  // namespace nosara::client
