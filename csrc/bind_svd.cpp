// The bindings of svd.h, rows.h and cpu/read_ahead.h.
#include <algorithm>
#include <cstdint>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bind.h"
#include "cpu/read_ahead.h"
#include "cpu/sketch_sums.h"
#include "rows.h"
#include "svd.h"

namespace tipl {
namespace {

// The rows of a float32 array (n, p) without a copy: each row must be contiguous, but the rows need not be adjacent.
// p < 0: any number of columns.
RowView row_view(const char *where, const char *name, const py::object &object, py::ssize_t p) {
  if (!py::isinstance<py::array_t<float>>(object)) {
    const py::object type =
        py::isinstance<py::array>(object) ? py::object(object.attr("dtype")) : py::type::of(object).attr("__name__");
    throw py::type_error(
        text(where, ": ", name, " must be a NumPy array of float32, got ", py::str(type).cast<std::string>()));
  }
  const auto x = py::reinterpret_borrow<py::array_t<float>>(object);
  check(x.ndim() == 2 && (p < 0 || x.shape(1) == p), where, ": ", name, " must have shape ",
        letters({{"n"}, {"p", p}}, true), ", got ", shape_text({x.shape(), x.shape() + x.ndim()}));
  constexpr py::ssize_t kSize = sizeof(float);
  const bool contiguous = x.size() == 0 || x.shape(1) == 1 || x.strides(1) == kSize;
  check(contiguous && x.strides(0) % kSize == 0 && reinterpret_cast<uintptr_t>(x.data()) % kSize == 0, where, ": ",
        name, " must have contiguous rows");
  return {x.data(), x.shape(0), x.strides(0) / kSize};
}

// Returns what work(poll) returns as rows (n, columns).
template <class Work>
py::array_t<float> rows_from(py::ssize_t columns, const Work &work) {
  auto rows = std::make_unique<std::vector<float>>(without_gil(work));
  const py::ssize_t count = std::ssize(*rows) / columns;
  const float *const data = rows->data();
  const py::capsule owner(rows.get(), [](void *vector) { delete static_cast<std::vector<float> *>(vector); });
  rows.release();
  return py::array_t<float>({count, columns}, data, owner);
}

// Returns a copy of numbers (rows, columns).
py::array_t<double> copy_of(const double *from, ptrdiff_t rows, ptrdiff_t columns) {
  py::array_t<double> out = new_array<double>({rows, columns});
  double *const to = out.mutable_data();
  without_gil([&](Poll &poll) {
    constexpr ptrdiff_t kRun = 1 << 20;
    for (ptrdiff_t begin = 0; begin < rows * columns; begin += kRun) {
      poll(0);
      std::copy_n(from + begin, std::min(kRun, rows * columns - begin), to + begin);
    }
  });
  return out;
}

// The number by which messages call the first row.
int64_t checked_first_row(const char *where, int64_t first_row) {
  check(0 <= first_row && first_row <= int64_t{1} << 62, where, ": first_row must lie in [0, 2**62], got ", first_row);
  return first_row;
}

std::unique_ptr<RowSketch> make_sketch(ptrdiff_t num_features, ptrdiff_t range_size, ptrdiff_t test_size, uint64_t seed,
                                       int num_threads, const py::object &origin, const py::object &directions,
                                       bool choose_origin) {
  std::optional<py::array_t<float>> origin_array, directions_array;
  if (!origin.is_none()) origin_array = checked_array<float>("RowSketch", "origin", origin, {{"p", num_features}});
  if (!directions.is_none()) {
    directions_array =
        checked_array<float>("RowSketch", "directions", directions, {{"l", range_size}, {"p", num_features}});
  }
  const float *const origin_data = origin_array ? origin_array->data() : nullptr;
  const float *const directions_data = directions_array ? directions_array->data() : nullptr;
  return without_gil([&](Poll &poll) {
    return std::make_unique<RowSketch>(SketchConfig{num_features, range_size, test_size, seed, choose_origin},
                                       origin_data, directions_data, num_threads, poll);
  });
}

void sketch_partial_fit(RowSketch &sketch, const py::object &x, int64_t first_row, bool all_or_none) {
  const RowView rows = row_view("partial_fit", "X", x, sketch.config().num_features);
  checked_first_row("partial_fit", first_row);
  without_gil([&](Poll &poll) { sketch.partial_fit(rows, first_row, all_or_none, poll); });
}

double sketch_check_rows(const RowSketch &sketch, const py::object &x, int64_t first_row, double before) {
  const RowView rows = row_view("partial_fit", "X", x, sketch.config().num_features);
  checked_first_row("partial_fit", first_row);
  return without_gil([&](Poll &poll) { return sketch.check_rows(rows, first_row, before, poll); });
}

void bound_partial_fit_together(const std::vector<RowSketch *> &sketches, const std::vector<ptrdiff_t> &starts,
                                const py::object &x, int64_t first_row, bool all_or_none) {
  const RowView rows = row_view("partial_fit", "X", x, -1);
  const py::ssize_t p = py::reinterpret_borrow<py::array>(x).shape(1);
  checked_first_row("partial_fit", first_row);
  check(sketches.size() == starts.size() && !sketches.empty(), "partial_fit: there must be a start for every sketch");
  for (size_t i = 0; i < sketches.size(); ++i) {
    check(sketches[i] != nullptr, "partial_fit: sketches must be of RowSketch, got None");
    const ptrdiff_t width = sketches[i]->config().num_features;
    check(0 <= starts[i] && starts[i] <= p - width, "partial_fit: X must have columns ", starts[i], " to ",
          static_cast<double>(starts[i]) + static_cast<double>(width), ", got ", p, " columns");
  }
  without_gil(
      [&](Poll &poll) { RowSketch::partial_fit_together(sketches, starts, rows, first_row, all_or_none, poll); });
}

py::array_t<float> sketch_apply(const RowSketch &sketch, const py::object &x) {
  const RowView rows = row_view("apply", "X", x, sketch.config().num_features);
  py::array_t<float> out = new_array<float>({rows.count, sketch.config().outputs() - 1});
  float *const out_data = out.mutable_data();
  without_gil([&](Poll &poll) { sketch.apply(rows, out_data, poll); });
  return out;
}

py::array_t<float> sketch_combine(RowSketch &sketch, const py::object &weights) {
  const auto array =
      checked_array<double>("combine", "weights", weights, {{"l + q + 1", sketch.config().outputs()}, {"r"}});
  const py::ssize_t r = array.shape(1);
  py::array_t<float> out = new_array<float>({r, sketch.config().num_features});
  const double *weight_data = array.data();
  float *out_data = out.mutable_data();
  without_gil([&](Poll &poll) { sketch.combine_co_range(weight_data, r, out_data, poll); });
  return out;
}

std::shared_ptr<const SketchSums> sums_of(RowSketch &sketch) {
  return without_gil([&](Poll &poll) { return sketch.sums(poll); });
}

py::array_t<double> sketch_gram(RowSketch &sketch) {
  const auto sums = sums_of(sketch);
  return copy_of(sums->gram.data(), sketch.config().outputs(), sketch.config().outputs());
}

py::array_t<double> sketch_co_range(RowSketch &sketch) {
  const auto sums = sums_of(sketch);
  return copy_of(sums->co_range.data(), sketch.config().outputs(), sketch.config().num_features);
}

// The sum (p) of d over all rows that are not pending.
py::array_t<double> sketch_row_sum(RowSketch &sketch) {
  const ptrdiff_t p = sketch.config().num_features;
  const auto sums = sums_of(sketch);
  return copy_of(sums->co_range.data() + (sketch.config().outputs() - 1) * p, 1, p).reshape({p});
}

py::array_t<float> sketch_origin(const RowSketch &sketch) {
  const std::vector<float> origin = sketch.origin();
  return py::array_t<float>(std::ssize(origin), origin.data());
}

py::array_t<float> sketch_exact_origin(const RowSketch &sketch) {
  const auto origin = without_gil([&](Poll &poll) { return sketch.exact_origin(poll); });
  return py::array_t<float>(std::ssize(origin), origin.data());
}

void sketch_restore(RowSketch &sketch, const py::object &co_range, const py::object &gram, double squares,
                    const py::object &range_rows, const py::object &pending) {
  const py::ssize_t p = sketch.config().num_features, l = sketch.config().range_size, L = sketch.config().outputs();
  const auto c = checked_array<double>("restore", "co_range", co_range, {{"l + q + 1", L}, {"p", p}});
  const auto g = checked_array<double>("restore", "gram", gram, {{"l + q + 1", L}, {"l + q + 1", L}});
  const auto y = checked_array<float>("restore", "range_rows", range_rows, {{"n"}, {"l", l}});
  const RowView rows = row_view("restore", "pending", pending, p);
  const double *const c_data = c.data(), *const g_data = g.data();
  const float *const y_data = y.data();
  const py::ssize_t count = y.shape(0);
  without_gil([&](Poll &poll) {
    SketchSums sums(sketch.config());
    for (ptrdiff_t i = 0; i < L; ++i) {
      poll(0);
      std::copy_n(c_data + i * p, p, sums.co_range.data() + i * p);
    }
    std::copy_n(g_data, L * L, sums.gram.data());
    sums.squares = squares;
    sums.rows = count;
    sums.range_rows.push_back(std::make_shared<const std::vector<float>>(y_data, y_data + count * l));
    sketch.restore(std::move(sums), rows, poll);
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
  py::class_<RowSketch>(m, "RowSketch", "The sketch of the rows seen; tipl.StreamingSVD documents it.")
      .def(py::init(&make_sketch), py::kw_only(), py::arg("num_features"), py::arg("range_size"), py::arg("test_size"),
           py::arg("seed"), py::arg("num_threads"), py::arg("origin"), py::arg("directions"),
           py::arg("choose_origin") = false)
      .def("partial_fit", &sketch_partial_fit, py::arg("X"), py::arg("first_row"), py::arg("all_or_none"))
      .def("check_rows", &sketch_check_rows, py::arg("X"), py::arg("first_row"), py::arg("before"))
      .def(
          "merge",
          [](RowSketch &sketch, RowSketch &other) { without_gil([&](Poll &poll) { sketch.merge(other, poll); }); },
          py::arg("other"))
      .def("settle", [](RowSketch &sketch) { without_gil([&](Poll &poll) { sketch.settle(poll); }); })
      .def(
          "snapshot",
          [](RowSketch &sketch, bool settled) {
            return without_gil([&](Poll &poll) { return sketch.snapshot(settled, poll); });
          },
          py::arg("settled") = true)
      .def("apply", &sketch_apply, py::arg("X"))
      .def("exact_rows",
           [](const RowSketch &sketch) {
             return rows_from(sketch.config().num_features, [&](Poll &poll) { return sketch.exact_rows(poll); });
           })
      .def("exact_origin", &sketch_exact_origin)
      .def("range_rows",
           [](RowSketch &sketch) {
             return rows_from(sketch.config().range_size, [&](Poll &poll) { return sketch.range_rows(poll); });
           })
      .def("combine", &sketch_combine, py::arg("weights"))
      .def("num_rows", &RowSketch::num_rows)
      .def("restore", &sketch_restore, py::kw_only(), py::arg("co_range"), py::arg("gram"), py::arg("squares"),
           py::arg("range_rows"), py::arg("pending"))
      .def_property_readonly("gram", &sketch_gram)
      .def_property_readonly("co_range", &sketch_co_range)
      .def_property_readonly("row_sum", &sketch_row_sum)
      .def_property_readonly("squares", [](RowSketch &sketch) { return sums_of(sketch)->squares; })
      .def_property_readonly("pending",
                             [](const RowSketch &sketch) {
                               return rows_from(sketch.config().num_features,
                                                [&](Poll &poll) { return sketch.pending(poll); });
                             })
      .def_property_readonly("directions",
                             [](const RowSketch &sketch) {
                               return rows_from(sketch.config().num_features,
                                                [&](Poll &poll) { return sketch.directions(poll); });
                             })
      .def_property_readonly("origin", &sketch_origin)
      .def_property_readonly("num_features", [](const RowSketch &sketch) { return sketch.config().num_features; })
      .def_property_readonly("exact", &RowSketch::exact)
      .def_property_readonly("directed", &RowSketch::directed)
      .def_property_readonly("range_size", [](const RowSketch &sketch) { return sketch.config().range_size; })
      .def_property_readonly("test_size", [](const RowSketch &sketch) { return sketch.config().test_size; });
  py::class_<ReadAhead>(m, "ReadAhead", "Reads a C-contiguous memory-mapped array from disk before it is used.")
      .def(py::init([](const py::array &x) {
             check((x.flags() & py::array::c_style) != 0, "ReadAhead: X must be C-contiguous");
             return std::make_unique<ReadAhead>(x.data(), x.nbytes());
           }),
           py::arg("X"), py::keep_alive<1, 2>())
      .def("want", &ReadAhead::want, py::arg("bytes"));
  m.def("partial_fit_together", &bound_partial_fit_together, py::arg("sketches"), py::arg("starts"), py::arg("X"),
        py::arg("first_row"), py::arg("all_or_none"),
        "Each sketch takes its columns of all rows of X, or no sketch takes any.");
  m.def("check_finite", &bound_check_finite, py::arg("where"), py::arg("X"), py::arg("num_threads"),
        py::arg("first_row") = 0);
  m.def("products", &bound_products, py::arg("where"), py::arg("X"), py::arg("Y"), py::arg("origin"),
        py::arg("num_threads"), py::arg("first_row") = 0);
  m.def("combine", &bound_combine, py::arg("X"), py::arg("weights"), py::arg("num_threads"));
}

}  // namespace tipl
