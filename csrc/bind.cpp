// The only file that knows Python: checks arrays, takes pointers, releases the GIL, calls the engine.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
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
#include "rng.h"
#include "svd.h"
#include "symmetric_eigen.h"

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

// ---- streaming SVD

std::unique_ptr<StreamingSvd> make_svd(ptrdiff_t num_features, ptrdiff_t n_components, ptrdiff_t n_oversamples,
                                       bool center, uint64_t seed, int num_threads) {
  py::gil_scoped_release release;
  return std::make_unique<StreamingSvd>(SvdConfig{num_features, n_components, n_oversamples, center, seed},
                                        num_threads);
}

// p of rows that partial_fit could take first.
py::ssize_t columns_of(const char *where, const py::object &x) {
  return checked_array<float>(where, "X", x, {{"n"}, {"p"}}).shape(1);
}

void svd_partial_fit(StreamingSvd &svd, const py::object &x) {
  const auto x_array = checked_array<float>("partial_fit", "X", x, {{"n"}, {"p", svd.config().num_features}});
  const float *x_data = x_array.data();
  const py::ssize_t n = x_array.shape(0);
  bool done;
  {
    py::gil_scoped_release release;
    done = svd.partial_fit(x_data, n, signal_raised);
  }
  if (!done) throw py::error_already_set();
}

// components (k, p) float32, singular values (k), mean (p) and the bound of the residual.
py::tuple svd_factors(const StreamingSvd &svd) {
  const ptrdiff_t k = svd.config().n_components, p = svd.config().num_features;
  py::array_t<float> components({k, p});
  float *components_data = components.mutable_data();
  const StreamingSvd::Factors factors = [&] {
    py::gil_scoped_release release;
    StreamingSvd::Factors read = svd.factors();
    for (ptrdiff_t j = 0; j < k; ++j) {
      std::copy_n(read.components.data() + j * read.stride, p, components_data + j * p);
    }
    return read;
  }();
  return py::make_tuple(components, py::array_t<double>(k, factors.singular_values.data()),
                        py::array_t<double>(p, factors.mean.data()), factors.residual_bound);
}

py::array_t<double> bound_gram(const py::object &x, const py::object &origin, int num_threads) {
  const auto x_array = checked_array<float>("gram", "X", x, {{"T"}, {"p"}});
  const py::ssize_t T = x_array.shape(0), p = x_array.shape(1);
  std::optional<py::array_t<float>> origin_array;
  if (!origin.is_none()) origin_array = checked_array<float>("gram", "origin", origin, {{"p", p}});
  py::array_t<double> out({T, T});
  const float *x_data = x_array.data(), *origin_data = origin_array ? origin_array->data() : nullptr;
  double *out_data = out.mutable_data();
  {
    py::gil_scoped_release release;
    gram(x_data, T, p, origin_data, out_data, num_threads);
  }
  return out;
}

py::array_t<double> bound_cross_products(const py::object &x, const py::object &y, int num_threads) {
  const auto y_array = checked_array<float>("transform", "components_", y, {{"k"}, {"p"}});
  const py::ssize_t k = y_array.shape(0), p = y_array.shape(1);
  const auto x_array = checked_array<float>("transform", "X", x, {{"n"}, {"p", p}});
  const py::ssize_t n = x_array.shape(0);
  py::array_t<double> out({n, k});
  const float *x_data = x_array.data(), *y_data = y_array.data();
  double *out_data = out.mutable_data();
  {
    py::gil_scoped_release release;
    cross_products(x_data, n, y_data, k, p, out_data, num_threads);
  }
  return out;
}

// Eigenvalues (n), descending, and eigenvectors (n, n), a row each. For the solver's tests.
py::tuple bound_symmetric_eigen(const py::object &a) {
  const auto array = checked_array<double>("symmetric_eigen", "a", a, {{"n"}, {"n"}});
  const py::ssize_t n = array.shape(0);
  check(array.shape(1) == n, "symmetric_eigen: a must be square, got ", shape_of(array));
  const SymmetricEigen eigen(array.data(), n);
  return py::make_tuple(py::array_t<double>(n, eigen.values.data()), py::array_t<double>({n, n}, eigen.vectors.data()));
}

void bind_svd(py::module_ &m) {
  py::class_<StreamingSvd>(m, "StreamingSvd", "The sketch of the rows seen; tipl.StreamingSVD documents it.")
      .def(py::init(&make_svd), py::kw_only(), py::arg("num_features"), py::arg("n_components"),
           py::arg("n_oversamples"), py::arg("center"), py::arg("seed"), py::arg("num_threads"))
      .def("partial_fit", &svd_partial_fit, py::arg("X"))
      .def("merge", &StreamingSvd::merge, py::arg("other"), py::call_guard<py::gil_scoped_release>())
      .def("factors", &svd_factors)
      .def("num_rows", &StreamingSvd::num_rows, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("num_features", [](const StreamingSvd &svd) { return svd.config().num_features; })
      .def_property_readonly("num_threads", &StreamingSvd::num_threads);
  m.def("columns_of", &columns_of, py::arg("where"), py::arg("X"));
  m.def("gram", &bound_gram, py::arg("X"), py::arg("origin"), py::arg("num_threads"));
  m.def("cross_products", &bound_cross_products, py::arg("X"), py::arg("Y"), py::arg("num_threads"));
  m.def("symmetric_eigen", &bound_symmetric_eigen, py::arg("a"));
}

}  // namespace
}  // namespace tipl

PYBIND11_MODULE(_core, m) {
  m.doc() = "The native engine of tipl.";
  tipl::select_isa(std::getenv("TIPL_ISA"));  // throws: the import fails with its text
  tipl::bind_engine(m);
  tipl::bind_decoder(m);
  tipl::bind_svd(m);
}
