#include "cuda/device.h"

#include <chrono>
#include <thread>

namespace tipl::cuda {

std::vector<DeviceInfo> devices() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver) {
    cudaGetLastError();
    return {};
  }
  succeed(error, "cudaGetDeviceCount");
  std::vector<DeviceInfo> list;
  for (int index = 0; index < count; ++index) list.push_back(device_info(index));
  return list;
}

DeviceInfo device_info(int index) {
  cudaDeviceProp properties;
  succeed(cudaGetDeviceProperties(&properties, index), "cudaGetDeviceProperties(", index, ")");
  return {index,
          properties.name,
          properties.major,
          properties.minor,
          properties.multiProcessorCount,
          properties.sharedMemPerBlockOptin,
          properties.totalGlobalMem};
}

void Patience::wait() noexcept {
  constexpr int kEagerLooks = 2000;  // about a millisecond
  constexpr auto kLongest = std::chrono::microseconds(200);
  if (++looks_ < kEagerLooks) return;
  std::this_thread::sleep_for(kLongest);
}

}  // namespace tipl::cuda
