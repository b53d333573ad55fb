// The bindings of refiner.h.
#include <memory>

#include "bind.h"
#include "refiner.h"

namespace tipl {
namespace {

struct Arrays {
  py::array_t<float> params, features, forecasts, places;
  py::array_t<int64_t> kinds;

  Arrays(const Refiner &refiner, const char *where, const py::object &params_, const py::object &features_,
         const py::object &kinds_, const py::object &forecasts_, const py::object &places_) {
    params = checked_array<float>(where, "params", params_, {{"P", refiner.num_params()}});
    features = checked_array<float>(where, "features", features_, {{"R"}, {"m"}, {"F", refiner.config().features()}});
    const py::ssize_t R = features.shape(0), m = features.shape(1);
    kinds = checked_array<int64_t>(where, "kinds", kinds_, {{"R", R}, {"m", m}});
    forecasts = checked_array<float>(where, "forecasts", forecasts_, {{"R", R}, {"J"}, {"m", m}});
    places = checked_array<float>(where, "places", places_,
                                  {{"R", R}, {"J", forecasts.shape(1)}, {"3", RefinerConfig::kPlace}});
  }

  RefinerInputs inputs() const {
    return {features.shape(0), features.shape(1), forecasts.shape(1), features.data(),
            kinds.data(),      forecasts.data(),  places.data()};
  }
};

// Returns answers (R, J, m).
py::array_t<float> answer(Refiner &refiner, const py::object &params, const py::object &features,
                          const py::object &kinds, const py::object &forecasts, const py::object &places) {
  const Arrays arrays(refiner, "answer", params, features, kinds, forecasts, places);
  const RefinerInputs inputs = arrays.inputs();
  py::array_t<float> out = new_array<float>({inputs.runs, inputs.horizons, inputs.weights});
  const float *const param = arrays.params.data();
  float *const to = out.mutable_data();
  without_gil([&](Poll &poll) { refiner.answer(param, inputs, to, poll); });
  return out;
}

// Returns errors (R,) and the gradient (P,) of their mean.
py::tuple loss(Refiner &refiner, const py::object &params, const py::object &features, const py::object &kinds,
               const py::object &forecasts, const py::object &places, const py::object &gain,
               const py::object &offset) {
  const Arrays arrays(refiner, "loss", params, features, kinds, forecasts, places);
  const RefinerInputs inputs = arrays.inputs();
  const auto gains = checked_array<float>("loss", "gain", gain, {{"R", inputs.runs}, {"m", inputs.weights}});
  const auto offsets = checked_array<float>("loss", "offset", offset, {{"R", inputs.runs}, {"m", inputs.weights}});
  py::array_t<float> errors = new_array<float>({inputs.runs}), grad = new_array<float>({refiner.num_params()});
  const float *const param = arrays.params.data(), *const u = gains.data(), *const v = offsets.data();
  float *const to_errors = errors.mutable_data(), *const to_grad = grad.mutable_data();
  without_gil([&](Poll &poll) { refiner.loss(param, inputs, u, v, to_errors, to_grad, poll); });
  return py::make_tuple(errors, grad);
}

}  // namespace

void bind_refiner(py::module_ &m) {
  py::class_<Refiner>(m, "Refiner", "What the refiner answers, and the gradient of its loss.")
      .def(py::init([](ptrdiff_t hidden, ptrdiff_t num_signed, ptrdiff_t num_unsigned, ptrdiff_t num_kinds, float bound,
                       float linear_gain, ptrdiff_t num_threads) {
             const RefinerConfig config{hidden, num_signed, num_unsigned, num_kinds, bound, linear_gain};
             return std::make_unique<Refiner>(config, num_threads);
           }),
           py::kw_only(), py::arg("hidden"), py::arg("num_signed"), py::arg("num_unsigned"), py::arg("num_kinds"),
           py::arg("bound"), py::arg("linear_gain"), py::arg("num_threads"))
      .def_property_readonly("num_params", &Refiner::num_params)
      .def("answer", &answer, py::arg("params"), py::arg("features"), py::arg("kinds"), py::arg("forecasts"),
           py::arg("places"))
      .def("loss", &loss, py::arg("params"), py::arg("features"), py::arg("kinds"), py::arg("forecasts"),
           py::arg("places"), py::arg("gain"), py::arg("offset"));
}

}  // namespace tipl
