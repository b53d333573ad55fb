// Calls of the bindings without the GIL.
#include <unistd.h>

#include <cstdint>

#include "bind.h"

namespace tipl {

bool WithoutGil::signal_raised() {
  bool raised = false;
  const uint32_t depth = fork_depth();
  with_gil([&] {
    raised = PyErr_CheckSignals() != 0;
    if (!raised && fork_depth() != depth) {
      PyErr_SetString(PyExc_RuntimeError, "a signal handler forked this process in the middle of a call to the engine");
      raised = true;
    }
    thread_ = PyEval_SaveThread();
  });
  return raised;
}

void WithoutGil::hang() noexcept {
  for (;;) pause();
}

}  // namespace tipl
