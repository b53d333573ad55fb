#include "bind_cuda_sketch.h"

#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bind_device_array.h"
#include "bind_sketch.h"
#include "cuda/cuda_sketch.h"
#include "cuda/row_work.h"
#include "row_checks.h"

namespace tipl::cuda {
namespace {

// Rows on this device that another library has lent, or those of a NumPy array. p < 0: of any number of columns.
RowsArgument rows_argument(const char *where, const char *name, const py::object &object, py::ssize_t p, int device,
                           const Stream &stream) {
  const std::optional<DeviceTensor> tensor = borrowed(where, name, object, device, stream);
  if (!tensor) {
    const RowView view = row_view(where, name, object, p);
    return {view, py::reinterpret_borrow<py::array>(object).shape(1), object};
  }
  check_shape(where, name, tensor->shape, {{"n"}, {"p", p}});
  check(tensor->shape[1] == 1 || tensor->strides[1] == 1, where, ": ", name, " must have contiguous rows");
  return {{tensor->data, tensor->shape[0], tensor->strides[0], true}, tensor->shape[1], tensor->capsule};
}

struct Cuda {
  static RowsArgument rows(const RowSketch &sketch, const char *where, const char *name, const py::object &object,
                           py::ssize_t p) {
    const auto &math = static_cast<const CudaSketchMath &>(sketch.math());
    const OnDevice on(math.device());
    return rows_argument(where, name, object, p, math.device(), math.stream());
  }
};

std::unique_ptr<RowSketch> make_sketch(ptrdiff_t num_features, ptrdiff_t range_size, ptrdiff_t test_size, uint64_t seed,
                                       const py::object &origin, const py::object &directions, bool choose_origin,
                                       int device) {
  const SketchConfig config{num_features, range_size, test_size, seed, choose_origin};
  const SketchArrays arrays(config, origin, directions);
  const OnDevice on(device);
  return without_gil([&](Poll &poll) {
    return std::make_unique<RowSketch>(config, arrays.origin, arrays.directions,
                                       std::make_unique<CudaSketchMath>(config, arrays.directions, device, poll), poll);
  });
}

// Throws std::invalid_argument where a value of X is NaN or Inf.
void check_finite(RowWork &work, const char *where, const char *name, RowView x, int64_t first_row, ptrdiff_t p,
                  Poll &poll) {
  for_each_piece(x, [&](RowView piece, ptrdiff_t begin) {
    const std::vector<double> squares = work.squares(piece, nullptr, poll);
    for (ptrdiff_t i = 0; i < piece.count; ++i) {
      if (std::isfinite(squares[i])) continue;
      std::vector<float> row(p);
      work.copy_rows(piece.part(i, 1), row.data());
      check_row(where, name, row.data(), first_row + begin + i, p);
    }
  });
}

// p of an argument of rows, before there is work for it.
py::ssize_t columns_of(const char *where, const py::object &x) {
  if (!py::hasattr(x, "__dlpack__") || py::isinstance<py::array>(x)) {
    row_view(where, "X", x, -1);
    return py::reinterpret_borrow<py::array>(x).shape(1);
  }
  const py::tuple shape(x.attr("shape"));
  check(shape.size() == 2, where, ": X must have shape (n, p), got ", py::str(shape).cast<std::string>());
  return shape[1].cast<py::ssize_t>();
}

void bound_check_finite(const std::string &where, const py::object &x, int device, int64_t first_row) {
  const OnDevice on(device);
  const char *const name = where.c_str();
  const py::ssize_t p = columns_of(name, x);
  RowWork work(p);
  const RowsArgument rows = rows_argument(name, "X", x, p, device, work.stream());
  checked_first_row(name, first_row);
  without_gil([&](Poll &poll) { check_finite(work, name, "X", rows.view, first_row, p, poll); });
}

// (X - origin)(Y - origin)^T in float64, in the host's memory; without Y, of X with itself.
py::array_t<double> bound_products(const std::string &where, const py::object &x, const py::object &y,
                                   const py::object &origin, int device, int64_t first_row) {
  const OnDevice on(device);
  const char *const name = where.c_str();
  const py::ssize_t p = columns_of(name, x);
  RowWork work(p);
  const RowsArgument left = rows_argument(name, "X", x, p, device, work.stream());
  const RowsArgument right = y.is_none() ? left : rows_argument(name, "Y", y, p, device, work.stream());
  std::optional<py::array_t<float>> origin_array;
  if (!origin.is_none()) origin_array = checked_array<float>(name, "origin", origin, {{"p", p}});
  checked_first_row(name, first_row);
  const float *const zero = origin_array ? origin_array->data() : nullptr;
  py::array_t<double> out = new_array<double>({left.view.count, right.view.count});
  double *const out_data = out.mutable_data();
  without_gil([&](Poll &poll) {
    check_finite(work, name, "X", left.view, first_row, p, poll);
    if (zero != nullptr) check_finite(work, name, "origin", {zero, 1, p}, 0, p, poll);
    work.products(left.view, right.view, zero, y.is_none(), out_data, poll);
  });
  return out;
}

}  // namespace

void bind_sketch(py::module_ &m) {
  bind_row_sketch<Cuda>(m, "The sketch of the rows seen, on a CUDA device; tipl.StreamingSVD documents it.")
      .def(py::init(&make_sketch), py::kw_only(), py::arg("num_features"), py::arg("range_size"), py::arg("test_size"),
           py::arg("seed"), py::arg("origin"), py::arg("directions"), py::arg("choose_origin") = false,
           py::arg("device"))
      .def_property_readonly("device", [](const RowSketch &sketch) {
        return static_cast<const CudaSketchMath &>(sketch.math()).device();
      });
  m.def("check_finite", &bound_check_finite, py::arg("where"), py::arg("X"), py::arg("device"),
        py::arg("first_row") = 0);
  m.def("products", &bound_products, py::arg("where"), py::arg("X"), py::arg("Y"), py::arg("origin"), py::arg("device"),
        py::arg("first_row") = 0);
}

}  // namespace tipl::cuda
