// CUDA releases of the runtime and the driver.
#include <cuda_runtime.h>

#include "kernels.h"

std::pair<int, int> cuda_releases() {
    int driver = 0;
    cudaDriverGetVersion(&driver);
    return {CUDART_VERSION / 1000, driver / 1000};
}
