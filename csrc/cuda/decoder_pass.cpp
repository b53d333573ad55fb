#include "cuda/decoder_pass.h"

#include <algorithm>
#include <climits>
#include <iterator>
#include <utility>

#include "check.h"
#include "cuda/decode.h"

namespace tipl::cuda {
namespace {

constexpr ptrdiff_t kMostTiles = 1024;  // of a pass of observed tokens: more take several launches

const DecoderConfig &checked(const DecoderConfig &config, const std::vector<const float *> &tensors,
                             const DecoderOptions &options, Poll &poll) {
  check_decoder(config, tensors, options, poll);
  check(options.weights != Precision::kInt8, "Decoder: dtype on a CUDA device must be float32 or bfloat16, got int8");
  return config;
}

int blocks_of(const DecodePlan &plan, const DeviceInfo &device) { return std::min(plan.parts(), device.num_sms); }

// Shared memory of the block that needs most of it.
size_t shared_bytes_of(const DecodePlan &plan, const DeviceInfo &device) {
  const size_t head = HeadWeights(plan).bytes, unit = UnitWeights(plan).bytes, work = Workspace(plan).bytes;
  const int blocks = blocks_of(plan, device);
  size_t most = 0;
  for (int block = 0; block < blocks; ++block) {
    size_t bytes = work + (has_ends_in(plan, block) && plan.ends_resident ? EndWeights(plan).bytes : 0);
    for (int round = 0; plan.resident && round * blocks < plan.parts(); ++round) {
      const int part = part_of(block, round, blocks);
      if (part < plan.parts()) bytes += part % (plan.H + plan.U) < plan.H ? head : unit;
    }
    most = std::max(most, bytes);
  }
  return most;
}

template <class T>
Buffer<T> uploaded(const std::vector<T> &values, const Stream &stream) {
  Buffer<T> buffer(static_cast<double>(values.size()));
  stream.copy(buffer.data(), values.data(), values.size(), cudaMemcpyHostToDevice);
  return buffer;
}

// A buffer of at least `count` numbers: this one, or a new one in its place.
template <class T>
T *grown(Buffer<T> &buffer, size_t count) {
  if (buffer.size() < count) {
    buffer = Buffer<T>();
    buffer = Buffer<T>(static_cast<double>(count));
  }
  return buffer.data();
}

}  // namespace

DecodePlan plan_of(const DecoderConfig &config, const DecoderOptions &options, const DeviceInfo &device,
                   bool many_rows) {
  constexpr int kMostUnits = 32, kLeastWidth = 16;
  DecodePlan plan{};
  plan.k = config.n_components;
  plan.L = config.n_layer;
  plan.H = config.n_head;
  plan.D = config.head_dim();
  plan.d = config.d_model;
  plan.d_ff = config.d_ff;
  plan.T = static_cast<int>(options.max_len);
  plan.B = static_cast<int>(options.batch_size);
  // As many parts as there are SMs, but none too thin, and not so many shares that adding them up takes long.
  const int wanted = std::clamp(device.num_sms / plan.L - plan.H, 1, kMostUnits);
  const int width = std::max(kLeastWidth, (plan.d_ff + wanted - 1) / wanted);
  plan.F = round_up4(std::min(width, plan.d_ff));
  plan.U = (plan.d_ff + plan.F - 1) / plan.F;
  plan.weight_bytes = options.weights == Precision::kFloat32 ? 4 : 2;
  plan.cache_bytes = options.cache == Precision::kFloat32 ? 4 : 2;
  plan.rows = many_rows ? kTileRows : 1;
  const size_t room = device.shared_bytes - 64;  // the kernel has some bytes of its own
  const auto fits = [&] { return shared_bytes_of(plan, device) <= room; };
  check(fits(), "Decoder: a model of n_components = ", plan.k, ", d_model = ", plan.d, ", head_dim = ", plan.D,
        " and d_ff = ", plan.d_ff, " needs ", shared_bytes_of(plan, device), " bytes of shared memory, and a block on ",
        device.name, " has ", room);
  plan.resident = 1;
  plan.resident = fits();
  plan.ends_resident = 1;
  plan.ends_resident = fits();
  return plan;
}

DecoderPass::DecoderPass(const DecoderConfig &config, const std::vector<const float *> &tensors,
                         const DecoderOptions &options, int device, Poll &poll)
    : config_(checked(config, tensors, options, poll)),
      options_(options),
      device_(device_info(device)),
      few_(plan_of(config, options, device_, false)),
      many_(plan_of(config, options, device_, true)) {
  const PackedParts packed(tensors, config, few_, options.weights, poll);
  heads_ = uploaded(packed.heads, stream_);
  units_ = uploaded(packed.units, stream_);
  ends_ = uploaded(packed.ends, stream_);
  pos_ = uploaded(packed.pos, stream_);
  const double B = static_cast<double>(options.batch_size), H = few_.H, L = few_.L;
  cache_ = Buffer<unsigned char>(L * H * B * static_cast<double>(few_.cache_head()) * few_.cache_bytes);
  state_ = Buffer<float>(H * B * 2 * few_.k);
  stop_at_ = Buffer<int>(1);
  first_bad_ = Buffer<unsigned long long>(1);
  stream_.wait();
}

std::optional<ForwardPass::NotFinite> DecoderPass::find_not_finite(const float *x, ptrdiff_t t,
                                                                   const std::vector<int64_t> &tokens, Poll &) {
  const OnDevice on(device_.index);
  const ptrdiff_t B = std::ssize(tokens);
  int64_t *device_tokens = grown(tokens_, B);
  stream_.copy(device_tokens, tokens.data(), B, cudaMemcpyHostToDevice);
  stream_.set_bytes(first_bad_.data(), 0xff, 1);
  launch_find_not_finite(x, B, t, config_.n_components, device_tokens, first_bad_.data(), stream_);
  unsigned long long first = 0;
  stream_.copy(&first, first_bad_.data(), 1, cudaMemcpyDeviceToHost);
  stream_.wait();
  if (first == ULLONG_MAX) return std::nullopt;
  NotFinite bad{static_cast<ptrdiff_t>(first), 0.0f};
  stream_.copy(&bad.value, x + first, 1, cudaMemcpyDeviceToHost);
  stream_.wait();
  return bad;
}

void DecoderPass::observe(const float *x, ptrdiff_t t, const std::vector<int64_t> &tokens, Sequences &sequences,
                          Poll &poll) {
  const OnDevice on(device_.index);
  const ptrdiff_t B = std::ssize(tokens);
  const bool is_prefill = sequences.position[0] == 0;
  check_state(is_prefill || !has_failed_, "step: a CUDA call has failed in the middle of an earlier one; reset() and ",
              "prefill again");
  has_failed_ = true;
  std::vector<Row> rows;
  rows.reserve(std::min<ptrdiff_t>(kMostTiles * kTileRows, B * t));
  for (ptrdiff_t b = 0; b < B; ++b) {
    const int64_t held = sequences.position[b];
    for (ptrdiff_t i = 0; i < tokens[b]; ++i) {
      Row row{};
      row.sequence = static_cast<int>(b);
      row.slot = static_cast<int>(held + i);
      row.steps = 1;
      row.prefix_end = static_cast<int>(sequences.prefix_end[b]);
      row.is_last = i == tokens[b] - 1;
      row.x = b * t + i;
      row.previous = i > 0 ? row.x - 1 : held > 0 ? Row::kOwn : Row::kNone;
      rows.push_back(row);
      if (std::ssize(rows) == kMostTiles * kTileRows || (b == B - 1 && row.is_last)) {
        run(rows, x, nullptr, 0, is_prefill ? &poll : nullptr);  // a step is too short to be interrupted
        rows.clear();
        if (is_prefill) poll(0);
      }
    }
  }
  for (ptrdiff_t b = 0; b < B; ++b) sequences.position[b] += tokens[b];
  has_failed_ = false;
}

void DecoderPass::predict(const std::vector<int64_t> &n, float *y, Sequences &sequences, Poll &poll) {
  const OnDevice on(device_.index);
  check_state(!has_failed_, "generate: a CUDA call has failed in the middle of an earlier one; reset() and prefill ",
              "again");
  const int64_t most = *std::max_element(n.begin(), n.end());
  if (most == 0) return;
  has_failed_ = true;
  std::vector<Row> rows;
  for (ptrdiff_t b = 0; b < std::ssize(n); ++b) {
    Row row{};
    row.sequence = static_cast<int>(b);
    row.slot = static_cast<int>(sequences.position[b]);
    row.steps = static_cast<int>(n[b]);
    row.prefix_end = static_cast<int>(sequences.prefix_end[b]);
    row.is_last = 1;
    row.x = row.previous = Row::kOwn;
    rows.push_back(row);
  }
  const int64_t done = run(rows, nullptr, y, most, &poll);
  has_failed_ = false;
  for (ptrdiff_t b = 0; b < std::ssize(n); ++b) sequences.position[b] += std::min(n[b], done);
  if (done < most || poll.stopped(0)) throw Interrupted();
}

void DecoderPass::read(float *y) {
  const OnDevice on(device_.index);
  const size_t k = few_.k, row = k * sizeof(float);
  succeed(cudaMemcpy2DAsync(y, row, state_.data() + k, 2 * row, row, few_.B, cudaMemcpyDeviceToDevice, stream_),
          "cudaMemcpy2DAsync");
  stream_.wait();
}

// Runs the rows in tiles, and returns how many steps were made: all of them, unless the poll says that the call should
// stop.
int DecoderPass::run(const std::vector<Row> &rows, const float *x, float *y, int64_t y_steps, Poll *poll) {
  const bool many_rows = std::ssize(rows) > 2 * few_.L;  // else each meeting of the pipeline has a row of its own
  const DecodePlan &plan = many_rows ? many_ : few_;
  const ptrdiff_t R = plan.rows, tiles = (std::ssize(rows) + R - 1) / R;
  std::vector<Row> padded = rows;
  padded.resize(tiles * R, Row{});
  std::vector<int> tile_steps(tiles);
  for (ptrdiff_t i = 0; i < std::ssize(padded); ++i) {
    tile_steps[i / R] = std::max(tile_steps[i / R], padded[i].steps);
  }
  DecodeArguments a{};
  a.plan = plan;
  a.diff_scale = config_.diff_scale;
  a.out_scale = config_.out_scale;
  a.max_len = config_.max_len;
  a.heads = heads_.data();
  a.units = units_.data();
  a.ends = ends_.data();
  a.pos = pos_.data();
  a.cache = cache_.data();
  a.state = state_.data();
  Row *device_rows = grown(rows_, padded.size());
  stream_.copy(device_rows, padded.data(), padded.size(), cudaMemcpyHostToDevice);
  a.rows = device_rows;
  int *device_steps = grown(tile_steps_, tiles);
  stream_.copy(device_steps, tile_steps.data(), tiles, cudaMemcpyHostToDevice);
  a.tile_steps = device_steps;
  a.num_tiles = static_cast<int>(tiles);
  a.num_steps = *std::max_element(tile_steps.begin(), tile_steps.end());
  a.x = x;
  a.y = y;
  a.y_steps = y_steps;
  a.shares = grown(shares_, tiles * plan.tile_shares());
  a.arrived = grown(arrived_, 2 * tiles);
  stream_.set_bytes(a.arrived, 0, 2 * tiles);
  a.stop = stop_.on_device();
  a.stop_at = stop_at_.data();
  const int never = INT_MAX;
  stream_.copy(stop_at_.data(), &never, 1, cudaMemcpyHostToDevice);
  stop_.set(std::exchange(stops_at_once_, false) ? 1 : 0);
  launch_decode(a, options_.weights, options_.cache, blocks_of(plan, device_), shared_bytes_of(plan, device_), stream_);
  if (poll != nullptr) {
    stream_.wait(*poll, [&] { stop_.set(1); });
  } else {
    stream_.wait();
  }
  int stop_at = 0;
  stream_.copy(&stop_at, stop_at_.data(), 1, cudaMemcpyDeviceToHost);
  stream_.wait();
  return std::min(stop_at, a.num_steps);
}

}  // namespace tipl::cuda
