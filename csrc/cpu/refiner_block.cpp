#include "cpu/refiner_block.h"

#include <algorithm>

#include "cpu/isa.h"

namespace tipl {
namespace {

constexpr ptrdiff_t kPlace = RefinerConfig::kPlace;

}  // namespace

RefinerParameters::RefinerParameters(const RefinerConfig &config) {
  const ptrdiff_t H = config.hidden, inputs = config.num_signed + 1, places = config.num_kinds + kPlace;
  odd = 0;
  even = odd + H * inputs;
  even_bias = even + H * (config.num_unsigned + places);
  middle = even_bias + H;
  middle_bias = middle + H * H;
  head = middle_bias + H;
  linear = head + H;
  linear_bias = linear + inputs * places;
  end = linear_bias + inputs;
}

// Rows of both signs side by side take two widths, and some more floats, so that rows share no cache set.
RefinerBlock::RefinerBlock(const RefinerConfig &config, ptrdiff_t width, bool for_gradient)
    : config_(config),
      parameters_(config),
      inputs_(config.num_signed + 1),
      places_(config.num_kinds + kPlace),
      stride_(2 * round_up(width, kPad) + kPad),
      products_(policy_kernels()),
      kernels_(refiner_kernels()),
      signed_(matrix(inputs_)),
      clipped_(matrix(inputs_)),
      unsigned_(matrix(config.num_unsigned + config.num_kinds)),
      odd_(matrix(config.hidden)),
      even_(matrix(config.hidden)),
      slopes_of_linear_(matrix(inputs_)),
      hidden_(matrix(config.hidden)),
      middle_(matrix(config.hidden)),
      sum_({stride_}),
      shift_({config.hidden}),
      gain_({config.hidden}) {
  if (!for_gradient) return;
  for (AlignedFloats *it : {&hidden_slope_, &difference_, &dhidden_, &deven_, &dodd_}) *it = matrix(config.hidden);
  dlinear_ = matrix(inputs_);
  const ptrdiff_t widest = std::max({config.hidden, inputs_, config.num_unsigned + config.num_kinds});
  by_rows_ = AlignedFloats({stride_, round_up(widest, kPad)});
}

void RefinerBlock::take(const float *param, const float *features, const int64_t *kinds, ptrdiff_t count) {
  const ptrdiff_t S = config_.num_signed, U = config_.num_unsigned, F = config_.features();
  count_ = count;
  columns_ = round_up(count, kPad);
  std::fill_n(unsigned_.data(), (U + config_.num_kinds) * stride_, 0.0f);
  for (ptrdiff_t c = 0; c < columns_; ++c) {
    const bool there = c < count;
    for (ptrdiff_t r = 0; r < S; ++r) {
      const float x = there ? features[c * F + r] : 0.0f;
      signed_.data()[r * stride_ + c] = x;
      clipped_.data()[r * stride_ + c] = std::clamp(x, -config_.bound, config_.bound);
    }
    if (!there) continue;
    for (ptrdiff_t r = 0; r < U; ++r) unsigned_.data()[r * stride_ + c] = features[c * F + S + r];
    unsigned_.data()[(U + kinds[c]) * stride_ + c] = 1.0f;
  }
  const ptrdiff_t H = config_.hidden, width = U + places_;
  multiply({param + parameters_.odd, inputs_, 1}, H, S, clipped_.data(), nullptr, columns_, odd_.data());
  multiply({param + parameters_.even, width, 1}, H, U + config_.num_kinds, unsigned_.data(),
           param + parameters_.even_bias, columns_, even_.data());
  multiply({param + parameters_.linear, places_, 1}, inputs_, config_.num_kinds, unsigned_.data() + U * stride_,
           param + parameters_.linear_bias, columns_, slopes_of_linear_.data());
}

void RefinerBlock::answer(const float *param, const float *forecast, const float *place, float *out) {
  const ptrdiff_t S = config_.num_signed, H = config_.hidden, width = config_.num_unsigned + places_;
  std::copy_n(place, kPlace, place_);
  float *const raw = signed_.data() + S * stride_, *const clipped = clipped_.data() + S * stride_;
  for (ptrdiff_t c = 0; c < columns_; ++c) {
    raw[c] = c < count_ ? forecast[c] : 0.0f;
    clipped[c] = std::clamp(raw[c], -config_.bound, config_.bound);
  }
  const auto by_place = [&](const float *weight) {
    float sum = 0.0f;
    for (ptrdiff_t i = 0; i < kPlace; ++i) sum += weight[i] * place[i];
    return sum;
  };
  for (ptrdiff_t r = 0; r < H; ++r) {
    shift_.data()[r] = by_place(param + parameters_.even + r * width + width - kPlace);
    gain_.data()[r] = param[parameters_.odd + r * inputs_ + S];
  }
  const bool goes_back = by_rows_.data() != nullptr;
  kernels_.gelu_of_input({H, columns_, stride_, even_.data(), shift_.data(), odd_.data(), gain_.data(), clipped},
                         hidden_.data(), hidden_slope_.data());
  multiply({param + parameters_.middle, H, 1}, H, H, hidden_.data(), param + parameters_.middle_bias, 2 * columns_,
           middle_.data());
  kernels_.odd_head(middle_.data(), H, columns_, stride_, param + parameters_.head,
                    goes_back ? difference_.data() : nullptr, sum_.data());
  float *const sum = sum_.data();
  for (ptrdiff_t c = 0; c < columns_; ++c) sum[c] *= 0.5f;
  for (ptrdiff_t r = 0; r < inputs_; ++r) {
    const float *const x = signed_.data() + r * stride_, *const slope = slopes_of_linear_.data() + r * stride_;
    const float shift = by_place(param + parameters_.linear + r * places_ + places_ - kPlace);
    for (ptrdiff_t c = 0; c < columns_; ++c) sum[c] += config_.linear_gain * (slope[c] + shift) * x[c];
  }
  std::copy_n(sum, count_, out);
}

void RefinerBlock::backward(const float *param, const float *danswer, float *grad) {
  const ptrdiff_t H = config_.hidden, U = config_.num_unsigned, width = U + places_;
  float *const dsum = sum_.data();
  for (ptrdiff_t c = 0; c < columns_; ++c) dsum[c] = c < count_ ? danswer[c] : 0.0f;
  for (ptrdiff_t r = 0; r < inputs_; ++r) {
    const float *const x = signed_.data() + r * stride_;
    float *const to = dlinear_.data() + r * stride_;
    for (ptrdiff_t c = 0; c < columns_; ++c) to[c] = config_.linear_gain * dsum[c] * x[c];
  }

  for (ptrdiff_t c = 0; c < columns_; ++c) dsum[c] *= 0.5f;
  products_.multiply({difference_.data(), stride_, 1}, H, columns_, dsum, 1, nullptr, 1, grad + parameters_.head, 1);
  kernels_.odd_head_backward(middle_.data(), H, columns_, stride_, param + parameters_.head, dsum);
  sum_gradient(middle_.data(), H, 2 * columns_, hidden_.data(), H, grad + parameters_.middle, H);
  products_.sum_rows(middle_.data(), stride_, H, 2 * columns_, grad + parameters_.middle_bias);
  multiply({param + parameters_.middle, 1, H}, H, H, middle_.data(), nullptr, 2 * columns_, dhidden_.data());
  kernels_.input_backward(dhidden_.data(), hidden_slope_.data(), H, columns_, stride_, deven_.data(), dodd_.data());
  sum_gradient(dodd_.data(), H, columns_, clipped_.data(), inputs_, grad + parameters_.odd, inputs_);

  // What a horizon's place is multiplied by gets the sum over all weights, as a bias does.
  const auto by_place = [&](ptrdiff_t rows, ptrdiff_t columns, const float *bias, float *weight) {
    for (ptrdiff_t r = 0; r < rows; ++r) {
      for (ptrdiff_t i = 0; i < kPlace; ++i) weight[r * columns + columns - kPlace + i] = bias[r] * place_[i];
    }
  };
  sum_gradient(deven_.data(), H, columns_, unsigned_.data(), U + config_.num_kinds, grad + parameters_.even, width);
  products_.sum_rows(deven_.data(), stride_, H, columns_, grad + parameters_.even_bias);
  by_place(H, width, grad + parameters_.even_bias, grad + parameters_.even);
  sum_gradient(dlinear_.data(), inputs_, columns_, unsigned_.data() + U * stride_, config_.num_kinds,
               grad + parameters_.linear, places_);
  products_.sum_rows(dlinear_.data(), stride_, inputs_, columns_, grad + parameters_.linear_bias);
  by_place(inputs_, places_, grad + parameters_.linear_bias, grad + parameters_.linear);
}

void RefinerBlock::multiply(Factor w, ptrdiff_t rows, ptrdiff_t k, const float *x, const float *bias, ptrdiff_t columns,
                            float *y) const {
  products_.multiply(w, rows, k, x, stride_, bias, columns, y, stride_);
}

void RefinerBlock::sum_gradient(const float *dy, ptrdiff_t rows, ptrdiff_t columns, const float *x, ptrdiff_t x_rows,
                                float *grad, ptrdiff_t grad_stride) {
  const ptrdiff_t width = round_up(x_rows, kPad);
  products_.transpose_matrix(x, stride_, x_rows, columns, by_rows_.data(), width);
  products_.multiply({dy, stride_, 1}, rows, columns, by_rows_.data(), width, nullptr, x_rows, grad, grad_stride);
}

}  // namespace tipl
