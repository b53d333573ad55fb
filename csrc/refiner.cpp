#include "refiner.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "check.h"
#include "cpu/aligned.h"
#include "cpu/parallel.h"
#include "cpu/refiner_block.h"

namespace tipl {
namespace {

constexpr char kObject[] = "the refiner";
constexpr ptrdiff_t kMost = 4096;               // hidden units, features, kinds
constexpr ptrdiff_t kMostInGradient = 1 << 16;  // weights of a run
constexpr ptrdiff_t kWidth = 128;               // weights of a block that only answers

RefinerConfig checked(const RefinerConfig &config) {
  const auto size = [](const char *name, ptrdiff_t value) {
    check(1 <= value && value <= kMost, "Refiner: ", name, " must lie in [1, ", kMost, "], got ", value);
  };
  size("hidden", config.hidden);
  size("num_signed", config.num_signed);
  size("num_unsigned", config.num_unsigned);
  size("num_kinds", config.num_kinds);
  check(std::isfinite(config.bound) && config.bound > 0.0f, "Refiner: bound must be a positive number, got ",
        config.bound);
  check(std::isfinite(config.linear_gain), "Refiner: linear_gain must be finite, got ", config.linear_gain);
  return config;
}

}  // namespace

Refiner::Refiner(const RefinerConfig &config, ptrdiff_t num_threads)
    : config_(checked(config)),
      num_params_(RefinerParameters(config).end),
      pool_(std::make_unique<ThreadPool>(num_threads)) {}

Refiner::~Refiner() = default;

void Refiner::check_inputs(const char *where, const RefinerInputs &inputs) const {
  const ptrdiff_t count = inputs.runs * inputs.weights;
  check(std::all_of(inputs.kinds, inputs.kinds + count,
                    [&](int64_t kind) { return 0 <= kind && kind < config_.num_kinds; }),
        where, ": kinds must lie in [0, ", config_.num_kinds, ")");
}

void Refiner::answer(const float *param, const RefinerInputs &inputs, float *out, Poll &poll) {
  const InUse::Hold hold(in_use_, "answer", kObject);
  check_inputs("answer", inputs);
  const ptrdiff_t m = inputs.weights, J = inputs.horizons, F = config_.features();
  const ptrdiff_t blocks = (m + kWidth - 1) / kWidth;  // of each run
  std::vector<RefinerBlock> of_thread;
  for (int rank = 0; rank < pool_->size(); ++rank) of_thread.emplace_back(config_, std::min(m, kWidth), false);
  for_each_item(*pool_, poll, inputs.runs * blocks, [&](int rank, ptrdiff_t item) {
    RefinerBlock &block = of_thread[rank];
    const ptrdiff_t run = item / blocks, first = item % blocks * kWidth, at = run * m + first;
    block.take(param, inputs.features + at * F, inputs.kinds + at, std::min(kWidth, m - first));
    for (ptrdiff_t row = run * J; row < (run + 1) * J; ++row) {
      block.answer(param, inputs.forecasts + row * m + first, inputs.places + row * RefinerConfig::kPlace,
                   out + row * m + first);
    }
  });
}

void Refiner::loss(const float *param, const RefinerInputs &inputs, const float *gain, const float *offset,
                   float *errors, float *grad, Poll &poll) {
  const InUse::Hold hold(in_use_, "loss", kObject);
  check_inputs("loss", inputs);
  const ptrdiff_t m = inputs.weights, R = inputs.runs, F = config_.features();
  check(R >= 1, "loss: features must hold at least one run, got ", R);
  check(1 <= m && m <= kMostInGradient, "loss: a run must have 1 to ", kMostInGradient, " weights, got ", m);
  check(inputs.horizons == 1, "loss: forecasts must hold one horizon, got ", inputs.horizons);
  struct Part {
    RefinerBlock block;
    AlignedFloats answers;
  };
  std::vector<Part> of_thread;
  for (int rank = 0; rank < pool_->size(); ++rank) of_thread.push_back({{config_, m, true}, AlignedFloats({m})});
  AlignedFloats grads({R, num_params_});
  for_each_item(*pool_, poll, R, [&](int rank, ptrdiff_t run) {
    auto &[block, answers] = of_thread[rank];
    const ptrdiff_t at = run * m;
    block.take(param, inputs.features + at * F, inputs.kinds + at, m);
    block.answer(param, inputs.forecasts + at, inputs.places + run * RefinerConfig::kPlace, answers.data());
    double squares = 0.0;
    for (ptrdiff_t i = 0; i < m; ++i) {
      const float left = gain[at + i] * answers.data()[i] + offset[at + i];
      squares += static_cast<double>(left) * static_cast<double>(left);
      answers.data()[i] = left;
    }
    const double error = std::sqrt(squares);
    errors[run] = static_cast<float>(error);
    const auto scale = static_cast<float>(error > 0.0 ? 1.0 / (error * static_cast<double>(R)) : 0.0);
    for (ptrdiff_t i = 0; i < m; ++i) answers.data()[i] *= scale * gain[at + i];  // the gradient by the answer
    block.backward(param, answers.data(), grads.data() + run * num_params_);
  });
  std::copy_n(grads.data(), num_params_, grad);
  for (ptrdiff_t run = 1; run < R; ++run) {
    const float *const more = grads.data() + run * num_params_;
    for (ptrdiff_t i = 0; i < num_params_; ++i) grad[i] += more[i];
  }
}

}  // namespace tipl
