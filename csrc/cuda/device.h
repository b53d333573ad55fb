// The device: its memory, its streams, and its errors as exceptions.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "call.h"
#include "check.h"

namespace tipl::cuda {

// Throws std::runtime_error unless a call of the CUDA runtime succeeded: "cudaMalloc(4096 bytes): out of memory".
template <class... Parts>
void succeed(cudaError_t error, const Parts &...call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // forgets it, where it can be forgotten
  check_state(false, call..., ": ", cudaGetErrorString(error));
}

struct DeviceInfo {
  int index;
  std::string name;
  int major, minor;  // compute capability
  int num_sms;
  size_t shared_bytes;  // that one block may use
  size_t memory_bytes;
};

// The devices that this process may use; none where there is no driver.
std::vector<DeviceInfo> devices();

// The device of this index. Throws std::runtime_error where there is none.
DeviceInfo device_info(int index);

// Makes a device the current one of the calling thread for as long as this lives.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    succeed(cudaGetDevice(&before_), "cudaGetDevice");
    succeed(cudaSetDevice(device), "cudaSetDevice(", device, ")");
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice &) = delete;
  OnDevice &operator=(const OnDevice &) = delete;

 private:
  int before_ = 0;
};

// Owned memory of the current device, uninitialised.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  // Throws std::bad_alloc where the device lacks the memory altogether, std::runtime_error where it is not free.
  explicit Buffer(double count) {
    const double bytes = count * sizeof(T);
    size_t free = 0, total = 0;
    succeed(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
    if (bytes > static_cast<double>(total)) throw_too_large(bytes, static_cast<double>(total), "the device");
    size_ = static_cast<size_t>(count);
    if (size_ > 0)
      succeed(cudaMalloc(reinterpret_cast<void **>(&data_), size_ * sizeof(T)), "cudaMalloc(", size_ * sizeof(T),
              " bytes)");
  }
  Buffer(Buffer &&other) noexcept { swap(other); }
  Buffer &operator=(Buffer &&other) noexcept {
    swap(other);
    return *this;
  }
  ~Buffer() { cudaFree(data_); }

  T *data() const noexcept { return data_; }
  size_t size() const noexcept { return size_; }

 private:
  void swap(Buffer &other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }

  T *data_ = nullptr;
  size_t size_ = 0;
};

// A stream of the current device, which no other stream waits for.
class Stream {
 public:
  Stream() { succeed(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags"); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream &) = delete;
  Stream &operator=(const Stream &) = delete;
  operator cudaStream_t() const noexcept { return stream_; }

  // Copies `count` numbers to the device, from pageable memory that may be used again at once, or back.
  template <class T>
  void copy(T *to, const T *from, size_t count, cudaMemcpyKind kind) const {
    if (count > 0) succeed(cudaMemcpyAsync(to, from, count * sizeof(T), kind, stream_), "cudaMemcpyAsync");
  }
  template <class T>
  void set_bytes(T *to, int byte, size_t count) const {
    if (count > 0) succeed(cudaMemsetAsync(to, byte, count * sizeof(T), stream_), "cudaMemsetAsync");
  }
  // Waits until all that was asked of the stream is done.
  void wait() const { succeed(cudaStreamSynchronize(stream_), "cudaStreamSynchronize"); }
  // The same, asking the poll meanwhile; calls stop() once when the call should stop, and goes on waiting.
  template <class Stop>
  void wait(Poll &poll, const Stop &stop) const;

 private:
  cudaStream_t stream_ = nullptr;
};

// A place in the work of a stream, for which another stream can wait.
class Event {
 public:
  Event() { succeed(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "cudaEventCreateWithFlags"); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event &) = delete;
  Event &operator=(const Event &) = delete;

  // Puts the event behind all that was asked of the stream so far.
  void record(const Stream &stream) { succeed(cudaEventRecord(event_, stream), "cudaEventRecord"); }
  // Lets all that is asked of the stream from now on wait for the event; not at all where it was never recorded.
  void hold(const Stream &stream) const { succeed(cudaStreamWaitEvent(stream, event_, 0), "cudaStreamWaitEvent"); }
  void wait() const { succeed(cudaEventSynchronize(event_), "cudaEventSynchronize"); }

 private:
  cudaEvent_t event_ = nullptr;
};

// Memory of the host that a device copies from at full speed, while the host goes on.
class PinnedBytes {
 public:
  explicit PinnedBytes(size_t bytes) { succeed(cudaHostAlloc(&data_, bytes, 0), "cudaHostAlloc(", bytes, " bytes)"); }
  ~PinnedBytes() { cudaFreeHost(data_); }
  PinnedBytes(const PinnedBytes &) = delete;
  PinnedBytes &operator=(const PinnedBytes &) = delete;

  char *data() const noexcept { return static_cast<char *>(data_); }

 private:
  void *data_ = nullptr;
};

// One number in the host's memory that kernels read and write while they run.
class MappedFlag {
 public:
  MappedFlag() {
    succeed(cudaHostAlloc(&host_, sizeof(int), cudaHostAllocMapped), "cudaHostAlloc");
    const cudaError_t error = cudaHostGetDevicePointer(&device_, host_, 0);
    if (error != cudaSuccess) cudaFreeHost(host_);
    succeed(error, "cudaHostGetDevicePointer");
    set(0);
  }
  ~MappedFlag() { cudaFreeHost(host_); }
  MappedFlag(const MappedFlag &) = delete;
  MappedFlag &operator=(const MappedFlag &) = delete;

  void set(int value) noexcept { *static_cast<volatile int *>(host_) = value; }
  const int *on_device() const noexcept { return static_cast<const int *>(device_); }

 private:
  void *host_ = nullptr, *device_ = nullptr;
};

// Sleeps between two looks at a stream: not at all at first, then ever longer, at most 0.2 ms.
class Patience {
 public:
  void wait() noexcept;

 private:
  int looks_ = 0;
};

template <class Stop>
void Stream::wait(Poll &poll, const Stop &stop) const {
  bool stopped = false;
  for (Patience patience;; patience.wait()) {
    const cudaError_t error = cudaStreamQuery(stream_);
    if (error != cudaErrorNotReady) return succeed(error, "cudaStreamQuery");
    if (!stopped && poll.stopped(0)) {
      stopped = true;
      stop();
    }
  }
}

}  // namespace tipl::cuda
