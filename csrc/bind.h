// Shared by the bindings: checked access to NumPy arrays, never a copy, and calls without the GIL that Ctrl-C can stop.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "call.h"
#include "check.h"

namespace tipl {

namespace py = pybind11;

void bind_decoder(py::module_ &m);
void bind_gradient(py::module_ &m);
void bind_ppo(py::module_ &m);
void bind_refiner(py::module_ &m);
void bind_svd(py::module_ &m);

// ---- calls

// Releases the GIL for as long as this object lives.
//
// A daemon thread may ask for the GIL back while the interpreter shuts down. CPython then ends the thread: before 3.14
// by pthread_exit, which would unwind through noexcept frames and abort the process; from 3.14 on it lets the thread
// hang for ever. This class lets it hang in every version.
class WithoutGil {
 public:
  WithoutGil() : thread_(PyEval_SaveThread()) {}
  ~WithoutGil() {
    with_gil([] {});
  }
  WithoutGil(const WithoutGil &) = delete;
  WithoutGil &operator=(const WithoutGil &) = delete;

  // Runs pending signal handlers. Returns true, with the Python exception set, where one raised, as Ctrl-C does, and
  // in a child process that a handler has forked: the threads that share the work do not exist there.
  bool signal_raised();

 private:
  // Takes the GIL back, then does the work.
  template <class Work>
  void with_gil(const Work &work) noexcept {
    try {
      PyEval_RestoreThread(thread_);
      work();
    } catch (...) {  // pthread_exit
      hang();
    }
  }
  [[noreturn]] static void hang() noexcept;

  PyThreadState *thread_;
};

// Runs work(poll) without the GIL and returns its result. Throws what a signal handler raised meanwhile, also where the
// work was done before it could stop.
template <class Work>
auto without_gil(const Work &work) {
  try {
    WithoutGil gil;
    const Poll::Stop stop = [&] { return gil.signal_raised(); };
    Poll poll(stop);
    const auto finish = [&] {
      if (poll.was_stopped()) throw Interrupted();
    };
    if constexpr (std::is_void_v<decltype(work(poll))>) {
      work(poll);
      finish();
    } else {
      auto result = work(poll);
      finish();
      return result;
    }
  } catch (const Interrupted &) {
    throw py::error_already_set();
  }
}

// ---- arrays

// An expected dimension: its letter in messages, and its size, or -1 for any.
struct Dim {
  const char *name;
  py::ssize_t size = -1;
};

inline std::string letters(std::initializer_list<Dim> dims, bool with_sizes) {
  std::string out = "(";
  for (const Dim &dim : dims) {
    if (out.size() > 1) out += ", ";
    out += with_sizes && dim.size >= 0 ? std::to_string(dim.size) : dim.name;
  }
  return out + (dims.size() == 1 ? ",)" : ")");
}

inline std::string shape_text(const std::vector<py::ssize_t> &shape) {
  std::string out = "(";
  for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + (shape.size() == 1 ? ",)" : ")");
}

// Raises ValueError unless the shape is the expected one: "prefill: x must have shape (B, t, k) = (4, t, 16), got
// (4, 7, 12)".
inline void check_shape(const char *where, const char *name, const std::vector<py::ssize_t> &shape,
                        std::initializer_list<Dim> dims) {
  bool fits = shape.size() == dims.size();
  size_t axis = 0;
  for (const Dim &dim : dims) {
    fits = fits && (dim.size < 0 || shape[axis] == dim.size);
    ++axis;
  }
  if (fits) return;
  const std::string sizes = letters(dims, true), names = letters(dims, false);
  check(false, where, ": ", name, " must have shape ", names, sizes == names ? "" : " = " + sizes, ", got ",
        shape_text(shape));
}

// NumPy's name of a type. (Asking NumPy would run Python code.)
template <class T>
constexpr const char *dtype_name() {
  if constexpr (std::is_same_v<T, float>) return "float32";
  if constexpr (std::is_same_v<T, double>) return "float64";
  if constexpr (std::is_same_v<T, int32_t>) return "int32";
  if constexpr (std::is_same_v<T, int64_t>) return "int64";
}

// Returns `object` itself as an array of exactly T, C-contiguous and of this shape, never a copy. Raises TypeError
// where it is not an array of T, and ValueError for anything else.
template <class T>
py::array_t<T> checked_array(const char *where, const char *name, const py::handle &object,
                             std::initializer_list<Dim> dims) {
  constexpr const char *expected = dtype_name<T>();
  if (!py::isinstance<py::array>(object)) {
    throw py::type_error(text(where, ": ", name, " must be a NumPy array of ", expected, ", got ",
                              py::str(py::type::of(object).attr("__name__")).cast<std::string>()));
  }
  const auto array = py::reinterpret_borrow<py::array>(object);
  if (!py::isinstance<py::array_t<T>>(object)) {
    throw py::type_error(text(where, ": ", name, " must be a NumPy array of ", expected, ", got ",
                              py::str(array.dtype()).cast<std::string>()));
  }
  check_shape(where, name, {array.shape(), array.shape() + array.ndim()}, dims);
  check((array.flags() & py::array::c_style) != 0 && reinterpret_cast<uintptr_t>(array.data()) % alignof(T) == 0, where,
        ": ", name, " must be C-contiguous and aligned");
  return py::reinterpret_borrow<py::array_t<T>>(object);
}

// A new uninitialised array of this shape. Throws std::bad_alloc where the machine lacks the memory.
template <class T>
py::array_t<T> new_array(std::initializer_list<ptrdiff_t> shape) {
  double count = 1.0;
  for (const ptrdiff_t extent : shape) count *= static_cast<double>(extent);
  check_memory(count, sizeof(T));
  return py::array_t<T>(std::vector<py::ssize_t>(shape));
}

}  // namespace tipl
