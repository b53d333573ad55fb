#include "cpu/sequence_group.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "cpu/isa.h"
#include "rng.h"

namespace tipl {
namespace {

// From the first column of a matrix to that of a token.
constexpr ptrdiff_t column_of(ptrdiff_t token) { return token * kSequences; }

ptrdiff_t widest(const DecoderConfig &config) {
  return round_up(std::max({3 * config.d_model, config.d_ff, config.token_width()}), kSequences);
}

}  // namespace

Parameters parameters_of(const DecoderConfig &config) {
  Parameters parameters;
  ptrdiff_t end = 0;
  const auto linear = [&](Parameters::Linear &at, ptrdiff_t in, ptrdiff_t out) {
    at = {end, end + out * in, in, out};
    end += out * in + out;
  };
  const auto norm = [&](Parameters::Norm &at) {
    at = {end, end + config.d_model};
    end += 2 * config.d_model;
  };
  tensor_specs(config);  // throws
  const ptrdiff_t d = config.d_model;
  linear(parameters.embed, config.token_width(), d);
  parameters.positions = end;
  end += config.max_len * d;
  parameters.blocks.resize(config.n_layer);
  for (Parameters::Block &block : parameters.blocks) {
    norm(block.norm1);
    linear(block.qkv, d, 3 * d);
    linear(block.proj, d, d);
    norm(block.norm2);
    linear(block.fc1, d, config.d_ff);
    linear(block.fc2, config.d_ff, d);
  }
  norm(parameters.norm);
  linear(parameters.head, d, config.n_components);
  parameters.end = end;
  return parameters;
}

SequenceGroup::SequenceGroup(const DecoderConfig &config, ptrdiff_t num_tokens)
    : config_(config),
      parameters_(parameters_of(config)),
      stride_((num_tokens + 1) * kSequences),
      products_(policy_kernels()),
      kernels_(gradient_kernels()),
      tokens_(matrix(config.token_width())),
      z_(matrix(config.d_model)),
      dz_(matrix(config.d_model)),
      blocks_(config.n_layer),
      norm_(normal(config.d_model)),
      predictions_(matrix(config.n_components)),
      dpredictions_(matrix(config.n_components)),
      dhead_(matrix(config.n_components)),
      output_({widest(config), stride_}),
      weights_({num_tokens, kSequences}),
      dweights_({num_tokens, kSequences}),
      by_rows_({stride_, widest(config)}),
      grads_({parameters_.end}) {
  const ptrdiff_t d = config.d_model;
  for (Block &block : blocks_) {
    block.norm1 = normal(d);
    block.norm2 = normal(d);
    block.qkv = matrix(3 * d);
    block.dqkv = matrix(3 * d);
    block.log_sums = matrix(config.n_head);
    for (AlignedFloats *it : {&block.attended, &block.mask1, &block.dproj, &block.mask2, &block.dfc2}) *it = matrix(d);
    for (AlignedFloats *it : {&block.fc1, &block.dfc1, &block.hidden}) *it = matrix(config.d_ff);
  }
}

SequenceGroup::Normal SequenceGroup::normal(ptrdiff_t rows) const {
  return {matrix(rows), AlignedFloats({stride_}), matrix(rows), matrix(rows)};
}

// ---- forward

void SequenceGroup::forward(const float *param, const RolloutBatch &batch, ptrdiff_t first, float *out, int rank,
                            Poll &poll) {
  const ptrdiff_t k = config_.n_components, predictions = batch.predictions();
  first_ = first;
  first_predicting_ = batch.tokens_read() - predictions;
  sequences_ = std::min(kSequences, batch.size - first);
  batch_ = batch;
  take_tokens();
  take_masks();
  advance(param, {0, batch.tokens}, rank, poll);
  for (ptrdiff_t token = batch.tokens; token < batch.tokens_read(); ++token) {
    write_token(token, predictions_.data() + column_of(token - 1), tokens_.data() + column_of(token - 1));
    advance(param, {token, token + 1}, rank, poll);
  }
  for (ptrdiff_t s = 0; s < sequences_; ++s) {
    for (ptrdiff_t i = 0; i < predictions; ++i) {
      float *const to = out + ((first + s) * predictions + i) * k;
      for (ptrdiff_t r = 0; r < k; ++r) to[r] = predictions_.data()[r * stride_ + column_of(first_predicting_ + i) + s];
    }
  }
}

// Writes what embed reads of the tokens given; sequences that the group lacks are zero.
void SequenceGroup::take_tokens() {
  const ptrdiff_t k = config_.n_components;
  float *const x = tokens_.data();
  for (ptrdiff_t t = 0; t < batch_.tokens_read(); ++t) {
    float *const since_prefix = x + 2 * k * stride_ + column_of(t);
    for (ptrdiff_t s = 0; s < kSequences; ++s) {
      const bool there = s < sequences_;
      const double since = static_cast<double>(t) - static_cast<double>(there ? batch_.prefix_ends[first_ + s] : t);
      since_prefix[s] = static_cast<float>(since) / static_cast<float>(config_.max_len);
      if (t >= batch_.tokens) continue;
      const float *const now = batch_.x + ((first_ + s) * batch_.tokens + t) * k;
      for (ptrdiff_t r = 0; r < k; ++r) {
        const float value = there ? now[r] : 0.0f, before = there && t > 0 ? now[r - k] : value;
        x[r * stride_ + column_of(t) + s] = value;
        x[(k + r) * stride_ + column_of(t) + s] = config_.diff_scale * (value - before);
      }
    }
  }
}

// Writes token number `token`, given its coordinates and those of the one before it, both (k, stride).
void SequenceGroup::write_token(ptrdiff_t token, const float *x, const float *before) {
  const ptrdiff_t k = config_.n_components;
  float *const to = tokens_.data() + column_of(token);
  for (ptrdiff_t r = 0; r < k; ++r) {
    for (ptrdiff_t s = 0; s < kSequences; ++s) {
      const float value = x[r * stride_ + s];
      to[r * stride_ + s] = value;
      to[(k + r) * stride_ + s] = config_.diff_scale * (value - before[r * stride_ + s]);
    }
  }
}

// Draws which outputs of the blocks are dropped: mask 2 l + i is that of layer l after attention (i = 0) and after fc2
// (i = 1). Unit u of token t of sequence b is kept where half u mod 8 of philox4x32({u / 8, t, mask, b}, seed) is at
// least dropout * 2^16, and is then divided by the share that is kept.
void SequenceGroup::take_masks() {
  const auto threshold = static_cast<uint32_t>(std::min(std::lround(batch_.dropout * 0x1p16f), 0xffffL));
  const float kept = 1.0f / (1.0f - static_cast<float>(threshold) * 0x1p-16f);
  const std::array<uint32_t, 2> key{static_cast<uint32_t>(batch_.seed), static_cast<uint32_t>(batch_.seed >> 32)};
  for (ptrdiff_t mask = 0; mask < 2 * std::ssize(blocks_); ++mask) {
    Block &block = blocks_[mask / 2];
    float *const to = (mask % 2 == 0 ? block.mask1 : block.mask2).data();
    if (threshold == 0) {
      std::fill_n(to, config_.d_model * stride_, 1.0f);
      continue;
    }
    for (ptrdiff_t t = 0; t < batch_.tokens_read(); ++t) {
      for (ptrdiff_t s = 0; s < sequences_; ++s) {
        for (ptrdiff_t unit = 0; unit < config_.d_model; unit += 8) {
          const auto words = philox4x32({static_cast<uint32_t>(unit / 8), static_cast<uint32_t>(t),
                                         static_cast<uint32_t>(mask), static_cast<uint32_t>(first_ + s)},
                                        key);
          for (ptrdiff_t i = 0; i < std::min<ptrdiff_t>(8, config_.d_model - unit); ++i) {
            const uint32_t half = words[i / 2] >> (16 * (i % 2)) & 0xffff;
            to[(unit + i) * stride_ + column_of(t) + s] = half >= threshold ? kept : 0.0f;
          }
        }
      }
    }
  }
}

// Computes the predictions that follow some tokens, given all before them.
void SequenceGroup::advance(const float *param, Tokens tokens, int rank, Poll &poll) {
  const ptrdiff_t d = config_.d_model;
  multiply(parameters_.embed, param, tokens_.data(), z_.data(), tokens);
  for (ptrdiff_t t = tokens.begin; t < tokens.end; ++t) {
    const float *const position = param + parameters_.positions + t * d;
    for (ptrdiff_t r = 0; r < d; ++r) {
      float *const z = z_.data() + r * stride_ + column_of(t);
      for (ptrdiff_t s = 0; s < kSequences; ++s) z[s] += position[r];
    }
  }
  for (size_t i = 0; i < blocks_.size(); ++i) {
    poll(rank);
    const Parameters::Block &at = parameters_.blocks[i];
    Block &block = blocks_[i];
    normalize(at.norm1, param, z_.data(), block.norm1, tokens);
    multiply(at.qkv, param, block.norm1.y.data(), block.qkv.data(), tokens);
    if (i + 1 == blocks_.size()) tokens = tokens.from(first_predicting_);
    const ptrdiff_t begin = column_of(tokens.begin), columns = tokens.columns();
    attend(block, tokens);
    multiply(at.proj, param, block.attended.data(), output_.data(), tokens);
    kernels_.add_masked(output_.data() + begin, block.mask1.data() + begin, stride_, d, columns, z_.data() + begin);
    normalize(at.norm2, param, z_.data(), block.norm2, tokens);
    multiply(at.fc1, param, block.norm2.y.data(), block.fc1.data(), tokens);
    kernels_.gelu(block.fc1.data() + begin, stride_, config_.d_ff, columns, block.hidden.data() + begin);
    multiply(at.fc2, param, block.hidden.data(), output_.data(), tokens);
    kernels_.add_masked(output_.data() + begin, block.mask2.data() + begin, stride_, d, columns, z_.data() + begin);
  }
  normalize(parameters_.norm, param, z_.data(), norm_, tokens);
  multiply(parameters_.head, param, norm_.y.data(), output_.data(), tokens);
  for (ptrdiff_t r = 0; r < config_.n_components; ++r) {
    const ptrdiff_t row = r * stride_ + column_of(tokens.begin);
    for (ptrdiff_t c = row; c < row + tokens.columns(); ++c) {
      predictions_.data()[c] = tokens_.data()[c] + config_.out_scale * output_.data()[c];
    }
  }
}

HeadColumns SequenceGroup::head_columns(Block &block, ptrdiff_t head, ptrdiff_t token) {
  const ptrdiff_t D = config_.head_dim(), to_keys = config_.d_model * stride_;
  const float *const q = block.qkv.data() + head * D * stride_;
  return {.head_dim = D,
          .stride = stride_,
          .tokens = token + 1,
          .query = q + column_of(token),
          .keys = q + to_keys,
          .values = q + 2 * to_keys,
          .log_sum = block.log_sums.data() + head * stride_ + column_of(token),
          .weights = weights_.data()};
}

void SequenceGroup::attend(Block &block, Tokens tokens) {
  const ptrdiff_t D = config_.head_dim();
  for (ptrdiff_t head = 0; head < config_.n_head; ++head) {
    for (ptrdiff_t t = tokens.begin; t < tokens.end; ++t) {
      kernels_.attend_columns(head_columns(block, head, t), block.attended.data() + head * D * stride_ + column_of(t));
    }
  }
}

// ---- backward

void SequenceGroup::backward(const float *param, const float *dout, int rank, Poll &poll) {
  const ptrdiff_t k = config_.n_components, predictions = batch_.predictions();
  std::fill_n(dpredictions_.data(), k * stride_, 0.0f);
  for (ptrdiff_t s = 0; s < sequences_; ++s) {
    for (ptrdiff_t i = 0; i < predictions; ++i) {
      const float *const from = dout + ((first_ + s) * predictions + i) * k;
      for (ptrdiff_t r = 0; r < k; ++r) {
        dpredictions_.data()[r * stride_ + column_of(first_predicting_ + i) + s] = from[r];
      }
    }
  }
  std::fill_n(dz_.data(), config_.d_model * stride_, 0.0f);
  for (Block &block : blocks_) std::fill_n(block.dqkv.data(), 3 * config_.d_model * stride_, 0.0f);
  for (ptrdiff_t token = batch_.tokens_read() - 1; token >= batch_.tokens; --token) {
    retreat(param, {token, token + 1}, rank, poll);
    to_token_before(param, token);
  }
  retreat(param, {0, batch_.tokens}, rank, poll);
  sum_gradients();
}

// Computes the gradients by all outputs of layers at some tokens, given those by their predictions and all that later
// tokens have added to the keys and values.
void SequenceGroup::retreat(const float *param, Tokens tokens, int rank, Poll &poll) {
  const ptrdiff_t d = config_.d_model;
  const Tokens predicting = tokens.from(first_predicting_);
  for (ptrdiff_t r = 0; r < config_.n_components; ++r) {
    const ptrdiff_t row = r * stride_ + column_of(predicting.begin);
    for (ptrdiff_t c = row; c < row + predicting.columns(); ++c)
      dhead_.data()[c] = config_.out_scale * dpredictions_.data()[c];
  }
  multiply_backward(parameters_.head, param, dhead_.data(), norm_.dy.data(), predicting);
  normalize_backward(parameters_.norm, param, norm_, predicting);
  for (size_t i = blocks_.size(); i-- > 0;) {
    poll(rank);
    const Parameters::Block &at = parameters_.blocks[i];
    Block &block = blocks_[i];
    const Tokens seen = i + 1 == blocks_.size() ? predicting : tokens;  // by what follows the attention
    const ptrdiff_t begin = column_of(seen.begin), columns = seen.columns();
    const float *const dz = dz_.data() + begin;
    kernels_.multiply_masked(dz, block.mask2.data() + begin, stride_, d, columns, block.dfc2.data() + begin);
    multiply_backward(at.fc2, param, block.dfc2.data(), block.dfc1.data(), seen);
    kernels_.gelu_backward(block.fc1.data() + begin, stride_, config_.d_ff, columns, block.dfc1.data() + begin);
    multiply_backward(at.fc1, param, block.dfc1.data(), block.norm2.dy.data(), seen);
    normalize_backward(at.norm2, param, block.norm2, seen);
    kernels_.multiply_masked(dz, block.mask1.data() + begin, stride_, d, columns, block.dproj.data() + begin);
    multiply_backward(at.proj, param, block.dproj.data(), output_.data(), seen);
    attend_backward(block, output_.data(), seen);
    multiply_backward(at.qkv, param, block.dqkv.data(), block.norm1.dy.data(), tokens);
    normalize_backward(at.norm1, param, block.norm1, tokens);
  }
}

void SequenceGroup::attend_backward(Block &block, const float *dattended, Tokens tokens) {
  const ptrdiff_t D = config_.head_dim(), d = config_.d_model;
  for (ptrdiff_t head = 0; head < config_.n_head; ++head) {
    const ptrdiff_t row = head * D * stride_;
    float *const dq = block.dqkv.data() + row;
    for (ptrdiff_t t = tokens.end - 1; t >= tokens.begin; --t) {
      kernels_.attend_columns_backward(head_columns(block, head, t), dattended + row + column_of(t), dq + column_of(t),
                                       dq + d * stride_, dq + 2 * d * stride_, dweights_.data());
    }
  }
}

// Adds the gradient by a token that was a prediction to that by the prediction, and, since a token holds the difference
// from the one before it, to that by the prediction before.
void SequenceGroup::to_token_before(const float *param, ptrdiff_t token) {
  const ptrdiff_t k = config_.n_components;
  multiply_backward(parameters_.embed, param, dz_.data(), output_.data(), {token, token + 1});
  for (ptrdiff_t r = 0; r < k; ++r) {
    float *const dprediction = dpredictions_.data() + r * stride_ + column_of(token);  // of the residual too
    const float *const dx = output_.data() + r * stride_ + column_of(token), *const ddiff = dx + k * stride_;
    for (ptrdiff_t s = 0; s < kSequences; ++s) {
      const float by_difference = config_.diff_scale * ddiff[s];
      dprediction[s - kSequences] += dprediction[s] + dx[s] + by_difference;
      if (token > batch_.tokens) dprediction[s - 2 * kSequences] -= by_difference;
    }
  }
}

// Writes grads_, given the gradients by the outputs of all layers.
void SequenceGroup::sum_gradients() {
  const ptrdiff_t d = config_.d_model;
  const Tokens all{0, batch_.tokens_read()}, predicting = all.from(first_predicting_);
  sum_gradient(parameters_.embed, dz_.data(), tokens_.data(), all);
  float *const positions = grads_.data() + parameters_.positions;
  std::fill_n(positions, config_.max_len * d, 0.0f);
  for (ptrdiff_t r = 0; r < d; ++r) {
    for (ptrdiff_t t = 0; t < all.end; ++t) {
      const float *const dz = dz_.data() + r * stride_ + column_of(t);
      for (ptrdiff_t s = 0; s < kSequences; ++s) positions[t * d + r] += dz[s];
    }
  }
  for (size_t i = 0; i < blocks_.size(); ++i) {
    const Parameters::Block &at = parameters_.blocks[i];
    const Block &block = blocks_[i];
    const Tokens seen = i + 1 == blocks_.size() ? predicting : all;
    sum_gradient(at.norm1, block.norm1, all);
    sum_gradient(at.qkv, block.dqkv.data(), block.norm1.y.data(), all);
    sum_gradient(at.proj, block.dproj.data(), block.attended.data(), seen);
    sum_gradient(at.norm2, block.norm2, seen);
    sum_gradient(at.fc1, block.dfc1.data(), block.norm2.y.data(), seen);
    sum_gradient(at.fc2, block.dfc2.data(), block.hidden.data(), seen);
  }
  sum_gradient(parameters_.norm, norm_, predicting);
  sum_gradient(parameters_.head, dhead_.data(), norm_.y.data(), predicting);
}

// ---- layers, on the columns of some tokens

void SequenceGroup::normalize(const Parameters::Norm &at, const float *param, const float *z, Normal &norm,
                              Tokens tokens) const {
  const ptrdiff_t begin = column_of(tokens.begin);
  kernels_.normalize(z + begin, stride_, config_.d_model, tokens.columns(), param + at.weight, param + at.bias,
                     norm.normal.data() + begin, norm.inverse.data() + begin, norm.y.data() + begin);
}

// Adds to dz_.
void SequenceGroup::normalize_backward(const Parameters::Norm &at, const float *param, const Normal &norm,
                                       Tokens tokens) {
  const ptrdiff_t begin = column_of(tokens.begin);
  kernels_.normalize_backward(norm.dy.data() + begin, norm.normal.data() + begin, norm.inverse.data() + begin,
                              param + at.weight, stride_, config_.d_model, tokens.columns(), dz_.data() + begin);
}

void SequenceGroup::multiply(const Parameters::Linear &at, const float *param, const float *x, float *y,
                             Tokens tokens) const {
  const ptrdiff_t begin = column_of(tokens.begin);
  products_.multiply({param + at.weight, at.in, 1}, at.out, at.in, x + begin, stride_, param + at.bias,
                     tokens.columns(), y + begin, stride_);
}

void SequenceGroup::multiply_backward(const Parameters::Linear &at, const float *param, const float *dy, float *dx,
                                      Tokens tokens) const {
  const ptrdiff_t begin = column_of(tokens.begin);
  products_.multiply({param + at.weight, 1, at.in}, at.in, at.out, dy + begin, stride_, nullptr, tokens.columns(),
                     dx + begin, stride_);
}

void SequenceGroup::sum_gradient(const Parameters::Linear &at, const float *dy, const float *x, Tokens tokens) {
  const ptrdiff_t begin = column_of(tokens.begin), columns = tokens.columns(), width = round_up(at.in, kSequences);
  products_.transpose_matrix(x + begin, stride_, at.in, columns, by_rows_.data(), width);
  products_.multiply({dy + begin, stride_, 1}, at.out, columns, by_rows_.data(), width, nullptr, at.in,
                     grads_.data() + at.weight, at.in);
  products_.sum_rows(dy + begin, stride_, at.out, columns, grads_.data() + at.bias);
}

void SequenceGroup::sum_gradient(const Parameters::Norm &at, const Normal &norm, Tokens tokens) {
  const ptrdiff_t begin = column_of(tokens.begin), columns = tokens.columns();
  kernels_.dot_rows(norm.dy.data() + begin, norm.normal.data() + begin, stride_, config_.d_model, columns,
                    grads_.data() + at.weight);
  products_.sum_rows(norm.dy.data() + begin, stride_, config_.d_model, columns, grads_.data() + at.bias);
}

}  // namespace tipl
