// A decoder's pass on a CUDA device: decode_kernel.cuh is its arithmetic, this the host's side. Letters as in decode.h.
//
// Calls  wait for the device before they return, so that results can be read on any stream, and so that Ctrl-C is heard
//        meanwhile: the kernel looks at a flag in the host's memory, and ends after the step that it is at.
// Bits   are the same from run to run, and for a sequence alone as in company, for any lengths; another device with
//        another number of SMs may sum in another order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "call.h"
#include "cuda/decode_plan.h"
#include "cuda/device.h"
#include "cuda/packed_parts.h"
#include "decoder_config.h"
#include "forward_pass.h"

namespace tipl::cuda {

// The plan of a decoder for passes of many rows, or of few. Throws std::invalid_argument where the model is too wide
// for a block of the device.
DecodePlan plan_of(const DecoderConfig &config, const DecoderOptions &options, const DeviceInfo &device,
                   bool many_rows);

class DecoderPass final : public ForwardPass {
 public:
  // The device must be the current one. Throws as check_decoder does, and std::runtime_error where a CUDA call fails.
  DecoderPass(const DecoderConfig &config, const std::vector<const float *> &tensors, const DecoderOptions &options,
              int device, Poll &poll);

  std::optional<NotFinite> find_not_finite(const float *x, ptrdiff_t t, const std::vector<int64_t> &tokens,
                                           Poll &poll) override;
  void observe(const float *x, ptrdiff_t t, const std::vector<int64_t> &tokens, Sequences &sequences,
               Poll &poll) override;
  void predict(const std::vector<int64_t> &n, float *y, Sequences &sequences, Poll &poll) override;
  void read(float *y) override;

  const Stream &stream() const noexcept { return stream_; }
  // For tests: the next call of predict hears that it should stop as soon as it looks.
  void stop_at_once() noexcept { stops_at_once_ = true; }
  // The two plans, for tests and counts.
  const DecodePlan &plan(bool many_rows) const noexcept { return many_rows ? many_ : few_; }

 private:
  int run(const std::vector<Row> &rows, const float *x, float *y, int64_t y_steps, Poll *poll);

  const DecoderConfig config_;
  const DecoderOptions options_;
  const DeviceInfo device_;
  const DecodePlan few_, many_;
  bool stops_at_once_ = false;
  bool has_failed_ = false;  // a CUDA call, in the middle of a pass: what the sequences hold is not known

  // Before everything that is on the device.
  const Stream stream_;
  MappedFlag stop_;
  Buffer<unsigned char> heads_, units_, ends_, cache_;
  Buffer<float> pos_, state_, shares_;
  Buffer<Row> rows_;
  Buffer<int> tile_steps_, stop_at_;
  Buffer<unsigned> arrived_;
  Buffer<int64_t> tokens_;
  Buffer<unsigned long long> first_bad_;
};

}  // namespace tipl::cuda
