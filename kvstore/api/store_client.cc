#include "kvstore/api/store_client.h"

namespace nosara::kvstore {

const char* PathName(Path path) {
  switch (path) {
    case Path::kMapped:
      return "mapped";
    case Path::kInProcess:
      return "in-process";
    case Path::kUcx:
      return "ucx";
  }
  return "unknown";
}

}  // namespace nosara::kvstore
