// SPDX-License-Identifier: Apache-2.0
// What every launch needs: the stream that torch is on, a grid's size, and what went wrong.
#pragma once

#include "common.h"

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/shim_utils.h>

namespace samfast {

constexpr int kThreads = 256;

// Items of a block's work, one a thread in turn; all are done when it returns.
struct Threads {
  template <typename F>
  __device__ void operator()(int count, const F& item) const {
    for (int i = threadIdx.x; i < count; i += kThreads) item(i);
    __syncthreads();
  }
};

// Looked up in the library that torch has loaded: a CPU-only torch has none, and the extension must
// load beside it; linkers that drop libraries whose symbols nobody names would lose it elsewhere.
inline cudaStream_t current_stream(const torch::stable::Tensor& t) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* found = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Get>(found);
  }();
  STD_TORCH_CHECK(get != nullptr, "this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(static_cast<int32_t>(t.get_device_index()), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline unsigned grid(int64_t blocks) {
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), blocks, " blocks are too many for one launch");
  return static_cast<unsigned>(blocks);
}

inline void launched(const char* operation, cudaError_t code = cudaGetLastError()) {
  STD_TORCH_CHECK(code == cudaSuccess, operation, ": ", cudaGetErrorString(code));
}

}  // namespace samfast
