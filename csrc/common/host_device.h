#pragma once

// In front of functions that the host and the device have: plain C++, also for a CPU's compiler.
#ifdef __CUDACC__
#define RIFT_HOST_DEVICE __host__ __device__
#else
#define RIFT_HOST_DEVICE
#endif
