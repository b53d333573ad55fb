// The only file that knows Python: checks arrays, takes pointers, releases the GIL, calls the engine.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "check.h"
#include "decode.h"
#include "isa.h"
#include "parallel.h"
#include "policy.h"
#include "ppo.h"
#include "read_ahead.h"
#include "rng.h"
#include "svd.h"

namespace py = pybind11;

namespace tipl {
namespace {

// ---- arrays

// One expected dimension: its letter in messages, and its size where that is fixed.
struct Dim {
  const char *name;
  py::ssize_t size = -1;
};

std::string letters(std::initializer_list<Dim> dims, bool with_sizes) {
  std::string out = "(";
  for (const Dim &dim : dims) {
    if (out.size() > 1) out += ", ";
    out += with_sizes && dim.size >= 0 ? std::to_string(dim.size) : dim.name;
  }
  return out + (dims.size() == 1 ? ",)" : ")");
}

std::string shape_of(const py::array &array) {
  std::string out = "(";
  for (py::ssize_t i = 0; i < array.ndim(); ++i) out += (i ? ", " : "") + std::to_string(array.shape(i));
  return out + (array.ndim() == 1 ? ",)" : ")");
}

// `object` as an array of exactly T, C-contiguous, of this shape; never a copy. TypeError where it is not an array of
// T, ValueError otherwise: "prefill: x must have shape (B, t, k) = (4, t, 16), got (4, 7, 12)".
template <class T>
py::array_t<T> checked_array(const char *where, const char *name, const py::handle &object,
                             std::initializer_list<Dim> dims) {
  const auto expected = py::str(py::dtype::of<T>()).template cast<std::string>();
  if (!py::isinstance<py::array>(object)) {
    throw py::type_error(text(where, ": ", name, " must be a NumPy array of ", expected, ", got ",
                              py::str(py::type::of(object).attr("__name__")).cast<std::string>()));
  }
  const auto array = py::reinterpret_borrow<py::array>(object);
  if (!py::isinstance<py::array_t<T>>(object)) {
    throw py::type_error(text(where, ": ", name, " must be a NumPy array of ", expected, ", got ",
                              py::str(array.dtype()).cast<std::string>()));
  }
  bool fits = array.ndim() == static_cast<py::ssize_t>(dims.size());
  py::ssize_t axis = 0;
  for (const Dim &dim : dims) {
    fits = fits && (dim.size < 0 || array.shape(axis) == dim.size);
    ++axis;
  }
  const std::string sizes = letters(dims, true), names = letters(dims, false);
  check(fits, where, ": ", name, " must have shape ", names, sizes == names ? "" : " = " + sizes, ", got ",
        shape_of(array));
  check((array.flags() & py::array::c_style) != 0 && reinterpret_cast<uintptr_t>(array.data()) % alignof(T) == 0, where,
        ": ", name, " must be C-contiguous and aligned");
  return py::reinterpret_borrow<py::array_t<T>>(object);
}

// ---- engine: instruction set, random numbers, threads

// The rank that ran each of `items`; an item of `fail_at` throws on its thread instead. For the pool's tests.
py::array_t<int32_t> pool_owners(ThreadPool &pool, int items, const std::vector<ptrdiff_t> &fail_at) {
  py::array_t<int32_t> owners(items);
  int32_t *owner = owners.mutable_data();
  {
    py::gil_scoped_release release;
    pool.run([&](int rank) {
      const Range mine = share(items, rank, pool.size());
      for (ptrdiff_t item = mine.begin; item < mine.end; ++item) {
        const bool fails = std::find(fail_at.begin(), fail_at.end(), item) != fail_at.end();
        check_state(!fails, "owners: item ", item, " failed on rank ", rank);
        owner[item] = rank;
      }
    });
  }
  return owners;
}

// True where no rank ever passed one of `rounds` barriers before the others had reached it. For the pool's tests.
bool pool_barriers_hold(ThreadPool &pool, int rounds) {
  py::gil_scoped_release release;
  std::vector<int> reached(pool.size());  // each written by its rank before a barrier, read by all after it
  std::atomic<bool> hold = true;
  pool.run([&](int rank) noexcept {
    for (int round = 1; round <= rounds; ++round) {
      reached[rank] = round;
      pool.barrier(rank);
      for (const int other : reached) {
        if (other != round) hold = false;
      }
      pool.barrier(rank);
    }
  });
  return hold;
}

void bind_engine(py::module_ &m) {
  m.def(
      "isa", [] { return kernels().isa; },
      "Instruction set of the kernels in use: baseline, avx2, avx512 or avx512bf16.");
  m.def("lanes", [] { return kernels().lanes; }, "Floats in one register of that instruction set.");
  m.def("choose_isa", &choose_isa, py::arg("name"), py::arg("supported"),
        "The instruction set that TIPL_ISA=name (None: unset) picks on a CPU that supports these, worst first.");
  m.def("available_cpus", &available_cpus, "Cores that this process may use.");
  m.def("philox4x32", &philox4x32, py::arg("counter"), py::arg("key"), "Four words of Philox4x32-10.");
  m.def("normal4", &normal4, py::arg("seed"), py::arg("stream"), py::arg("index"),
        "Four standard normals: block `index` of a stream.");

  py::class_<ThreadPool>(m, "ThreadPool", "The engine's thread pool, as its tests see it.")
      .def(py::init<ptrdiff_t>(), py::arg("num_threads"))
      .def_property_readonly("size", &ThreadPool::size)
      .def("owners", &pool_owners, py::arg("items"), py::arg("fail_at") = std::vector<ptrdiff_t>(),
           "The rank that ran each item, (items,) int32; the items of `fail_at` throw on their threads.")
      .def("barriers_hold", &pool_barriers_hold, py::arg("rounds"),
           "Whether no rank ever passed a barrier before all had reached it.");
}

// ---- decoder

// Runs pending signal handlers; true where one raised, as Ctrl-C does. The exception is then set.
bool signal_raised() {
  py::gil_scoped_acquire acquire;
  return PyErr_CheckSignals() != 0;
}

Precision precision_of(const std::string &name) {
  if (name == "bfloat16") return Precision::kBfloat16;
  return name == "int8" ? Precision::kInt8 : Precision::kFloat32;
}

std::unique_ptr<Decoder> make_decoder(const DecoderConfig &config, const py::dict &weights,
                                      const DecoderOptions &options) {
  const std::vector<TensorSpec> specs = tensor_specs(config);
  std::vector<const float *> tensors;
  for (const TensorSpec &spec : specs) {
    check(weights.contains(spec.name), "Decoder: weights lack '", spec.name, "'");
    const bool matrix = spec.shape.size() == 2;
    const auto array = matrix ? checked_array<float>("Decoder", spec.name.c_str(), weights[spec.name.c_str()],
                                                     {{"out", spec.shape[0]}, {"in", spec.shape[1]}})
                              : checked_array<float>("Decoder", spec.name.c_str(), weights[spec.name.c_str()],
                                                     {{"out", spec.shape[0]}});
    tensors.push_back(array.data());  // `weights` holds the array
  }
  check(weights.size() == specs.size(), "Decoder: weights must be ", specs.size(), " tensors, got ", weights.size());
  py::gil_scoped_release release;
  return std::make_unique<Decoder>(config, tensors, options);
}

py::array_t<float> prefill(Decoder &decoder, const py::object &x, const py::object &lengths) {
  const py::ssize_t B = decoder.batch_size(), k = decoder.config().n_components;
  const auto x_array = checked_array<float>("prefill", "x", x, {{"B", B}, {"t"}, {"k", k}});
  std::optional<py::array_t<int64_t>> lengths_array;
  if (!lengths.is_none()) lengths_array = checked_array<int64_t>("prefill", "lengths", lengths, {{"B", B}});
  py::array_t<float> y({B, k});
  const int64_t *lengths_data = lengths_array ? lengths_array->data() : nullptr;
  const float *x_data = x_array.data();
  const py::ssize_t t = x_array.shape(1);
  float *y_data = y.mutable_data();
  bool done;
  {
    py::gil_scoped_release release;
    done = decoder.prefill(x_data, t, lengths_data, y_data, signal_raised);
  }
  if (!done) throw py::error_already_set();
  return y;
}

py::array_t<float> step(Decoder &decoder, const py::object &x) {
  const py::ssize_t B = decoder.batch_size(), k = decoder.config().n_components;
  const auto x_array = checked_array<float>("step", "x", x, {{"B", B}, {"k", k}});
  py::array_t<float> y({B, k});
  const float *x_data = x_array.data();
  float *y_data = y.mutable_data();
  {
    py::gil_scoped_release release;
    decoder.step(x_data, y_data);
  }
  return y;
}

// n is int64 (B,). Rows of y that a sequence did not ask for are NaN.
py::array_t<float> generate(Decoder &decoder, const py::object &n) {
  const py::ssize_t B = decoder.batch_size(), k = decoder.config().n_components;
  const auto n_array = checked_array<int64_t>("generate", "n", n, {{"B", B}});
  const std::vector<int64_t> steps(n_array.data(), n_array.data() + B);
  // Decoder::generate refuses whatever does not fit.
  const auto most = std::clamp<int64_t>(*std::max_element(steps.begin(), steps.end()), 0, decoder.max_len());
  py::array_t<float> y({B, static_cast<py::ssize_t>(most), k});
  float *y_data = y.mutable_data();
  bool done;
  {
    py::gil_scoped_release release;
    for (py::ssize_t b = 0; b < B; ++b) {
      const int64_t own = std::clamp<int64_t>(steps[b], 0, most);
      std::fill(y_data + (b * most + own) * k, y_data + (b + 1) * most * k, std::numeric_limits<float>::quiet_NaN());
    }
    done = decoder.generate(steps, y_data, signal_raised);
  }
  if (!done) throw py::error_already_set();
  return y;
}

void bind_decoder(py::module_ &m) {
  py::class_<Decoder>(m, "Decoder", "The forecaster over a KV cache; tipl.Decoder documents it.")
      .def(
          py::init([](int n_components, int n_layer, int n_head, int d_model, int d_ff, int max_len, float diff_scale,
                      float out_scale, const py::dict &weights, const std::string &dtype,
                      const std::string &cache_dtype, ptrdiff_t batch_size, ptrdiff_t cache_len,
                      ptrdiff_t num_threads) {
            return make_decoder({n_components, n_layer, n_head, d_model, d_ff, max_len, diff_scale, out_scale}, weights,
                                {precision_of(dtype), precision_of(cache_dtype), batch_size, cache_len, num_threads});
          }),
          py::kw_only(), py::arg("n_components"), py::arg("n_layer"), py::arg("n_head"), py::arg("d_model"),
          py::arg("d_ff"), py::arg("max_len"), py::arg("diff_scale"), py::arg("out_scale"), py::arg("weights"),
          py::arg("dtype"), py::arg("cache_dtype"), py::arg("batch_size"), py::arg("cache_len"), py::arg("num_threads"))
      .def("prefill", &prefill, py::arg("x"), py::arg("lengths") = py::none())
      .def("step", &step, py::arg("x"))
      .def("generate", &generate, py::arg("n"))
      .def("reset", &Decoder::reset)
      .def_property_readonly("position",
                             [](const Decoder &decoder) {
                               const std::vector<int64_t> position = decoder.position();
                               return py::array_t<int64_t>(std::ssize(position), position.data());
                             })
      .def_property_readonly("batch_size", &Decoder::batch_size)
      .def_property_readonly("max_len", &Decoder::max_len)
      .def_property_readonly("num_threads", &Decoder::num_threads);
}

// ---- Temporal SVD

// The rows of a float32 array (n, p), each contiguous, wherever they lie; p < 0: any number of columns.
RowView row_view(const char *where, const char *name, const py::object &object, py::ssize_t p) {
  if (!py::isinstance<py::array_t<float>>(object)) {
    const py::object type =
        py::isinstance<py::array>(object) ? py::object(object.attr("dtype")) : py::type::of(object).attr("__name__");
    throw py::type_error(
        text(where, ": ", name, " must be a NumPy array of float32, got ", py::str(type).cast<std::string>()));
  }
  const auto x = py::reinterpret_borrow<py::array_t<float>>(object);
  check(x.ndim() == 2 && (p < 0 || x.shape(1) == p), where, ": ", name, " must have shape ",
        letters({{"n"}, {"p", p}}, true), ", got ", shape_of(x));
  constexpr py::ssize_t kSize = sizeof(float);
  const bool contiguous = x.size() == 0 || x.shape(1) == 1 || x.strides(1) == kSize;
  check(contiguous && x.strides(0) % kSize == 0 && reinterpret_cast<uintptr_t>(x.data()) % kSize == 0, where, ": ",
        name, " must have contiguous rows");
  return {x.data(), x.shape(0), x.strides(0) / kSize};
}

// The rows (n, columns) that `work` returns, which runs without the GIL.
template <class Work>
py::array_t<float> rows_from(py::ssize_t columns, const Work &work) {
  auto *const rows = [&] {
    py::gil_scoped_release release;
    return new std::vector<float>(work());
  }();
  const py::capsule owner(rows, [](void *vector) { delete static_cast<std::vector<float> *>(vector); });
  return py::array_t<float>({std::ssize(*rows) / columns, columns}, rows->data(), owner);
}

std::unique_ptr<RowSketch> make_sketch(ptrdiff_t num_features, ptrdiff_t range_size, ptrdiff_t test_size, uint64_t seed,
                                       int num_threads, const py::object &origin, const py::object &directions) {
  std::optional<py::array_t<float>> origin_array, directions_array;
  if (!origin.is_none()) origin_array = checked_array<float>("RowSketch", "origin", origin, {{"p", num_features}});
  if (!directions.is_none()) {
    directions_array =
        checked_array<float>("RowSketch", "directions", directions, {{"l", range_size}, {"p", num_features}});
  }
  const float *const origin_data = origin_array ? origin_array->data() : nullptr;
  const float *const directions_data = directions_array ? directions_array->data() : nullptr;
  py::gil_scoped_release release;
  return std::make_unique<RowSketch>(SketchConfig{num_features, range_size, test_size, seed}, origin_data,
                                     directions_data, num_threads);
}

void sketch_partial_fit(RowSketch &sketch, const py::object &x, int64_t first_row, bool all_or_none) {
  const RowView rows = row_view("partial_fit", "X", x, sketch.config().num_features);
  bool done;
  {
    py::gil_scoped_release release;
    done = sketch.partial_fit(rows, first_row, all_or_none, signal_raised);
  }
  if (!done) throw py::error_already_set();
}

py::array_t<float> sketch_apply(const RowSketch &sketch, const py::object &x) {
  const RowView rows = row_view("apply", "X", x, sketch.config().num_features);
  return rows_from(sketch.outputs() - 1, [&] { return sketch.apply(rows); });
}

py::array_t<float> sketch_exact_rows(const RowSketch &sketch) {
  return rows_from(sketch.config().num_features, [&] { return sketch.exact_rows(); });
}

py::array_t<float> sketch_range_rows(RowSketch &sketch) {
  return rows_from(sketch.config().range_size, [&] { return sketch.range_rows(); });
}

py::array_t<float> sketch_combine(const RowSketch &sketch, const py::object &weights) {
  const auto array = checked_array<double>("combine", "weights", weights, {{"l + q + 1", sketch.outputs()}, {"r"}});
  const py::ssize_t r = array.shape(1);
  py::array_t<float> out({r, static_cast<py::ssize_t>(sketch.config().num_features)});
  const double *weight_data = array.data();
  float *out_data = out.mutable_data();
  {
    py::gil_scoped_release release;
    sketch.combine_co_range(weight_data, r, out_data);
  }
  return out;
}

py::array_t<double> sketch_gram(const RowSketch &sketch) {
  return py::array_t<double>({sketch.outputs(), sketch.outputs()}, sketch.sums().gram.data());
}

py::array_t<double> sketch_co_range(const RowSketch &sketch) {
  return py::array_t<double>({sketch.outputs(), sketch.config().num_features}, sketch.sums().co_range.data());
}

// Of d, over all rows that are not pending (p).
py::array_t<double> sketch_row_sum(const RowSketch &sketch) {
  const ptrdiff_t p = sketch.config().num_features;
  return py::array_t<double>(p, sketch.sums().co_range.data() + (sketch.outputs() - 1) * p);
}

py::array_t<float> sketch_origin(const RowSketch &sketch) {
  return py::array_t<float>(std::ssize(sketch.origin()), sketch.origin().data());
}

py::array_t<float> sketch_pending(const RowSketch &sketch) {
  const RowView rows = sketch.pending();
  return py::array_t<float>({rows.count, static_cast<ptrdiff_t>(sketch.config().num_features)}, rows.data);
}

void sketch_restore(RowSketch &sketch, const py::object &co_range, const py::object &gram, double squares,
                    const py::object &range_rows, const py::object &pending) {
  const py::ssize_t p = sketch.config().num_features, l = sketch.config().range_size, L = sketch.outputs();
  const auto c = checked_array<double>("restore", "co_range", co_range, {{"l + q + 1", L}, {"p", p}});
  const auto g = checked_array<double>("restore", "gram", gram, {{"l + q + 1", L}, {"l + q + 1", L}});
  const auto y = checked_array<float>("restore", "range_rows", range_rows, {{"n"}, {"l", l}});
  const RowView rows = row_view("restore", "pending", pending, p);
  RowSketch::Sums sums;
  sums.co_range = AlignedArray<double>({L, p});
  std::copy_n(c.data(), L * p, sums.co_range.data());
  sums.gram.assign(g.data(), g.data() + L * L);
  sums.squares = squares;
  sums.rows = y.shape(0);
  sums.range_rows.push_back(std::make_shared<const std::vector<float>>(y.data(), y.data() + y.size()));
  sketch.restore(std::move(sums), rows);
}

void bound_check_finite(const char *where, const py::object &x, int num_threads, int64_t first_row) {
  const RowView rows = row_view(where, "X", x, -1);
  const py::ssize_t p = py::reinterpret_borrow<py::array>(x).shape(1);
  py::gil_scoped_release release;
  check_finite_rows(where, rows, first_row, p, num_threads);
}

// (X - origin)(Y - origin)^T in float64, of X with itself where Y is None.
py::array_t<double> bound_products(const char *where, const py::object &x, const py::object &y,
                                   const py::object &origin, int num_threads, int64_t first_row) {
  const RowView left = row_view(where, "X", x, -1);
  const py::ssize_t p = py::reinterpret_borrow<py::array>(x).shape(1);
  const RowView right = y.is_none() ? left : row_view(where, "Y", y, p);
  std::optional<py::array_t<float>> origin_array;
  if (!origin.is_none()) origin_array = checked_array<float>(where, "origin", origin, {{"p", p}});
  const float *origin_data = origin_array ? origin_array->data() : nullptr;
  py::array_t<double> out({left.count, right.count});
  double *out_data = out.mutable_data();
  {
    py::gil_scoped_release release;
    products(where, left, first_row, right, origin_data, p, y.is_none(), out_data, num_threads);
  }
  return out;
}

// weights^T X in float64, rounded.
py::array_t<float> bound_combine(const py::object &x, const py::object &weights, int num_threads) {
  const RowView rows = row_view("combine", "X", x, -1);
  const py::ssize_t p = py::reinterpret_borrow<py::array>(x).shape(1);
  const auto array = checked_array<double>("combine", "weights", weights, {{"n", rows.count}, {"r"}});
  const py::ssize_t r = array.shape(1);
  py::array_t<float> out({r, p});
  const double *weight_data = array.data();
  float *out_data = out.mutable_data();
  {
    py::gil_scoped_release release;
    combine(rows, p, weight_data, r, out_data, num_threads);
  }
  return out;
}

void bind_svd(py::module_ &m) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  py::class_<RowSketch>(m, "RowSketch", "The sketch of the rows seen; tipl.StreamingSVD documents it.")
      .def(py::init(&make_sketch), py::kw_only(), py::arg("num_features"), py::arg("range_size"), py::arg("test_size"),
           py::arg("seed"), py::arg("num_threads"), py::arg("origin"), py::arg("directions"))
      .def("partial_fit", &sketch_partial_fit, py::arg("X"), py::arg("first_row"), py::arg("all_or_none"))
      .def("merge", &RowSketch::merge, py::arg("other"), release)
      .def("settle", &RowSketch::settle, release)
      .def("snapshot", &RowSketch::snapshot, py::arg("settled") = true, release)
      .def("apply", &sketch_apply, py::arg("X"))
      .def("exact_rows", &sketch_exact_rows)
      .def("range_rows", &sketch_range_rows)
      .def("combine", &sketch_combine, py::arg("weights"))
      .def("num_rows", &RowSketch::num_rows, release)
      .def("restore", &sketch_restore, py::kw_only(), py::arg("co_range"), py::arg("gram"), py::arg("squares"),
           py::arg("range_rows"), py::arg("pending"))
      .def_property_readonly("gram", &sketch_gram)
      .def_property_readonly("co_range", &sketch_co_range)
      .def_property_readonly("row_sum", &sketch_row_sum)
      .def_property_readonly("squares", [](const RowSketch &sketch) { return sketch.sums().squares; })
      .def_property_readonly("pending", &sketch_pending)
      .def_property_readonly("origin", &sketch_origin)
      .def_property_readonly("num_features", [](const RowSketch &sketch) { return sketch.config().num_features; })
      .def_property_readonly("exact", &RowSketch::exact)
      .def_property_readonly("directed", &RowSketch::directed)
      .def_property_readonly("range_size", [](const RowSketch &sketch) { return sketch.config().range_size; })
      .def_property_readonly("test_size", [](const RowSketch &sketch) { return sketch.config().test_size; });
  py::class_<ReadAhead>(m, "ReadAhead", "Reads a C-contiguous memory-mapped array from disk ahead of its use.")
      .def(py::init([](const py::array &x) { return std::make_unique<ReadAhead>(x.data(), x.nbytes()); }), py::arg("X"),
           py::keep_alive<1, 2>())
      .def("want", &ReadAhead::want, py::arg("bytes"));
  m.def("check_finite", &bound_check_finite, py::arg("where"), py::arg("X"), py::arg("num_threads"),
        py::arg("first_row") = 0);
  m.def("products", &bound_products, py::arg("where"), py::arg("X"), py::arg("Y"), py::arg("origin"),
        py::arg("num_threads"), py::arg("first_row") = 0);
  m.def("combine", &bound_combine, py::arg("X"), py::arg("weights"), py::arg("num_threads"));
}

// ---- policies and PPO

Activation activation_of(const char *where, const std::string &name) {
  const std::array<const char *, 3> names{"tanh", "relu", "elu"};  // as in Activation
  const auto found = std::find(names.begin(), names.end(), name);
  check(found != names.end(), where, ": activation must be tanh, relu or elu, got ", name);
  return static_cast<Activation>(found - names.begin());
}

py::array_t<float> bound_mean_actions(const py::object &params, const py::object &obs, ptrdiff_t act_dim,
                                      std::vector<ptrdiff_t> hidden_sizes, const std::string &activation) {
  const auto param = checked_array<float>("mean_actions", "params", params, {{"N"}, {"P"}});
  const py::ssize_t N = param.shape(0), P = param.shape(1);
  const auto x = checked_array<float>("mean_actions", "obs", obs, {{"N", N}, {"R"}, {"O"}});
  const py::ssize_t R = x.shape(1);
  const PolicySizes sizes{x.shape(2), act_dim, std::move(hidden_sizes), activation_of("mean_actions", activation)};
  check_sizes("mean_actions", sizes);
  const ptrdiff_t least = network(sizes, act_dim, act_dim).end;
  check(P >= least, "mean_actions: params must have at least ", least, " columns, got ", P);
  py::array_t<float> out({N, R, static_cast<py::ssize_t>(act_dim)});
  const float *const from = param.data(), *const seen = x.data();
  float *const to = out.mutable_data();
  {
    py::gil_scoped_release release;
    mean_actions(sizes, from, P, N, seen, R, to);
  }
  return out;
}

std::unique_ptr<PpoUpdate> make_ppo_update(ptrdiff_t obs_dim, ptrdiff_t act_dim, std::vector<ptrdiff_t> hidden_sizes,
                                           const std::string &activation, ptrdiff_t minibatch_size,
                                           ptrdiff_t update_epochs, float clip_coef, std::optional<float> clip_coef_vf,
                                           float vf_coef, float ent_coef, float max_grad_norm,
                                           const std::string &optimizer, float adam_eps, bool normalize_advantage,
                                           std::optional<double> target_kl, bool learn_log_std, int num_threads) {
  const Activation kind = activation_of("PpoUpdate", activation);
  check(optimizer == "adam" || optimizer == "sgd", "PpoUpdate: optimizer must be adam or sgd, got ", optimizer);
  PpoSettings settings{.minibatch_size = minibatch_size,
                       .update_epochs = update_epochs,
                       .clip_coef = clip_coef,
                       .vf_coef = vf_coef,
                       .ent_coef = ent_coef,
                       .max_grad_norm = max_grad_norm,
                       .optimizer = optimizer == "adam" ? Optimizer::kAdam : Optimizer::kSgd,
                       .adam_eps = adam_eps,
                       .normalize_advantage = normalize_advantage,
                       .learn_log_std = learn_log_std};
  if (clip_coef_vf) settings.clip_coef_vf = *clip_coef_vf;
  if (target_kl) settings.target_kl = *target_kl;
  return std::make_unique<PpoUpdate>(PolicySizes{obs_dim, act_dim, std::move(hidden_sizes), kind}, settings,
                                     num_threads);
}

// Rows of parameters (N, P), P at least what the update needs.
py::array_t<float> checked_params(const char *where, const PpoUpdate &update, const py::object &params) {
  const auto array = checked_array<float>(where, "params", params, {{"N"}, {"P"}});
  check(array.shape(1) >= update.num_params(), where, ": params must have at least ", update.num_params(),
        " columns, got ", array.shape(1));
  return array;
}

py::array_t<float> bound_values(PpoUpdate &update, const py::object &params, const py::object &obs) {
  const auto rows = checked_params("values", update, params);
  const py::ssize_t N = rows.shape(0);
  const auto x = checked_array<float>("values", "obs", obs, {{"N", N}, {"R"}, {"O", update.sizes().obs_dim}});
  py::array_t<float> out({N, x.shape(1)});
  float *const to = out.mutable_data();
  {
    py::gil_scoped_release release;
    update.values(rows.data(), rows.shape(1), N, x.data(), x.shape(1), to);
  }
  return out;
}

// Statistics (N, 4): policy loss, value loss, clipped share, approximate KL divergence.
py::array_t<double> bound_update(PpoUpdate &update, py::object params, py::object first_moments,
                                 py::object second_moments, py::object num_updates, const py::object &observations,
                                 const py::object &actions, const py::object &log_probs, const py::object &advantages,
                                 const py::object &returns, const py::object &values, const py::object &order,
                                 double learning_rate) {
  auto rows = checked_params("update", update, params);
  const py::ssize_t N = rows.shape(0), P = rows.shape(1), E = update.settings().update_epochs;
  auto first = checked_array<float>("update", "first_moments", first_moments, {{"N", N}, {"P", P}});
  auto second = checked_array<float>("update", "second_moments", second_moments, {{"N", N}, {"P", P}});
  auto taken = checked_array<int64_t>("update", "num_updates", num_updates, {{"N", N}});
  const auto obs =
      checked_array<float>("update", "observations", observations, {{"N", N}, {"T"}, {"O", update.sizes().obs_dim}});
  const py::ssize_t T = obs.shape(1);
  const auto action =
      checked_array<float>("update", "actions", actions, {{"N", N}, {"T", T}, {"A", update.sizes().act_dim}});
  const auto scalars = [&](const char *name, const py::object &array) {
    return checked_array<float>("update", name, array, {{"N", N}, {"T", T}});
  };
  const auto log_prob = scalars("log_probs", log_probs), advantage = scalars("advantages", advantages);
  const auto target = scalars("returns", returns), value = scalars("values", values);
  const auto orders = checked_array<int32_t>("update", "order", order, {{"N", N}, {"E", E}, {"T", T}});
  const TrialParams trials{
      rows.mutable_data(), first.mutable_data(), second.mutable_data(), taken.mutable_data(), N, P};
  const Steps steps{obs.data(),    action.data(), log_prob.data(), advantage.data(),
                    target.data(), value.data(),  orders.data(),   T};
  std::vector<UpdateStats> stats(N);
  {
    py::gil_scoped_release release;
    update.update(trials, steps, learning_rate, stats.data());
  }
  py::array_t<double> out({N, py::ssize_t{4}});
  for (py::ssize_t i = 0; i < N; ++i) {
    double *const to = out.mutable_data(i, 0);
    to[0] = stats[i].policy_loss;
    to[1] = stats[i].value_loss;
    to[2] = stats[i].clipfrac;
    to[3] = stats[i].approx_kl;
  }
  return out;
}

void bind_ppo(py::module_ &m) {
  m.def("mean_actions", &bound_mean_actions, py::arg("params"), py::arg("obs"), py::kw_only(), py::arg("act_dim"),
        py::arg("hidden_sizes"), py::arg("activation"),
        "Mean actions (N, R, A); tipl.policy.mean_action documents it.");
  py::class_<PpoUpdate>(m, "PpoUpdate", "PPO's update of many trials; tipl.ppo.Population documents it.")
      .def(py::init(&make_ppo_update), py::kw_only(), py::arg("obs_dim"), py::arg("act_dim"), py::arg("hidden_sizes"),
           py::arg("activation"), py::arg("minibatch_size"), py::arg("update_epochs"), py::arg("clip_coef"),
           py::arg("clip_coef_vf"), py::arg("vf_coef"), py::arg("ent_coef"), py::arg("max_grad_norm"),
           py::arg("optimizer"), py::arg("adam_eps"), py::arg("normalize_advantage"), py::arg("target_kl"),
           py::arg("learn_log_std"), py::arg("num_threads"))
      .def_property_readonly("num_params", &PpoUpdate::num_params)
      .def("values", &bound_values, py::arg("params"), py::arg("obs"))
      .def("update", &bound_update, py::kw_only(), py::arg("params"), py::arg("first_moments"),
           py::arg("second_moments"), py::arg("num_updates"), py::arg("observations"), py::arg("actions"),
           py::arg("log_probs"), py::arg("advantages"), py::arg("returns"), py::arg("values"), py::arg("order"),
           py::arg("learning_rate"));
}

}  // namespace
}  // namespace tipl

PYBIND11_MODULE(_core, m) {
  m.doc() = "The native engine of tipl.";
  tipl::select_isa(std::getenv("TIPL_ISA"));  // throws: the import fails with its text
  tipl::bind_engine(m);
  tipl::bind_decoder(m);
  tipl::bind_svd(m);
  tipl::bind_ppo(m);
}
