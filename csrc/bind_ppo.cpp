// The bindings of policy.h and ppo.h.
#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bind.h"
#include "policy.h"
#include "ppo.h"

namespace tipl {
namespace {

Activation activation_of(const char *where, const std::string &name) {
  const std::array<const char *, 3> names{"tanh", "relu", "elu"};  // as in Activation
  const auto found = std::find(names.begin(), names.end(), name);
  check(found != names.end(), where, ": activation must be tanh, relu or elu, got ", name);
  return static_cast<Activation>(found - names.begin());
}

Distribution distribution_of(bool discrete) { return discrete ? Distribution::kCategorical : Distribution::kGaussian; }

py::array_t<float> bound_mean_actions(const py::object &params, const py::object &obs, ptrdiff_t act_dim,
                                      std::vector<ptrdiff_t> hidden_sizes, const std::string &activation,
                                      bool discrete) {
  const auto param = checked_array<float>("mean_actions", "params", params, {{"N"}, {"P"}});
  const py::ssize_t N = param.shape(0), P = param.shape(1);
  const auto x = checked_array<float>("mean_actions", "obs", obs, {{"N", N}, {"R"}, {"O"}});
  const py::ssize_t R = x.shape(1);
  const PolicySizes sizes{x.shape(2), act_dim, std::move(hidden_sizes), activation_of("mean_actions", activation),
                          distribution_of(discrete)};
  check_sizes("mean_actions", sizes);
  const ptrdiff_t least = network(sizes, sizes.num_log_stds(), act_dim).end;
  check(P >= least, "mean_actions: params must have at least ", least, " columns, got ", P);
  py::array_t<float> out = new_array<float>({N, R, act_dim});
  const float *const from = param.data(), *const seen = x.data();
  float *const to = out.mutable_data();
  without_gil([&](Poll &poll) { mean_actions(sizes, from, P, N, seen, R, to, poll); });
  return out;
}

// The attribute of tipl.PPOConfig with this name. TypeError where it is not a T.
template <class T>
T setting(const py::object &config, const char *name) {
  const py::object value = config.attr(name);
  try {
    return value.cast<T>();
  } catch (const py::cast_error &) {
    throw py::type_error(text("PpoUpdate: ", name, " has the wrong type: ",
                              py::str(py::type::of(value).attr("__name__")).cast<std::string>()));
  }
}

std::unique_ptr<PpoUpdate> make_ppo_update(ptrdiff_t obs_dim, ptrdiff_t act_dim, const py::object &config,
                                           int num_threads, bool discrete) {
  const auto optimizer = setting<std::string>(config, "optimizer");
  check(optimizer == "adam" || optimizer == "sgd", "PpoUpdate: optimizer must be adam or sgd, got ", optimizer);
  constexpr float kAny = std::numeric_limits<float>::infinity();
  constexpr double kNever = std::numeric_limits<double>::infinity();
  const PpoSettings settings{
      .minibatch_size = setting<ptrdiff_t>(config, "minibatch_size"),
      .update_epochs = setting<ptrdiff_t>(config, "update_epochs"),
      .clip_coef = setting<float>(config, "clip_coef"),
      .clip_coef_vf = setting<std::optional<float>>(config, "clip_coef_vf").value_or(kAny),
      .vf_coef = setting<float>(config, "vf_coef"),
      .ent_coef = setting<float>(config, "ent_coef"),
      .max_grad_norm = setting<float>(config, "max_grad_norm"),
      .optimizer = optimizer == "adam" ? Optimizer::kAdam : Optimizer::kSgd,
      .adam_eps = setting<float>(config, "adam_eps"),
      .normalize_advantage = setting<bool>(config, "normalize_advantage"),
      .target_kl = setting<std::optional<double>>(config, "target_kl").value_or(kNever),
      .learn_log_std = setting<bool>(config, "learn_log_std"),
  };
  const PolicySizes sizes{obs_dim, act_dim, setting<std::vector<ptrdiff_t>>(config, "hidden_sizes"),
                          activation_of("PpoUpdate", setting<std::string>(config, "activation")),
                          distribution_of(discrete)};
  return std::make_unique<PpoUpdate>(sizes, settings, num_threads);
}

// `params` as rows of parameters (N, P), where P is at least what the update needs.
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
  py::array_t<float> out = new_array<float>({N, x.shape(1)});
  const float *const from = rows.data(), *const obs_data = x.data();
  const py::ssize_t stride = rows.shape(1), R = x.shape(1);
  float *const to = out.mutable_data();
  without_gil([&](Poll &poll) { update.values(from, stride, N, obs_data, R, to, poll); });
  return out;
}

// Returns statistics (N, 4): policy loss, value loss, clipped share and approximate KL divergence. Of discrete actions
// they are (N, 5), and the last is the entropy.
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
      checked_array<float>("update", "actions", actions, {{"N", N}, {"T", T}, {"A", update.sizes().action_width()}});
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
  without_gil([&](Poll &poll) { update.update(trials, steps, learning_rate, stats.data(), poll); });
  const bool is_discrete = update.sizes().distribution == Distribution::kCategorical;
  py::array_t<double> out({N, py::ssize_t{is_discrete ? 5 : 4}});
  for (py::ssize_t i = 0; i < N; ++i) {
    double *const to = out.mutable_data(i, 0);
    to[0] = stats[i].policy_loss;
    to[1] = stats[i].value_loss;
    to[2] = stats[i].clipfrac;
    to[3] = stats[i].approx_kl;
    if (is_discrete) to[4] = stats[i].entropy;
  }
  return out;
}

}  // namespace

void bind_ppo(py::module_ &m) {
  m.def("mean_actions", &bound_mean_actions, py::arg("params"), py::arg("obs"), py::kw_only(), py::arg("act_dim"),
        py::arg("hidden_sizes"), py::arg("activation"), py::arg("discrete") = false,
        "Mean actions (N, R, A), or the logits of discrete actions; tipl.policy.mean_action documents it.");
  py::class_<PpoUpdate>(
      m, "PpoUpdate", "PPO's update of many trials, with the settings in the attributes of `config`, a tipl.PPOConfig.")
      .def(py::init(&make_ppo_update), py::kw_only(), py::arg("obs_dim"), py::arg("act_dim"), py::arg("config"),
           py::arg("num_threads"), py::arg("discrete") = false)
      .def_property_readonly("num_params", &PpoUpdate::num_params)
      .def("values", &bound_values, py::arg("params"), py::arg("obs"))
      .def("update", &bound_update, py::kw_only(), py::arg("params"), py::arg("first_moments"),
           py::arg("second_moments"), py::arg("num_updates"), py::arg("observations"), py::arg("actions"),
           py::arg("log_probs"), py::arg("advantages"), py::arg("returns"), py::arg("values"), py::arg("order"),
           py::arg("learning_rate"));
}

}  // namespace tipl
