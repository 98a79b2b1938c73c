// All launchers of csrc, compiled for the CUDA runtime of this folder.
#include "cka_large/cka_large.cu"
#include "cka_large/moments_sm80.cu"
#include "cka_large/moments_sm90.cu"
#include "cka_large/tensor_map.cu"
#include "cka_small/cka_small.cu"
#include "cka_small/scale.cu"
#include "common/driver.cu"
