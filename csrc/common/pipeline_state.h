#pragma once

#include "common/host_device.h"

namespace rift {

// Position in a circular buffer of stages: the stage, and the parity of the rounds completed, which
// is the phase that an mbarrier of the stage waits for.
template <int STAGES>
struct PipelineState {
  int stage = 0;
  unsigned parity = 0;

  RIFT_HOST_DEVICE void advance() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace rift
