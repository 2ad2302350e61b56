#include "cuda/quantize/quantize.h"
namespace jaxkern::cuda { Error quantize(const Quantize&, Stream) { return "not here"; } Error prepare_quantize() { return {}; } }
