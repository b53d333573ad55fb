// The bindings, which alone know Python: they check arrays, take pointers, release the GIL and call the engine.
#include "bind.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/decode_kernels.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "decode.h"
#include "policy.h"
#include "ppo.h"
#include "rng.h"

namespace tipl {

// ---- calls

bool WithoutGil::signal_raised() {
  bool raised = false;
  const uint32_t depth = fork_depth();
  with_gil([&] {
    raised = PyErr_CheckSignals() != 0;
    if (!raised && fork_depth() != depth) {
      PyErr_SetString(PyExc_RuntimeError, "a signal handler forked this process in the middle of a call to the engine");
      raised = true;
    }
    thread_ = PyEval_SaveThread();
  });
  return raised;
}

void WithoutGil::hang() noexcept {
  for (;;) pause();
}

namespace {

// Of Python objects that let one call at a time in: `with Turn([in_use], "fit", "the estimator"):`. The call of a
// second thread waits for the first; that of a signal handler, whose own thread it would wait for, is refused. Calls
// that take several objects take them in one order, so that no two wait for one another.
class Turn {
 public:
  Turn(const py::iterable &objects, std::string where, std::string what)
      : objects_(objects), where_(std::move(where)), what_(std::move(what)) {
    for (const py::handle object : objects_) in_use_.push_back(object.cast<InUse *>());
    check(std::find(in_use_.begin(), in_use_.end(), nullptr) == in_use_.end(), "Turn: objects must be InUse, got None");
    std::sort(in_use_.begin(), in_use_.end());
    in_use_.erase(std::unique(in_use_.begin(), in_use_.end()), in_use_.end());
  }

  void enter() {
    check_state(taken_ == 0, where_, ": this turn is taken already");
    try {
      for (; taken_ < in_use_.size(); ++taken_) check_free(take(*in_use_[taken_]), where_.c_str(), what_.c_str());
    } catch (...) {
      leave();
      throw;
    }
  }

  void leave() noexcept {
    for (; taken_ > 0; --taken_) in_use_[taken_ - 1]->leave();
  }

 private:
  static InUse::Holder take(InUse &object) {
    const InUse::Holder first = object.take();
    if (first != InUse::Holder::kOtherThread) return first;
    return without_gil([&](Poll &poll) {
      constexpr auto kLongest = std::chrono::microseconds(1000);
      auto nap = std::chrono::microseconds(10);
      for (;;) {
        std::this_thread::sleep_for(nap);
        poll(0);
        const InUse::Holder holder = object.take();
        if (holder != InUse::Holder::kOtherThread) return holder;
        nap = std::min(2 * nap, kLongest);
      }
    });
  }

  const py::tuple objects_;
  const std::string where_, what_;
  std::vector<InUse *> in_use_;  // in the order in which they are taken
  size_t taken_ = 0;
};

void bind_calls(py::module_ &m) {
  py::class_<InUse>(m, "InUse", "Which call has an object, if any. A copy, or one from a pickle, is free.")
      .def(py::init<>())
      .def("__reduce__", [](const py::object &self) { return py::make_tuple(py::type::of(self), py::tuple()); });
  py::class_<Turn>(m, "Turn", "A context in which a call has objects to itself.")
      .def(py::init<const py::iterable &, std::string, std::string>(), py::arg("objects"), py::arg("where"),
           py::arg("what"))
      .def("__enter__", &Turn::enter)
      .def("__exit__", [](Turn &turn, const py::args &) { turn.leave(); });
}

// ---- engine: instruction set, random numbers, threads

struct BoundPool : ThreadPool {
  using ThreadPool::ThreadPool;
  InUse in_use;
};

// The rank that ran each of `items`; an item of `fail_at` throws on its thread instead. For the pool's tests.
py::array_t<int32_t> pool_owners(BoundPool &pool, int items, const std::vector<ptrdiff_t> &fail_at) {
  check(items >= 0, "owners: items must be >= 0, got ", items);
  const InUse::Hold hold(pool.in_use, "owners", "the pool");
  py::array_t<int32_t> owners(items);
  int32_t *owner = owners.mutable_data();
  without_gil([&](Poll &poll) {
    pool.run(poll, [&](int rank) {
      const Range mine = share(items, rank, pool.size());
      for (ptrdiff_t item = mine.begin; item < mine.end; ++item) {
        poll(rank);
        const bool fails = std::find(fail_at.begin(), fail_at.end(), item) != fail_at.end();
        check_state(!fails, "owners: item ", item, " failed on rank ", rank);
        owner[item] = rank;
      }
    });
  });
  return owners;
}

// True where no rank ever passed one of `rounds` barriers before the others had reached it. For the pool's tests.
bool pool_barriers_hold(BoundPool &pool, int rounds) {
  const InUse::Hold use(pool.in_use, "barriers_hold", "the pool");
  return without_gil([&](Poll &poll) {
    std::vector<int> reached(pool.size());  // each written by its rank before a barrier, read by all after it
    std::atomic<bool> hold = true;
    bool stopped = false;  // written by rank 0 before a barrier, read by all after it
    pool.run([&](int rank) noexcept {
      for (int round = 1; round <= rounds && !stopped; ++round) {
        reached[rank] = round;
        pool.barrier(rank);
        for (const int other : reached) {
          if (other != round) hold = false;
        }
        if (rank == 0) stopped = poll.stopped(0);
        pool.barrier(rank);
      }
    });
    if (stopped) throw Interrupted();
    return hold.load();
  });
}

void bind_engine(py::module_ &m) {
  m.def(
      "isa", [] { return chosen_isa(); },
      "Instruction set of the kernels in use: baseline, avx2, avx512 or avx512bf16.");
  m.def("lanes", [] { return decode_kernels().lanes; }, "Floats in one register of that instruction set.");
  m.def("choose_isa", &choose_isa, py::arg("name"), py::arg("supported"),
        "The instruction set that TIPL_ISA=name (None: unset) picks on a CPU that supports these, worst first.");
  m.def("available_cpus", &available_cpus, "Cores that this process may use.");
  m.def("philox4x32", &philox4x32, py::arg("counter"), py::arg("key"), "Four words of Philox4x32-10.");
  m.def("normal4", &normal4, py::arg("seed"), py::arg("stream"), py::arg("index"),
        "Four standard normals: block `index` of a stream.");

  py::class_<BoundPool>(m, "ThreadPool", "The engine's thread pool, as its tests see it.")
      .def(py::init<ptrdiff_t>(), py::arg("num_threads"))
      .def_property_readonly("size", [](const BoundPool &pool) { return pool.size(); })
      .def("owners", &pool_owners, py::arg("items"), py::arg("fail_at") = std::vector<ptrdiff_t>(),
           "The rank that ran each item, (items,) int32; the items of `fail_at` throw on their threads.")
      .def("barriers_hold", &pool_barriers_hold, py::arg("rounds"),
           "Whether no rank ever passed a barrier before all had reached it.");
}

// ---- decoder

Precision precision_of(const char *name, const std::string &value, bool has_int8) {
  if (value == "float32") return Precision::kFloat32;
  if (value == "bfloat16") return Precision::kBfloat16;
  check(has_int8 && value == "int8", "Decoder: ", name, " must be float32",
        has_int8 ? ", bfloat16 or int8" : " or bfloat16", ", got ", value);
  return Precision::kInt8;
}

std::unique_ptr<Decoder> make_decoder(const DecoderConfig &config, const py::dict &weights,
                                      const DecoderOptions &options) {
  const std::vector<TensorSpec> specs = tensor_specs(config);
  std::vector<const float *> tensors;
  std::vector<py::array_t<float>> held;  // the dict may change meanwhile
  for (const TensorSpec &spec : specs) {
    check(weights.contains(spec.name), "Decoder: weights lack '", spec.name, "'");
    const bool matrix = spec.shape.size() == 2;
    const auto array = matrix ? checked_array<float>("Decoder", spec.name.c_str(), weights[spec.name.c_str()],
                                                     {{"out", spec.shape[0]}, {"in", spec.shape[1]}})
                              : checked_array<float>("Decoder", spec.name.c_str(), weights[spec.name.c_str()],
                                                     {{"out", spec.shape[0]}});
    tensors.push_back(array.data());
    held.push_back(array);
  }
  check(weights.size() == specs.size(), "Decoder: weights must be ", specs.size(), " tensors, got ", weights.size());
  return without_gil([&](Poll &poll) { return std::make_unique<Decoder>(config, tensors, options, poll); });
}

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

// n is int64 (B,). Rows of y that a sequence did not ask for are NaN.
py::array_t<float> generate(Decoder &decoder, const py::object &n) {
  const py::ssize_t B = decoder.batch_size(), k = decoder.config().n_components;
  const auto n_array = checked_array<int64_t>("generate", "n", n, {{"B", B}});
  const std::vector<int64_t> steps(n_array.data(), n_array.data() + B);
  // Decoder::generate refuses whatever does not fit.
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

void bind_decoder(py::module_ &m) {
  py::class_<Decoder>(m, "Decoder", "The forecaster over a KV cache; tipl.Decoder documents it.")
      .def(
          py::init([](int n_components, int n_layer, int n_head, int d_model, int d_ff, int max_len, float diff_scale,
                      float out_scale, const py::dict &weights, const std::string &dtype,
                      const std::string &cache_dtype, ptrdiff_t batch_size, ptrdiff_t cache_len,
                      ptrdiff_t num_threads) {
            return make_decoder({n_components, n_layer, n_head, d_model, d_ff, max_len, diff_scale, out_scale}, weights,
                                {precision_of("dtype", dtype, true), precision_of("cache_dtype", cache_dtype, false),
                                 batch_size, cache_len, num_threads});
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
  py::array_t<float> out = new_array<float>({N, R, act_dim});
  const float *const from = param.data(), *const seen = x.data();
  float *const to = out.mutable_data();
  without_gil([&](Poll &poll) { mean_actions(sizes, from, P, N, seen, R, to, poll); });
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
  py::array_t<float> out = new_array<float>({N, x.shape(1)});
  const float *const from = rows.data(), *const obs_data = x.data();
  const py::ssize_t stride = rows.shape(1), R = x.shape(1);
  float *const to = out.mutable_data();
  without_gil([&](Poll &poll) { update.values(from, stride, N, obs_data, R, to, poll); });
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
  without_gil([&](Poll &poll) { update.update(trials, steps, learning_rate, stats.data(), poll); });
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
  py::class_<PpoUpdate>(m, "PpoUpdate",
                        "PPO's update of many trials; tipl.collecting.population.Population documents it.")
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
  tipl::bind_calls(m);
  tipl::bind_engine(m);
  tipl::bind_decoder(m);
  tipl::bind_svd(m);
  tipl::bind_ppo(m);
}
