// Compile-time: ACTIVATION_BF16.

// y = sum of the splits, always in the same order.
extern "C" __global__ void add_splits(const float *partial, u16 *y, int out_features, int padded,
                                      int batch, int splits) {
    int out = (int)(blockIdx.x * blockDim.x + threadIdx.x), token = (int)blockIdx.y;
    if (out >= out_features) return;
    float sum = 0.0f;
    for (int split = 0; split < splits; ++split)
        sum += partial[((u64)split * batch + token) * padded + out];
    y[(u64)token * out_features + out] = store_activation(sum);
}
