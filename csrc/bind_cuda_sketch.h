// The bindings of sketches and rows on CUDA devices.
#pragma once

#include "bind.h"

namespace tipl::cuda {

void bind_sketch(py::module_ &m);

}  // namespace tipl::cuda
