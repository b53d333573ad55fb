// What the bindings of the sketches of all devices share.
#pragma once

#include <cstdint>
#include <iterator>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bind.h"
#include "rows.h"
#include "svd.h"

namespace tipl {

// The rows of a float32 array (n, p) without a copy: each row must be contiguous, but the rows need not be adjacent.
// p < 0: any number of columns.
inline RowView row_view(const char *where, const char *name, const py::object &object, py::ssize_t p) {
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

// The number by which messages call the first row.
inline int64_t checked_first_row(const char *where, int64_t first_row) {
  check(0 <= first_row && first_row <= int64_t{1} << 62, where, ": first_row must lie in [0, 2**62], got ", first_row);
  return first_row;
}

// Rows (n, p) that a call takes, for as long as this lives.
struct RowsArgument {
  RowView view;
  py::ssize_t columns;  // p
  py::object keeper;    // keeps them alive
};

// The arrays that a sketch is made with.
struct SketchArrays {
  SketchArrays(const SketchConfig &config, const py::object &origin_object, const py::object &directions_object) {
    const py::ssize_t p = config.num_features, l = config.range_size;
    if (!origin_object.is_none()) {
      origin_ = checked_array<float>("RowSketch", "origin", origin_object, {{"p", p}});
      origin = origin_.data();
    }
    if (!directions_object.is_none()) {
      directions_ = checked_array<float>("RowSketch", "directions", directions_object, {{"l", l}, {"p", p}});
      directions = directions_.data();
    }
  }

  const float *origin = nullptr, *directions = nullptr;

 private:
  py::array_t<float> origin_, directions_;
};

// Rows (count, p) of C, from `first` on.
inline py::array_t<double> co_range(RowSketch &sketch, py::ssize_t first, py::ssize_t count) {
  py::array_t<double> out = new_array<double>({count, sketch.config().num_features});
  double *const out_data = out.mutable_data();
  without_gil([&](Poll &poll) { sketch.read_co_range(first, count, out_data, poll); });
  return out;
}

// Binds RowSketch but for its constructor. Device::rows(sketch, where, name, object, p) takes an argument of rows; p <
// 0: of any number of columns.
template <class Device>
py::class_<RowSketch> bind_row_sketch(py::module_ &m, const char *doc) {
  const auto rows_of = [](const RowSketch &sketch, const char *where, const char *name, const py::object &object) {
    return Device::rows(sketch, where, name, object, sketch.config().num_features);
  };
  py::class_<RowSketch> bound(m, "RowSketch", py::module_local(), doc);
  bound
      .def(
          "partial_fit",
          [rows_of](RowSketch &sketch, const py::object &x, int64_t first_row, bool all_or_none) {
            const RowsArgument rows = rows_of(sketch, "partial_fit", "X", x);
            checked_first_row("partial_fit", first_row);
            without_gil([&](Poll &poll) { sketch.partial_fit(rows.view, first_row, all_or_none, poll); });
          },
          py::arg("X"), py::arg("first_row"), py::arg("all_or_none"))
      .def(
          "check_rows",
          [rows_of](const RowSketch &sketch, const py::object &x, int64_t first_row, double before) {
            const RowsArgument rows = rows_of(sketch, "partial_fit", "X", x);
            checked_first_row("partial_fit", first_row);
            return without_gil([&](Poll &poll) { return sketch.check_rows(rows.view, first_row, before, poll); });
          },
          py::arg("X"), py::arg("first_row"), py::arg("before"))
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
      .def(
          "apply",
          [rows_of](const RowSketch &sketch, const py::object &x) {
            const RowsArgument rows = rows_of(sketch, "apply", "X", x);
            py::array_t<float> out = new_array<float>({rows.view.count, sketch.config().outputs() - 1});
            float *const out_data = out.mutable_data();
            without_gil([&](Poll &poll) { sketch.apply(rows.view, out_data, poll); });
            return out;
          },
          py::arg("X"))
      .def("exact_rows",
           [](const RowSketch &sketch) {
             return rows_from(sketch.config().num_features, [&](Poll &poll) { return sketch.exact_rows(poll); });
           })
      .def("exact_origin",
           [](const RowSketch &sketch) {
             const auto origin = without_gil([&](Poll &poll) { return sketch.exact_origin(poll); });
             return py::array_t<float>(std::ssize(origin), origin.data());
           })
      .def("range_rows",
           [](RowSketch &sketch) {
             return rows_from(sketch.config().range_size, [&](Poll &poll) { return sketch.range_rows(poll); });
           })
      .def(
          "combine",
          [](RowSketch &sketch, const py::object &weights) {
            const auto array =
                checked_array<double>("combine", "weights", weights, {{"l + q + 1", sketch.config().outputs()}, {"r"}});
            const py::ssize_t r = array.shape(1);
            py::array_t<float> out = new_array<float>({r, sketch.config().num_features});
            const double *weight_data = array.data();
            float *out_data = out.mutable_data();
            without_gil([&](Poll &poll) { sketch.combine_co_range(weight_data, r, out_data, poll); });
            return out;
          },
          py::arg("weights"))
      .def("num_rows", &RowSketch::num_rows)
      .def(
          "restore",
          [](RowSketch &sketch, const py::object &co_range, const py::object &gram, double squares,
             const py::object &range_rows, const py::object &pending) {
            const py::ssize_t p = sketch.config().num_features, l = sketch.config().range_size,
                              L = sketch.config().outputs();
            const auto c = checked_array<double>("restore", "co_range", co_range, {{"l + q + 1", L}, {"p", p}});
            const auto g = checked_array<double>("restore", "gram", gram, {{"l + q + 1", L}, {"l + q + 1", L}});
            const auto y = checked_array<float>("restore", "range_rows", range_rows, {{"n"}, {"l", l}});
            const RowView rows = row_view("restore", "pending", pending, p);
            const SavedSums saved{c.data(), g.data(), squares, y.data(), y.shape(0)};
            without_gil([&](Poll &poll) { sketch.restore(saved, rows, poll); });
          },
          py::kw_only(), py::arg("co_range"), py::arg("gram"), py::arg("squares"), py::arg("range_rows"),
          py::arg("pending"))
      .def_property_readonly("gram",
                             [](RowSketch &sketch) {
                               const py::ssize_t L = sketch.config().outputs();
                               const auto gram = without_gil([&](Poll &poll) { return sketch.gram(poll); });
                               return py::array_t<double>({L, L}, gram.data());
                             })
      .def_property_readonly("co_range",
                             [](RowSketch &sketch) { return co_range(sketch, 0, sketch.config().outputs()); })
      .def_property_readonly("row_sum",  // the sum (p) of d over all rows that are not pending
                             [](RowSketch &sketch) {
                               const py::ssize_t last = sketch.config().outputs() - 1;
                               return co_range(sketch, last, 1).reshape({sketch.config().num_features});
                             })
      .def_property_readonly(
          "squares", [](RowSketch &sketch) { return without_gil([&](Poll &poll) { return sketch.squares(poll); }); })
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
      .def_property_readonly("origin",
                             [](const RowSketch &sketch) {
                               const std::vector<float> origin = sketch.origin();
                               return py::array_t<float>(std::ssize(origin), origin.data());
                             })
      .def_property_readonly("num_features", [](const RowSketch &sketch) { return sketch.config().num_features; })
      .def_property_readonly("exact", &RowSketch::exact)
      .def_property_readonly("directed", &RowSketch::directed)
      .def_property_readonly("range_size", [](const RowSketch &sketch) { return sketch.config().range_size; })
      .def_property_readonly("test_size", [](const RowSketch &sketch) { return sketch.config().test_size; });
  m.def(
      "partial_fit_together",
      [](const std::vector<RowSketch *> &sketches, const std::vector<ptrdiff_t> &starts, const py::object &x,
         int64_t first_row, bool all_or_none) {
        check(sketches.size() == starts.size() && !sketches.empty(),
              "partial_fit: there must be a start for every sketch");
        for (const RowSketch *sketch : sketches) {
          check(sketch != nullptr, "partial_fit: sketches must be of RowSketch, got None");
        }
        const RowsArgument rows = Device::rows(*sketches[0], "partial_fit", "X", x, -1);
        checked_first_row("partial_fit", first_row);
        for (size_t i = 0; i < sketches.size(); ++i) {
          const ptrdiff_t width = sketches[i]->config().num_features;
          check(0 <= starts[i] && starts[i] <= rows.columns - width, "partial_fit: X must have columns ", starts[i],
                " to ", static_cast<double>(starts[i]) + static_cast<double>(width), ", got ", rows.columns,
                " columns");
        }
        without_gil([&](Poll &poll) {
          RowSketch::partial_fit_together(sketches, starts, rows.view, first_row, all_or_none, poll);
        });
      },
      py::arg("sketches"), py::arg("starts"), py::arg("X"), py::arg("first_row"), py::arg("all_or_none"),
      "Each sketch takes its columns of all rows of X, or no sketch takes any.");
  return bound;
}

}  // namespace tipl
