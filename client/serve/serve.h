// `nosara serve`: everything in one process.
#pragma once

#include "client/command.h"

namespace nosara::client {

Command ServeCommand();

}  // namespace nosara::client
