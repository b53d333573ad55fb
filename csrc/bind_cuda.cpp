// The module _cuda: the engine on CUDA devices. Loaded when a device is first asked for, since it needs a driver.
#include <algorithm>
#include <cstdint>
#include <iterator>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bind_cuda_sketch.h"
#include "bind_decoder.h"
#include "bind_device_array.h"
#include "cuda/decoder_pass.h"
#include "cuda/device.h"
#include "decode.h"

namespace tipl::cuda {
namespace {

// A decoder, and the pass that it computes with.
struct DeviceDecoder {
  DeviceDecoder(const DecoderConfig &config, const DecoderTensors &tensors, const DecoderOptions &options, int device)
      : device(device) {
    const OnDevice on(device);
    without_gil([&](Poll &poll) {
      auto made = std::make_unique<DecoderPass>(config, tensors.data, options, device, poll);
      pass = made.get();
      decoder = std::make_unique<Decoder>(config, options, std::move(made));
    });
  }

  const int device;
  DecoderPass *pass = nullptr;
  std::unique_ptr<Decoder> decoder;
};

py::object prefill(DeviceDecoder &self, const py::object &x, const py::object &lengths) {
  Decoder &decoder = *self.decoder;
  const py::ssize_t B = decoder.batch_size(), k = decoder.config().n_components;
  const OnDevice on(self.device);
  const DeviceInput input("prefill", "x", x, {{"B", B}, {"t"}, {"k", k}}, self.device, self.pass->stream());
  std::optional<py::array_t<int64_t>> lengths_array;
  if (!lengths.is_none()) lengths_array = checked_array<int64_t>("prefill", "lengths", lengths, {{"B", B}});
  const int64_t *lengths_data = lengths_array ? lengths_array->data() : nullptr;
  DeviceArray y({B, k}, self.device);
  without_gil([&](Poll &poll) { decoder.prefill(input.data(), input.shape(1), lengths_data, y.data(), poll); });
  return input.like(std::move(y));
}

py::object step(DeviceDecoder &self, const py::object &x) {
  Decoder &decoder = *self.decoder;
  const py::ssize_t B = decoder.batch_size(), k = decoder.config().n_components;
  const OnDevice on(self.device);
  const DeviceInput input("step", "x", x, {{"B", B}, {"k", k}}, self.device, self.pass->stream());
  DeviceArray y({B, k}, self.device);
  without_gil([&](Poll &poll) { decoder.step(input.data(), y.data(), poll); });
  return input.like(std::move(y));
}

// n is int64 (B,). Rows of y beyond what a sequence asked for are NaN.
DeviceArray generate(DeviceDecoder &self, const py::object &n) {
  Decoder &decoder = *self.decoder;
  const py::ssize_t B = decoder.batch_size(), k = decoder.config().n_components;
  const auto n_array = checked_array<int64_t>("generate", "n", n, {{"B", B}});
  const std::vector<int64_t> steps(n_array.data(), n_array.data() + B);
  // Decoder::generate refuses values that do not fit.
  const auto most = std::clamp<int64_t>(*std::max_element(steps.begin(), steps.end()), 0, decoder.max_len());
  const OnDevice on(self.device);
  DeviceArray y({B, static_cast<py::ssize_t>(most), k}, self.device);
  self.pass->stream().set_bytes(y.data(), 0xff, B * most * k);  // every number of all ones is NaN
  without_gil([&](Poll &poll) { decoder.generate(steps, y.data(), poll); });
  return y;
}

// For tests: generate as if Ctrl-C came at once. Returns y, of which only the first steps were made.
DeviceArray generate_until_stopped(DeviceDecoder &self, int64_t n) {
  Decoder &decoder = *self.decoder;
  const OnDevice on(self.device);
  DeviceArray y({decoder.batch_size(), n, decoder.config().n_components}, self.device);
  self.pass->stop_at_once();
  const Poll::Stop never = [] { return false; };
  Poll poll(never);
  try {
    decoder.generate(std::vector<int64_t>(decoder.batch_size(), n), y.data(), poll);
  } catch (const Interrupted &) {
  }
  return y;
}

py::dict plan_of(const DeviceDecoder &self, bool many_rows) {
  const DecodePlan &plan = self.pass->plan(many_rows);
  py::dict dict;
  dict["rows"] = plan.rows;
  dict["heads"] = plan.H;
  dict["units"] = plan.U;
  dict["layers"] = plan.L;
  dict["unit_width"] = plan.F;
  dict["resident"] = plan.resident != 0;
  dict["ends_resident"] = plan.ends_resident != 0;
  dict["head_bytes"] = HeadWeights(plan).bytes;
  dict["unit_bytes"] = UnitWeights(plan).bytes;
  dict["end_bytes"] = EndWeights(plan).bytes;
  dict["workspace_bytes"] = Workspace(plan).bytes;
  return dict;
}

void bind_decoder(py::module_ &m) {
  py::class_<DeviceDecoder>(m, "Decoder", "The forecaster over a KV cache on a CUDA device; tipl.Decoder documents it.")
      .def(py::init([](int n_components, int n_layer, int n_head, int d_model, int d_ff, int max_len, float diff_scale,
                       float out_scale, const py::dict &weights, const std::string &dtype,
                       const std::string &cache_dtype, ptrdiff_t batch_size, ptrdiff_t cache_len, int device) {
             const DecoderConfig config{n_components, n_layer, n_head, d_model, d_ff, max_len, diff_scale, out_scale};
             const DecoderOptions options{precision_of("dtype", dtype, true),
                                          precision_of("cache_dtype", cache_dtype, false), batch_size, cache_len, 1};
             return std::make_unique<DeviceDecoder>(config, DecoderTensors(config, weights), options, device);
           }),
           py::kw_only(), py::arg("n_components"), py::arg("n_layer"), py::arg("n_head"), py::arg("d_model"),
           py::arg("d_ff"), py::arg("max_len"), py::arg("diff_scale"), py::arg("out_scale"), py::arg("weights"),
           py::arg("dtype"), py::arg("cache_dtype"), py::arg("batch_size"), py::arg("cache_len"), py::arg("device"))
      .def("prefill", &prefill, py::arg("x"), py::arg("lengths") = py::none())
      .def("step", &step, py::arg("x"))
      .def("generate", &generate, py::arg("n"))
      .def("reset", [](DeviceDecoder &self) { self.decoder->reset(); })
      .def("generate_until_stopped", &generate_until_stopped, py::arg("n"))
      .def("plan", &plan_of, py::arg("many_rows"))
      .def_property_readonly("position",
                             [](const DeviceDecoder &self) {
                               const std::vector<int64_t> position = self.decoder->position();
                               return py::array_t<int64_t>(std::ssize(position), position.data());
                             })
      .def_property_readonly("batch_size", [](const DeviceDecoder &self) { return self.decoder->batch_size(); })
      .def_property_readonly("max_len", [](const DeviceDecoder &self) { return self.decoder->max_len(); })
      .def_readonly("device", &DeviceDecoder::device);
}

}  // namespace
}  // namespace tipl::cuda

PYBIND11_MODULE(_cuda, m) {
  namespace py = pybind11;
  m.doc() = "The native engine of tipl on CUDA devices.";
  m.def(
      "devices",
      [] {
        py::list list;
        for (const tipl::cuda::DeviceInfo &info : tipl::cuda::devices()) {
          list.append(py::make_tuple(info.index, info.name, info.major, info.minor, info.num_sms, info.shared_bytes,
                                     info.memory_bytes));
        }
        return list;
      },
      "For each device: index, name, compute capability (major, minor), SMs, shared memory of a block and memory, in "
      "bytes.");
  tipl::cuda::bind_device_array(m);
  tipl::cuda::bind_decoder(m);
  tipl::cuda::bind_sketch(m);
}
