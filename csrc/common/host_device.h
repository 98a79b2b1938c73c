#pragma once

// Marks functions for both host and device; empty where a CPU compiler reads them.
#ifdef __CUDACC__
#define RIFT_HOST_DEVICE __host__ __device__
#else
#define RIFT_HOST_DEVICE
#endif
