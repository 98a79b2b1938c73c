#pragma once

#include "common/host_device.h"

namespace rift {

// Where a block is in a ring of stages, and how often it has been round.
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
