// Work on rows that a device does, wherever the rows lie. Those in the host's memory come through two pinned buffers,
// on a stream of their own, while kernels work on the rows before them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "call.h"
#include "cuda/device.h"
#include "cuda/sketch.h"
#include "rows.h"

namespace tipl::cuda {

class RowWork {
 public:
  // For rows of p columns. The device must be the current one in all calls.
  explicit RowWork(ptrdiff_t p) : p_(p) {}

  const Stream &stream() const noexcept { return stream_; }

  // At most kMappedRows rows in the device's memory, for what is asked of stream() from now on, until the second next
  // call. Rows that lie there already stay where they are.
  DeviceRows bring(RowView x);

  // A row (p) in the device's memory, until the next call; null for null.
  const float *bring_origin(const float *origin);

  // work(rows, begin) for each run of at most kMappedRows rows of x, which bring() has brought.
  void for_each_run(RowView x, Poll &poll, const std::function<void(DeviceRows, ptrdiff_t begin)> &work);

  // The sum of squares of each row of x - origin, in float64.
  std::vector<double> squares(RowView x, const float *origin, Poll &poll);

  // out (x.count, y.count) <- (x - origin)(y - origin)^T in float64. `same`: x and y are the same rows.
  void products(RowView x, RowView y, const float *origin, bool same, double *out, Poll &poll);

  // to (x.count, p) in the host's memory <- x.
  void copy_rows(RowView x, float *to) const;

 private:
  // Rows that have come from the host.
  struct Slot {
    explicit Slot(ptrdiff_t p) : rows(static_cast<double>(kMappedRows) * static_cast<double>(p)) {}
    Buffer<float> rows;  // (kMappedRows, p)
    Event arrived;       // behind their copy, for stream_
    Event used;          // behind the work on them, for copies_
  };
  // A pinned buffer on the way there.
  struct Piece {
    explicit Piece(size_t size) : bytes(size) {}
    PinnedBytes bytes;
    Event copied;
  };

  void upload(RowView x, float *to);
  DeviceRows whole(RowView x, Buffer<float> &buffer);

  const ptrdiff_t p_;
  Stream stream_, copies_;
  std::array<std::optional<Slot>, 2> slots_;  // made when they are first needed, as are the pieces
  std::array<std::optional<Piece>, 2> pieces_;
  int slot_ = 0, piece_ = 0;  // the last slot, and the next piece
  Buffer<float> origin_;
};

}  // namespace tipl::cuda
