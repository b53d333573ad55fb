// Arrays on a device, as Python has them: what comes in from any library that speaks DLPack, and what goes out.
#pragma once

#include <initializer_list>
#include <memory>
#include <optional>
#include <vector>

#include "bind.h"
#include "cuda/device.h"

namespace tipl::cuda {

// A float32 array on a device, or a slice of one, which shares its memory.
class DeviceArray {
 public:
  DeviceArray(std::vector<py::ssize_t> shape, int device);  // C-contiguous

  float *data() const noexcept { return buffer_->data() + offset_; }
  const std::vector<py::ssize_t> &shape() const noexcept { return shape_; }
  int device() const noexcept { return device_; }
  py::ssize_t size() const noexcept;

  // Slices of some axes, as in NumPy, with positive steps.
  DeviceArray sliced(const py::object &slices) const;
  py::array_t<float> to_numpy() const;
  static DeviceArray from_numpy(const py::object &array, int device);
  // The array as a DLPack capsule, which keeps the memory alive.
  py::capsule to_dlpack() const;

 private:
  std::vector<py::ssize_t> shape_, strides_;  // strides in elements
  py::ssize_t offset_ = 0;
  int device_;
  std::shared_ptr<Buffer<float>> buffer_;
};

// A float32 array on a device that another library has lent.
struct DeviceTensor {
  py::object capsule;  // keeps it alive
  const float *data = nullptr;
  std::vector<py::ssize_t> shape, strides;  // in elements
};

// The array on this device that an object gives out by DLPack, for the work of one stream; nothing for arrays in the
// host's memory and for all else. Raises TypeError unless it is of float32, ValueError where it is on another device.
std::optional<DeviceTensor> borrowed(const char *where, const char *name, const py::object &object, int device,
                                     const Stream &stream);

// An argument on the device, for the work of one stream: an array of any library on this device, without a copy, or a
// copy of one in the host's memory.
class DeviceInput {
 public:
  // Raises as checked_array does, and ValueError where the array is on another device.
  DeviceInput(const char *where, const char *name, const py::object &object, std::initializer_list<Dim> dims,
              int device, const Stream &stream);
  ~DeviceInput();
  DeviceInput(const DeviceInput &) = delete;
  DeviceInput &operator=(const DeviceInput &) = delete;

  const float *data() const noexcept { return data_; }
  py::ssize_t shape(int axis) const noexcept { return shape_[axis]; }
  // A result where the argument was: a NumPy array, or `result` itself.
  py::object like(DeviceArray result) const;

 private:
  const float *data_ = nullptr;
  std::vector<py::ssize_t> shape_;
  std::optional<DeviceArray> copy_;  // of an array in the host's memory
  py::object capsule_;               // else: keeps the array alive
};

void bind_device_array(py::module_ &m);

}  // namespace tipl::cuda
