// csrc's own launchers, for the runtime of this folder.
#include "../../csrc/cka_small.cu"
#include "../../csrc/covariance.cu"
#include "../../csrc/driver.cu"
#include "../../csrc/moments_sm80.cu"
#include "../../csrc/moments_sm90.cu"
#include "../../csrc/scale.cu"
#include "../../csrc/tensor_map.cu"
