// The bindings of svd.h, rows.h and cpu/read_ahead.h.
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "bind_sketch.h"
#include "cpu/cpu_sketch.h"
#include "cpu/read_ahead.h"
#include "rows.h"
#include "svd.h"

namespace tipl {
namespace {

struct Cpu {
  static RowsArgument rows(const RowSketch &, const char *where, const char *name, const py::object &object,
                           py::ssize_t p) {
    const RowView view = row_view(where, name, object, p);
    return {view, py::reinterpret_borrow<py::array>(object).shape(1), object};
  }
};

std::unique_ptr<RowSketch> make_sketch(ptrdiff_t num_features, ptrdiff_t range_size, ptrdiff_t test_size, uint64_t seed,
                                       int num_threads, const py::object &origin, const py::object &directions,
                                       bool choose_origin) {
  const SketchConfig config{num_features, range_size, test_size, seed, choose_origin};
  const SketchArrays arrays(config, origin, directions);
  return without_gil([&](Poll &poll) {
    return std::make_unique<RowSketch>(config, arrays.origin, arrays.directions,
                                       std::make_unique<CpuSketchMath>(config, arrays.directions, num_threads, poll),
                                       poll);
  });
}

void bound_check_finite(const std::string &where, const py::object &x, int num_threads, int64_t first_row) {
  const RowView rows = row_view(where.c_str(), "X", x, -1);
  const py::ssize_t p = py::reinterpret_borrow<py::array>(x).shape(1);
  checked_first_row(where.c_str(), first_row);
  without_gil([&](Poll &poll) { check_finite_rows(where.c_str(), rows, first_row, p, num_threads, poll); });
}

// (X - origin)(Y - origin)^T in float64; without Y, of X with itself.
py::array_t<double> bound_products(const std::string &where, const py::object &x, const py::object &y,
                                   const py::object &origin, int num_threads, int64_t first_row) {
  const char *const name = where.c_str();
  const RowView left = row_view(name, "X", x, -1);
  const py::ssize_t p = py::reinterpret_borrow<py::array>(x).shape(1);
  const RowView right = y.is_none() ? left : row_view(name, "Y", y, p);
  std::optional<py::array_t<float>> origin_array;
  if (!origin.is_none()) origin_array = checked_array<float>(name, "origin", origin, {{"p", p}});
  checked_first_row(name, first_row);
  const float *origin_data = origin_array ? origin_array->data() : nullptr;
  py::array_t<double> out = new_array<double>({left.count, right.count});
  double *out_data = out.mutable_data();
  without_gil([&](Poll &poll) {
    products(name, left, first_row, right, origin_data, p, y.is_none(), out_data, num_threads, poll);
  });
  return out;
}

// weights^T X, summed in float64 and rounded to float32.
py::array_t<float> bound_combine(const py::object &x, const py::object &weights, int num_threads) {
  const RowView rows = row_view("combine", "X", x, -1);
  const py::ssize_t p = py::reinterpret_borrow<py::array>(x).shape(1);
  const auto array = checked_array<double>("combine", "weights", weights, {{"n", rows.count}, {"r"}});
  const py::ssize_t r = array.shape(1);
  py::array_t<float> out = new_array<float>({r, p});
  const double *weight_data = array.data();
  float *out_data = out.mutable_data();
  without_gil([&](Poll &poll) { combine(rows, p, weight_data, r, out_data, num_threads, poll); });
  return out;
}

}  // namespace

void bind_svd(py::module_ &m) {
  bind_row_sketch<Cpu>(m, "The sketch of the rows seen; tipl.StreamingSVD documents it.")
      .def(py::init(&make_sketch), py::kw_only(), py::arg("num_features"), py::arg("range_size"), py::arg("test_size"),
           py::arg("seed"), py::arg("num_threads"), py::arg("origin"), py::arg("directions"),
           py::arg("choose_origin") = false);
  py::class_<ReadAhead>(m, "ReadAhead", "Reads a C-contiguous memory-mapped array from disk before it is used.")
      .def(py::init([](const py::array &x) {
             check((x.flags() & py::array::c_style) != 0, "ReadAhead: X must be C-contiguous");
             return std::make_unique<ReadAhead>(x.data(), x.nbytes());
           }),
           py::arg("X"), py::keep_alive<1, 2>())
      .def("want", &ReadAhead::want, py::arg("bytes"));
  m.def("check_finite", &bound_check_finite, py::arg("where"), py::arg("X"), py::arg("num_threads"),
        py::arg("first_row") = 0);
  m.def("products", &bound_products, py::arg("where"), py::arg("X"), py::arg("Y"), py::arg("origin"),
        py::arg("num_threads"), py::arg("first_row") = 0);
  m.def("combine", &bound_combine, py::arg("X"), py::arg("weights"), py::arg("num_threads"));
}

}  // namespace tipl
