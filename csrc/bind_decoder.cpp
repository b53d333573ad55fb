// The bindings of decode.h.
#include "bind_decoder.h"

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cpu/decoder_pass.h"
#include "decode.h"

namespace tipl {
namespace {

py::array_t<float> prefill(Decoder &decoder, const py::object &x, const py::object &lengths) {
  const py::ssize_t B = decoder.batch_size(), k = decoder.config().n_components;
  const auto x_array = checked_array<float>("prefill", "x", x, {{"B", B}, {"t"}, {"k", k}});
  std::optional<py::array_t<int64_t>> lengths_array;
  if (!lengths.is_none()) lengths_array = checked_array<int64_t>("prefill", "lengths", lengths, {{"B", B}});
  py::array_t<float> y = new_array<float>({B, k});
  const int64_t *lengths_data = lengths_array ? lengths_array->data() : nullptr;
  const float *x_data = x_array.data();
  const py::ssize_t t = x_array.shape(1);
  float *y_data = y.mutable_data();
  without_gil([&](Poll &poll) { decoder.prefill(x_data, t, lengths_data, y_data, poll); });
  return y;
}

py::array_t<float> step(Decoder &decoder, const py::object &x) {
  const py::ssize_t B = decoder.batch_size(), k = decoder.config().n_components;
  const auto x_array = checked_array<float>("step", "x", x, {{"B", B}, {"k", k}});
  py::array_t<float> y = new_array<float>({B, k});
  const float *x_data = x_array.data();
  float *y_data = y.mutable_data();
  without_gil([&](Poll &poll) { decoder.step(x_data, y_data, poll); });
  return y;
}

// n is int64 (B,). Rows of y beyond what a sequence asked for are NaN.
py::array_t<float> generate(Decoder &decoder, const py::object &n) {
  const py::ssize_t B = decoder.batch_size(), k = decoder.config().n_components;
  const auto n_array = checked_array<int64_t>("generate", "n", n, {{"B", B}});
  const std::vector<int64_t> steps(n_array.data(), n_array.data() + B);
  // Decoder::generate refuses values that do not fit.
  const auto most = std::clamp<int64_t>(*std::max_element(steps.begin(), steps.end()), 0, decoder.max_len());
  py::array_t<float> y = new_array<float>({B, static_cast<ptrdiff_t>(most), k});
  float *y_data = y.mutable_data();
  without_gil([&](Poll &poll) {
    for (py::ssize_t b = 0; b < B; ++b) {
      poll(0);
      const int64_t own = std::clamp<int64_t>(steps[b], 0, most);
      std::fill(y_data + (b * most + own) * k, y_data + (b + 1) * most * k, std::numeric_limits<float>::quiet_NaN());
    }
    decoder.generate(steps, y_data, poll);
  });
  return y;
}

}  // namespace

void bind_decoder(py::module_ &m) {
  py::class_<Decoder>(m, "Decoder", "The forecaster over a KV cache; tipl.Decoder documents it.")
      .def(py::init([](int n_components, int n_layer, int n_head, int d_model, int d_ff, int max_len, float diff_scale,
                       float out_scale, const py::dict &weights, const std::string &dtype,
                       const std::string &cache_dtype, ptrdiff_t batch_size, ptrdiff_t cache_len,
                       ptrdiff_t num_threads) {
             const DecoderConfig config{n_components, n_layer, n_head, d_model, d_ff, max_len, diff_scale, out_scale};
             const DecoderOptions options{precision_of("dtype", dtype, true),
                                          precision_of("cache_dtype", cache_dtype, false), batch_size, cache_len,
                                          num_threads};
             const DecoderTensors tensors(config, weights);
             return without_gil([&](Poll &poll) {
               return std::make_unique<Decoder>(config, options,
                                                std::make_unique<DecoderPass>(config, tensors.data, options, poll));
             });
           }),
           py::kw_only(), py::arg("n_components"), py::arg("n_layer"), py::arg("n_head"), py::arg("d_model"),
           py::arg("d_ff"), py::arg("max_len"), py::arg("diff_scale"), py::arg("out_scale"), py::arg("weights"),
           py::arg("dtype"), py::arg("cache_dtype"), py::arg("batch_size"), py::arg("cache_len"),
           py::arg("num_threads"))
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

}  // namespace tipl
