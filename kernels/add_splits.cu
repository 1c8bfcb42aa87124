// y = sum of the splits, always in the same order; then the epilogue of bit_planes_multiply.cuh.
//
// Compile-time: EPILOGUE (0, 1: + residual, 2: silu(gate) * up of alternating runs of eight rows),
// ACTIVATION_BF16. Grid (blocks of outputs, batch).

DEVICE float sum_of(const float *partial, u64 stride, int splits) {
    float sum = 0.0f;
#pragma unroll 4
    for (int split = 0; split < splits; ++split) sum += partial[split * stride];
    return sum;
}

extern "C" __global__ void add_splits(const float *partial, // [splits][batch][padded]
                                      const u16 *residual, u16 *y, // [batch][width]
                                      const int *places, // [outputs], columns of y; or null
                                      int outputs, int padded, int batch, int splits, int width) {
    let_next_start();
    wait_for_previous();
    int out = (int)(blockIdx.x * blockDim.x + threadIdx.x), token = (int)blockIdx.y;
    if (out >= outputs) return;
    int row = EPILOGUE == 2 ? out / 8 * 16 + out % 8 : out;
    u64 stride = (u64)batch * padded, place = (u64)token * width + (places ? places[out] : out);
    const float *first = partial + (u64)token * padded + row;
    float value = sum_of(first, stride, splits);
    if (EPILOGUE == 1) value += load_activation(residual[place]);
    if (EPILOGUE == 2) value = silu(value) * sum_of(first + 8, stride, splits);
    y[place] = store_activation(value);
}
