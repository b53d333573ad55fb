// A caller's mistakes become exceptions, once, at the boundary; what lies behind it is unchecked and noexcept.
//
// The text names the function, the argument, what was expected and what came:
//   check(n >= 0, "generate: n must be >= 0, got ", n);
// bind.cpp turns std::invalid_argument into ValueError and std::runtime_error into RuntimeError.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace tipl {

// The parts written one after the other, as std::ostream writes them.
template <class... Parts>
std::string text(const Parts &...parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// A wrong value of an argument: std::invalid_argument unless `ok`.
template <class... Parts>
void check(bool ok, const Parts &...parts) {
  if (!ok) throw std::invalid_argument(text(parts...));
}

// A call that the object's state, the machine or a file does not allow: std::runtime_error unless `ok`.
template <class... Parts>
void check_state(bool ok, const Parts &...parts) {
  if (!ok) throw std::runtime_error(text(parts...));
}

}  // namespace tipl
