// `nosara generate`: continues a text.
#pragma once

#include "client/command.h"

namespace nosara::client {

Command GenerateCommand();

}  // namespace nosara::client
