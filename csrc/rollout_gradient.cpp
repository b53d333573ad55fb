#include "rollout_gradient.h"

#include <algorithm>
#include <cmath>

#include "check.h"
#include "cpu/parallel.h"
#include "cpu/sequence_group.h"

namespace tipl {
namespace {

constexpr char kObject[] = "the rollout";
constexpr ptrdiff_t kMostSequences = 1 << 20;

ptrdiff_t checked_size(const char *name, ptrdiff_t size, ptrdiff_t most) {
  check(1 <= size && size <= most, "RolloutGradient: ", name, " must lie in [1, ", most, "], got ", size);
  return size;
}

}  // namespace

RolloutGradient::RolloutGradient(const DecoderConfig &config, ptrdiff_t batch_size, ptrdiff_t num_tokens,
                                 ptrdiff_t num_threads)
    : config_(config),
      num_params_(parameters_of(config).end),
      batch_size_(checked_size("batch_size", batch_size, kMostSequences)),
      num_tokens_(checked_size("num_tokens", num_tokens, config.max_len)),
      pool_(std::make_unique<ThreadPool>(num_threads)) {
  for (ptrdiff_t first = 0; first < batch_size; first += kSequences) groups_.emplace_back(config_, num_tokens_);
}

RolloutGradient::~RolloutGradient() = default;

void RolloutGradient::forward(const float *param, const RolloutBatch &batch, float *out, Poll &poll) {
  const InUse::Hold hold(in_use_, "forward", kObject);
  check(1 <= batch.size && batch.size <= batch_size_, "forward: x must hold 1 to batch_size = ", batch_size_,
        " sequences, got ", batch.size);
  check(batch.tokens >= 1, "forward: x must hold at least one token, got ", batch.tokens);
  check(0 <= batch.horizon && batch.horizon <= num_tokens_ && batch.tokens <= num_tokens_ &&
            batch.tokens_read() <= num_tokens_,
        "forward: a sequence must have at most num_tokens = ", num_tokens_, " tokens, got ", batch.tokens,
        " and a horizon of ", batch.horizon);
  check(0.0f <= batch.dropout && batch.dropout < 1.0f, "forward: dropout must lie in [0, 1), got ", batch.dropout);
  const ptrdiff_t size = batch.tokens * config_.n_components;
  check(std::all_of(batch.x, batch.x + batch.size * size, [](float x) { return std::isfinite(x); }),
        "forward: x must be finite");
  last_size_ = last_predictions_ = 0;  // nothing to go back through, should this be interrupted
  const ptrdiff_t groups = (batch.size + kSequences - 1) / kSequences;
  for_each_item(*pool_, poll, groups, [&](int rank, ptrdiff_t group) {
    groups_[group].forward(param, batch, group * kSequences, out, rank, poll);
  });
  last_size_ = batch.size;
  last_predictions_ = batch.predictions();
}

void RolloutGradient::backward(const float *param, const float *dout, ptrdiff_t size, ptrdiff_t predictions,
                               float *grad, Poll &poll) {
  const InUse::Hold hold(in_use_, "backward", kObject);
  check_state(last_size_ > 0, "backward: there is no forward() to go back through");
  check(size == last_size_ && predictions == last_predictions_,
        "backward: grad must have the shape of what forward returned, (", last_size_, ", ", last_predictions_, ", ",
        config_.n_components, "), got (", size, ", ", predictions, ", ", config_.n_components, ")");
  const ptrdiff_t groups = (last_size_ + kSequences - 1) / kSequences;
  for_each_item(*pool_, poll, groups,
                [&](int rank, ptrdiff_t group) { groups_[group].backward(param, dout, rank, poll); });
  std::copy_n(groups_[0].grads(), num_params_, grad);
  for (ptrdiff_t group = 1; group < groups; ++group) {
    const float *const more = groups_[group].grads();
    for (ptrdiff_t i = 0; i < num_params_; ++i) grad[i] += more[i];
  }
}

}  // namespace tipl
