// Mistakes of a caller become exceptions here, at the boundary. The kernels behind it are unchecked and noexcept.
//
// A message names the function and the argument, and says what was expected and what came:
//   check(n >= 0, "generate: n must be >= 0, got ", n);
// pybind11 turns std::invalid_argument into ValueError and std::runtime_error into RuntimeError.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace tipl {

// The parts joined into one text, as std::ostream writes them.
template <class... Parts>
std::string text(const Parts &...parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// For arguments with a wrong value: throws std::invalid_argument unless `ok`.
template <class... Parts>
void check(bool ok, const Parts &...parts) {
  if (!ok) throw std::invalid_argument(text(parts...));
}

// For calls that the state of the object, the machine or a file does not allow: throws std::runtime_error unless `ok`.
template <class... Parts>
void check_state(bool ok, const Parts &...parts) {
  if (!ok) throw std::runtime_error(text(parts...));
}

}  // namespace tipl
