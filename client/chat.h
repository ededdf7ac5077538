// `nosara chat`: a conversation in the terminal.
#pragma once

#include "client/command.h"

namespace nosara::client {

Command ChatCommand();

}  // namespace nosara::client
