#include "cuda/row_work.h"

#include <algorithm>
#include <cstring>

namespace tipl::cuda {
namespace {

constexpr size_t kPieceBytes = 4 << 20;           // of a pinned buffer
constexpr double kMostShares = 32.0 * (1 << 20);  // doubles for products that are not summed up yet

}  // namespace

// Rows in the host's memory, piece by piece: while one pinned buffer is copied, the other is filled.
void RowWork::upload(RowView x, float *to) {
  const size_t row_bytes = p_ * sizeof(float), bytes = x.count * row_bytes;
  for (size_t done = 0; done < bytes;) {
    std::optional<Piece> &piece = pieces_[piece_];
    piece_ = 1 - piece_;
    if (piece) {
      piece->copied.wait();
    } else {
      piece.emplace(kPieceBytes);
    }
    const size_t size = std::min(kPieceBytes, bytes - done);
    for (size_t filled = 0; filled < size;) {  // rows, or what of them fits
      const size_t row = (done + filled) / row_bytes, begin = (done + filled) % row_bytes;
      const size_t run = std::min(row_bytes - begin, size - filled);
      std::memcpy(piece->bytes.data() + filled, reinterpret_cast<const char *>(x.row(row)) + begin, run);
      filled += run;
    }
    copies_.copy(reinterpret_cast<char *>(to) + done, piece->bytes.data(), size, cudaMemcpyHostToDevice);
    piece->copied.record(copies_);
    done += size;
  }
}

DeviceRows RowWork::bring(RowView x) {
  if (x.on_device) return {x.data, x.count, x.stride};
  slot_ = 1 - slot_;
  std::optional<Slot> &slot = slots_[slot_];
  if (!slot) slot.emplace(p_);
  // What was asked of the stream since the other slot was brought may still read this one.
  std::optional<Slot> &other = slots_[1 - slot_];
  if (other) other->used.record(stream_);
  slot->used.hold(copies_);
  upload(x, slot->rows.data());
  slot->arrived.record(copies_);
  slot->arrived.hold(stream_);
  return {slot->rows.data(), x.count, p_};
}

const float *RowWork::bring_origin(const float *origin) {
  if (origin == nullptr) return nullptr;
  if (origin_.size() == 0) origin_ = Buffer<float>(static_cast<double>(p_));
  stream_.copy(origin_.data(), origin, p_, cudaMemcpyHostToDevice);
  return origin_.data();
}

void RowWork::for_each_run(RowView x, Poll &poll, const std::function<void(DeviceRows, ptrdiff_t)> &work) {
  for (ptrdiff_t begin = 0; begin < x.count; begin += kMappedRows) {
    poll(0);
    work(bring(x.part(begin, std::min<ptrdiff_t>(kMappedRows, x.count - begin))), begin);
  }
}

std::vector<double> RowWork::squares(RowView x, const float *origin, Poll &poll) {
  std::vector<double> squares(x.count);
  if (x.count == 0) return squares;
  Buffer<double> sums(static_cast<double>(x.count));
  const float *const zero = bring_origin(origin);
  for_each_run(x, poll,
               [&](DeviceRows rows, ptrdiff_t begin) { sum_squares(rows, zero, p_, sums.data() + begin, stream_); });
  stream_.copy(squares.data(), sums.data(), squares.size(), cudaMemcpyDeviceToHost);
  stream_.wait();
  return squares;
}

// All rows in the device's memory.
DeviceRows RowWork::whole(RowView x, Buffer<float> &buffer) {
  if (x.on_device) return {x.data, x.count, x.stride};
  buffer = Buffer<float>(static_cast<double>(x.count) * static_cast<double>(p_));
  upload(x, buffer.data());
  Event arrived;
  arrived.record(copies_);
  arrived.hold(stream_);
  return {buffer.data(), x.count, p_};
}

void RowWork::products(RowView x, RowView y, const float *origin, bool same, double *out, Poll &poll) {
  if (x.count == 0 || y.count == 0) return;
  Buffer<float> y_copy;
  const DeviceRows right = whole(y, y_copy);
  const float *const zero = bring_origin(origin);
  const auto spans = static_cast<double>(product_spans(p_)), columns = static_cast<double>(y.count);
  const bool at_once = same && spans * columns * columns <= kMostShares;
  const double most_rows = at_once ? columns : static_cast<double>(std::min<ptrdiff_t>(kMappedRows, x.count));
  const Buffer<double> shares(spans * most_rows * columns), sums(most_rows * columns);
  const auto multiply = [&](DeviceRows rows, ptrdiff_t begin) {
    multiply_rows(rows, right, zero, p_, at_once, shares.data(), sums.data(), stream_);
    stream_.copy(out + begin * y.count, sums.data(), rows.count * y.count, cudaMemcpyDeviceToHost);
    stream_.wait();
  };
  if (at_once) return multiply(right, 0);
  for_each_run(same ? RowView{right.data, right.count, right.stride, true} : x, poll, multiply);
}

void RowWork::copy_rows(RowView x, float *to) const {
  const size_t row_bytes = p_ * sizeof(float);
  if (!x.on_device) {
    for (ptrdiff_t i = 0; i < x.count; ++i) std::memcpy(to + i * p_, x.row(i), row_bytes);
    return;
  }
  succeed(cudaMemcpy2DAsync(to, row_bytes, x.data, x.stride * sizeof(float), row_bytes, x.count, cudaMemcpyDeviceToHost,
                            stream_),
          "cudaMemcpy2DAsync");
  stream_.wait();
}

}  // namespace tipl::cuda
