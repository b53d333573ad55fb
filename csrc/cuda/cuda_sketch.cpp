#include "cuda/cuda_sketch.h"

#include <algorithm>
#include <utility>

#include "cpu/aligned.h"
#include "sketch_signs.h"

namespace tipl::cuda {
namespace {

constexpr ptrdiff_t kPitch = 64;  // y and directions are zero up to a multiple of it

static_assert(kMappedRows == kBlockRows);

const SketchConfig &checked(const SketchConfig &config, const float *directions) {
  constexpr ptrdiff_t kMostOutputs = 65535;  // of a grid of blocks
  check_sketch(config, directions);
  check(config.outputs() <= kMostOutputs, "RowSketch: on a CUDA device range_size must lie in [1, ",
        kMostOutputs - 1 - config.test_size, "], got ", config.range_size);
  return config;
}

template <class T>
Buffer<T> uploaded(const std::vector<T> &values, const Stream &stream) {
  Buffer<T> buffer(static_cast<double>(values.size()));
  stream.copy(buffer.data(), values.data(), values.size(), cudaMemcpyHostToDevice);
  return buffer;
}

}  // namespace

struct CudaSketchMath::Sums final : SketchSums {
  explicit Sums(const SketchConfig &config)
      : co_range(static_cast<double>(config.outputs()) * static_cast<double>(config.num_features)),
        gram(static_cast<double>(config.outputs()) * static_cast<double>(config.outputs())) {}

  Buffer<double> co_range;  // C (l + q + 1, p)
  Buffer<double> gram;      // G (l + q + 1, l + q + 1)
  Event changed;            // behind the last work that wrote to them
  bool half_added = false;  // a CUDA call has failed while a block was added
};

// ---- a block of rows: one step maps it, another adds it

class CudaSketchMath::Block final : public SketchBlock {
 public:
  Block(RowView x, const float *origin, CudaSketchMath &math, Sums &sums)
      : x_(x), origin_(origin), math_(math), sums_(sums), squares_(x.count) {}

  RowView rows() const noexcept override { return x_; }
  void move_rows(RowView x) noexcept override { x_ = x; }
  const std::vector<double> &squares() const noexcept override { return squares_; }
  ptrdiff_t steps() const noexcept override { return 2; }
  ptrdiff_t map_steps() const noexcept override { return 1; }
  ptrdiff_t steps_due(ptrdiff_t) const noexcept override { return steps(); }

  void advance(ptrdiff_t until, bool, Poll &) override {
    if (steps_done_ >= until) return;  // a call that cannot fail: the block may be in the sums already
    const OnDevice on(math_.device_);
    if (steps_done_ == 0) {
      map();
      steps_done_ = 1;
    }
    if (until > 1) {
      add();
      steps_done_ = 2;
    }
  }

 private:
  void map() {
    const ptrdiff_t l = math_.config_.range_size;
    on_device_ = math_.work_.bring(x_);
    device_origin_ = math_.work_.bring_origin(origin_);
    math_.map_rows(on_device_, device_origin_);
    auto range = std::make_shared<std::vector<float>>(x_.count * l);
    math_.read_mapped(x_.count, l, range->data(), squares_.data());
    range_ = std::move(range);
  }

  void add() {
    math_.readable(sums_);
    const ptrdiff_t outputs = math_.config_.outputs();
    const Stream &stream = math_.stream();
    sums_.range_rows.push_back(range_);  // which may throw: before anything is added
    sums_.half_added = true;
    sums_.changed.hold(stream);
    add_co_range(on_device_, device_origin_, math_.config_.num_features, math_.y_.data(), math_.y_pitch_, outputs,
                 sums_.co_range.data(), stream);
    add_gram(math_.y_.data(), math_.y_pitch_, outputs, sums_.gram.data(), stream);
    sums_.changed.record(stream);
    sums_.half_added = false;
    for (const double squares : squares_) sums_.squares += squares;
    sums_.rows += x_.count;
  }

  RowView x_;
  const float *const origin_;
  CudaSketchMath &math_;
  Sums &sums_;
  std::vector<double> squares_;
  std::shared_ptr<const std::vector<float>> range_;
  DeviceRows on_device_{};
  const float *device_origin_ = nullptr;
  ptrdiff_t steps_done_ = 0;
};

std::unique_ptr<SketchBlock> CudaSketchMath::begin_block(RowView x, const float *origin, SketchSums &sums) {
  return std::make_unique<Block>(x, origin, *this, static_cast<Sums &>(sums));
}

// ---- the map

SketchMap::SketchMap(const SketchConfig &config, const float *given, Poll &poll) {
  const Stream stream;
  const ptrdiff_t p = config.num_features, l = config.range_size;
  if (given != nullptr) {
    pitch = round_up(l, kPitch);
    std::vector<float> transposed(p * pitch);
    for (ptrdiff_t j = 0; j < l; ++j) {
      poll(0);
      for (ptrdiff_t c = 0; c < p; ++c) transposed[c * pitch + j] = given[j * p + c];
    }
    directions = uploaded(transposed, stream);
    stream.wait();
    return;
  }
  std::vector<uint32_t> all_starts;
  std::vector<uint16_t> all_codes;
  std::vector<int64_t> firsts;
  for (ptrdiff_t chunk = 0; chunk < sign_chunks(config); ++chunk) {
    poll(0);
    const Signs signs = draw_signs(config, chunk);
    firsts.push_back(static_cast<int64_t>(all_codes.size()));
    all_starts.insert(all_starts.end(), signs.starts.begin(), signs.starts.end());
    all_codes.insert(all_codes.end(), signs.codes.begin(), signs.codes.end());
  }
  starts = uploaded(all_starts, stream);
  codes = uploaded(all_codes, stream);
  first_code = uploaded(firsts, stream);
  stream.wait();
}

CudaSketchMath::CudaSketchMath(const SketchConfig &config, const float *directions, int device, Poll &poll)
    : CudaSketchMath(config, std::make_shared<const SketchMap>(checked(config, directions), directions, poll), device) {
}

std::vector<float> CudaSketchMath::directions(Poll &poll) {
  if (!directed()) return {};
  const OnDevice on(device_);
  const ptrdiff_t p = config_.num_features, l = config_.range_size, pitch = map_->pitch;
  std::vector<float> transposed(p * pitch), rows(l * p);
  stream().copy(transposed.data(), map_->directions.data(), transposed.size(), cudaMemcpyDeviceToHost);
  stream().wait();
  for (ptrdiff_t j = 0; j < l; ++j) {
    poll(0);
    for (ptrdiff_t c = 0; c < p; ++c) rows[j * p + c] = transposed[c * pitch + j];
  }
  return rows;
}

void CudaSketchMath::map_rows(DeviceRows x, const float *origin) {
  const ptrdiff_t p = config_.num_features, mapped = config_.outputs() - 1;
  const auto spans = static_cast<double>(map_spans(p));
  if (y_.size() == 0) {
    y_shares_ = Buffer<float>(spans * static_cast<double>(mapped) * kMappedRows);
    squares_shares_ = Buffer<double>(spans * kMappedRows);
    squares_ = Buffer<double>(kMappedRows);
    y_ = Buffer<float>(static_cast<double>(y_pitch_) * kMappedRows);
  }
  const MapShares shares{y_shares_.data(), squares_shares_.data()};
  if (directed()) {
    map_directions(x, origin, p, map_->directions.data(), map_->pitch, mapped, shares, stream());
  } else {
    const SignTables signs{map_->starts.data(), map_->codes.data(), map_->first_code.data()};
    map_signs(x, origin, p, signs, mapped, shares, stream());
  }
  add_shares(shares, x.count, p, mapped, y_.data(), y_pitch_, squares_.data(), stream());
}

void CudaSketchMath::read_mapped(ptrdiff_t rows, ptrdiff_t count, float *y, double *squares) {
  if (count > 0) {
    succeed(cudaMemcpy2DAsync(y, count * sizeof(float), y_.data(), y_pitch_ * sizeof(float), count * sizeof(float),
                              rows, cudaMemcpyDeviceToHost, stream()),
            "cudaMemcpy2DAsync");
  }
  stream().copy(squares, squares_.data(), rows, cudaMemcpyDeviceToHost);
  stream().wait();
}

void CudaSketchMath::apply(RowView x, const float *origin, float *y, double *squares, Poll &poll) {
  const OnDevice on(device_);
  const ptrdiff_t mapped = config_.outputs() - 1;
  const float *const zero = work_.bring_origin(origin);
  work_.for_each_run(x, poll, [&](DeviceRows rows, ptrdiff_t begin) {
    map_rows(rows, zero);
    read_mapped(rows.count, mapped, y + begin * mapped, squares + begin);
  });
}

// ---- rows

CudaSketchMath::CudaSketchMath(const SketchConfig &config, std::shared_ptr<const SketchMap> map, int device)
    : config_(config),
      device_(device),
      work_(config.num_features),
      map_(std::move(map)),
      y_pitch_(round_up(config.outputs(), kPitch)) {}

std::unique_ptr<SketchMath> CudaSketchMath::another() const {
  const OnDevice on(device_);
  return std::unique_ptr<SketchMath>(new CudaSketchMath(config_, map_, device_));
}

std::vector<double> CudaSketchMath::squares(RowView x, const float *origin, Poll &poll) {
  const OnDevice on(device_);
  return work_.squares(x, origin, poll);
}

std::vector<double> CudaSketchMath::products(RowView x, Poll &poll) {
  const OnDevice on(device_);
  std::vector<double> out(x.count * x.count);
  std::vector<float> first(config_.num_features);
  work_.copy_rows(x.part(0, 1), first.data());
  work_.products(x, x, first.data(), true, out.data(), poll);
  return out;
}

void CudaSketchMath::copy_rows(RowView x, float *to) {
  const OnDevice on(device_);
  work_.copy_rows(x, to);
}

// ---- sums

// Sums that may be read by what is asked of our stream from now on.
const CudaSketchMath::Sums &CudaSketchMath::readable(const SketchSums &sums) const {
  const auto &ours = static_cast<const Sums &>(sums);
  check_state(!ours.half_added, "a CUDA call has failed while rows were added, and the sketch is lost; fit anew");
  ours.changed.hold(stream());
  return ours;
}

std::shared_ptr<SketchSums> CudaSketchMath::no_rows() {
  const OnDevice on(device_);
  auto sums = std::make_shared<Sums>(config_);
  stream().set_bytes(sums->co_range.data(), 0, sums->co_range.size());
  stream().set_bytes(sums->gram.data(), 0, sums->gram.size());
  sums->changed.record(stream());
  return sums;
}

std::shared_ptr<SketchSums> CudaSketchMath::copy(const SketchSums &sums, Poll &) {
  const OnDevice on(device_);
  const Sums &from = readable(sums);
  auto copy = std::make_shared<Sums>(config_);
  stream().copy(copy->co_range.data(), from.co_range.data(), from.co_range.size(), cudaMemcpyDeviceToDevice);
  stream().copy(copy->gram.data(), from.gram.data(), from.gram.size(), cudaMemcpyDeviceToDevice);
  stream().wait();  // their owner may change them then
  copy->squares = from.squares;
  copy->rows = from.rows;
  copy->range_rows = from.range_rows;
  return copy;
}

std::shared_ptr<SketchSums> CudaSketchMath::restored(const double *co_range, const double *gram, Poll &) {
  const OnDevice on(device_);
  auto sums = std::make_shared<Sums>(config_);
  stream().copy(sums->co_range.data(), co_range, sums->co_range.size(), cudaMemcpyHostToDevice);
  stream().copy(sums->gram.data(), gram, sums->gram.size(), cudaMemcpyHostToDevice);
  stream().wait();
  return sums;
}

std::shared_ptr<SketchSums> CudaSketchMath::merged(const SketchSums &our_sums, const SketchSums &their_sums,
                                                   const float *shift, const float *step,
                                                   const std::vector<double> &gram, Poll &) {
  const OnDevice on(device_);
  const Sums &ours = readable(our_sums), &theirs = readable(their_sums);
  const ptrdiff_t p = config_.num_features, outputs = config_.outputs();
  auto both = std::make_shared<Sums>(config_);
  Buffer<float> moves(static_cast<double>(p + outputs));  // shift, then step
  stream().copy(moves.data(), shift, p, cudaMemcpyHostToDevice);
  stream().copy(moves.data() + p, step, outputs, cudaMemcpyHostToDevice);
  merge_co_ranges(ours.co_range.data(), theirs.co_range.data(), theirs.gram.data(), moves.data(), moves.data() + p,
                  outputs, p, both->co_range.data(), stream());
  stream().copy(both->gram.data(), gram.data(), gram.size(), cudaMemcpyHostToDevice);
  stream().wait();
  return both;
}

void CudaSketchMath::read_co_range(const SketchSums &sums, ptrdiff_t first, ptrdiff_t count, double *out, Poll &) {
  const OnDevice on(device_);
  const ptrdiff_t p = config_.num_features;
  stream().copy(out, readable(sums).co_range.data() + first * p, count * p, cudaMemcpyDeviceToHost);
  stream().wait();
}

std::vector<double> CudaSketchMath::read_gram(const SketchSums &sums) {
  const OnDevice on(device_);
  const Sums &from = readable(sums);
  std::vector<double> gram(from.gram.size());
  stream().copy(gram.data(), from.gram.data(), gram.size(), cudaMemcpyDeviceToHost);
  stream().wait();
  return gram;
}

void CudaSketchMath::combine(const SketchSums &sums, const double *weights, ptrdiff_t r, float *out, Poll &) {
  const OnDevice on(device_);
  const ptrdiff_t p = config_.num_features, outputs = config_.outputs();
  if (r == 0) return;
  const Sums &from = readable(sums);
  Buffer<double> on_device(static_cast<double>(outputs * r));
  Buffer<float> combined(static_cast<double>(r) * static_cast<double>(p));
  stream().copy(on_device.data(), weights, on_device.size(), cudaMemcpyHostToDevice);
  combine_rows(from.co_range.data(), p, outputs, p, on_device.data(), r, combined.data(), stream());
  stream().copy(out, combined.data(), combined.size(), cudaMemcpyDeviceToHost);
  stream().wait();
}

}  // namespace tipl::cuda
