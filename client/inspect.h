// `nosara models` and `nosara tokenize`: what a router serves, and how it reads a text.
#pragma once

#include "client/command.h"

namespace nosara::client {

Command ModelsCommand();
Command TokenizeCommand();

}  // namespace nosara::client
