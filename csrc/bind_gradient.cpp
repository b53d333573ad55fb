// The bindings of rollout_gradient.h.
#include <memory>

#include "bind.h"
#include "rollout_gradient.h"

namespace tipl {
namespace {

// Returns predictions (B, T, k), or (B, horizon, k) with a horizon.
py::array_t<float> forward(RolloutGradient &rollout, const py::object &params, const py::object &x,
                           const py::object &prefix_ends, ptrdiff_t horizon, float dropout, uint64_t seed) {
  const ptrdiff_t k = rollout.config().n_components;
  const auto param = checked_array<float>("forward", "params", params, {{"P", rollout.num_params()}});
  const auto x_array = checked_array<float>("forward", "x", x, {{"B"}, {"T"}, {"k", k}});
  const py::ssize_t B = x_array.shape(0);
  const auto ends = checked_array<int64_t>("forward", "prefix_ends", prefix_ends, {{"B", B}});
  check(horizon >= 0, "forward: horizon must not be negative, got ", horizon);
  const RolloutBatch batch{B, x_array.shape(1), horizon, x_array.data(), ends.data(), dropout, seed};
  check(horizon <= rollout.config().max_len, "forward: horizon must be at most max_len = ", rollout.config().max_len,
        ", got ", horizon);
  py::array_t<float> out = new_array<float>({B, batch.predictions(), k});
  const float *const from = param.data();
  float *const to = out.mutable_data();
  without_gil([&](Poll &poll) { rollout.forward(from, batch, to, poll); });
  return out;
}

py::array_t<float> backward(RolloutGradient &rollout, const py::object &params, const py::object &grad) {
  const auto param = checked_array<float>("backward", "params", params, {{"P", rollout.num_params()}});
  const auto dout =
      checked_array<float>("backward", "grad", grad, {{"B"}, {"T"}, {"k", rollout.config().n_components}});
  const ptrdiff_t B = dout.shape(0), T = dout.shape(1);
  py::array_t<float> out = new_array<float>({rollout.num_params()});
  const float *const from = param.data(), *const given = dout.data();
  float *const to = out.mutable_data();
  without_gil([&](Poll &poll) { rollout.backward(from, given, B, T, to, poll); });
  return out;
}

}  // namespace

void bind_gradient(py::module_ &m) {
  py::class_<RolloutGradient>(m, "RolloutGradient", "Rollouts of the forecaster and their gradient, for training.")
      .def(py::init([](int n_components, int n_layer, int n_head, int d_model, int d_ff, int max_len, float diff_scale,
                       float out_scale, ptrdiff_t batch_size, ptrdiff_t num_tokens, ptrdiff_t num_threads) {
             const DecoderConfig config{n_components, n_layer, n_head, d_model, d_ff, max_len, diff_scale, out_scale};
             return std::make_unique<RolloutGradient>(config, batch_size, num_tokens, num_threads);
           }),
           py::kw_only(), py::arg("n_components"), py::arg("n_layer"), py::arg("n_head"), py::arg("d_model"),
           py::arg("d_ff"), py::arg("max_len"), py::arg("diff_scale"), py::arg("out_scale"), py::arg("batch_size"),
           py::arg("num_tokens"), py::arg("num_threads"))
      .def_property_readonly("num_params", &RolloutGradient::num_params)
      .def("forward", &forward, py::arg("params"), py::arg("x"), py::arg("prefix_ends"), py::kw_only(),
           py::arg("horizon") = 0, py::arg("dropout") = 0.0f, py::arg("seed") = 0)
      .def("backward", &backward, py::arg("params"), py::arg("grad"));
}

}  // namespace tipl
