// The hardware layer: all of Hopper that kernels use.
#pragma once

#include "cuda/arch/barrier.h"
#include "cuda/arch/base.h"
#include "cuda/arch/launch.h"
#include "cuda/arch/memory.h"
#include "cuda/arch/number.h"
#include "cuda/arch/thread.h"
#include "cuda/arch/tma.h"
#include "cuda/arch/wgmma.h"
